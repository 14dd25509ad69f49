package stdio

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// markSize is one page; the note needs little of it.
const markSize = 4096

// note is the layout of a Mark's file. state is written last when a note is
// made and first when it is taken away.
type note struct {
	state   uint32 // noteNone or noteMoving
	expect  byte   // the last byte that is being drained
	witness byte   // becomes expect when it was
	_       [2]byte
	ino     uint64
	size    int64 // of the log before the write
	n       int64 // bytes being moved, for people who look
}

const (
	noteNone   = 0
	noteMoving = 0x4d6f7665 // "Move"
)

// Mark is a page of shared file memory that tells a successor what a killed
// process was doing to a log.
type Mark struct {
	mem  []byte
	note *note
}

// OpenMark maps the mark file at path, which is made when missing.
func OpenMark(path string) (*Mark, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the log's mark: %w", err)
	}
	defer f.Close()
	// Allocated now: a full disk must not become a SIGBUS later.
	if err := unix.Fallocate(int(f.Fd()), 0, 0, markSize); errors.Is(err, unix.EOPNOTSUPP) {
		_, err = f.WriteAt(make([]byte, markSize), 0)
		if err != nil {
			return nil, fmt.Errorf("allocate the log's mark: %w", err)
		}
	} else if err != nil {
		return nil, fmt.Errorf("allocate the log's mark: %w", err)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, markSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map the log's mark: %w", err)
	}
	return &Mark{mem: mem, note: (*note)(unsafe.Pointer(&mem[0]))}, nil
}

// Close unmaps the mark; the file stays.
func (m *Mark) Close() error {
	m.note = nil
	return unix.Munmap(m.mem)
}

func (m *Mark) set(ino uint64, size int64, n int, lastByte byte) {
	m.note.ino, m.note.size, m.note.n = ino, size, int64(n)
	m.note.expect, m.note.witness = lastByte, ^lastByte
	atomic.StoreUint32(&m.note.state, noteMoving)
}

func (m *Mark) clear() { atomic.StoreUint32(&m.note.state, noteNone) }

// witness is the byte that a drain ends in.
func (m *Mark) witness() []byte {
	return unsafe.Slice(&m.note.witness, 1)
}

// undone tells of a move that was begun and not drained.
func (m *Mark) undone() (ino uint64, size int64, yes bool) {
	if atomic.LoadUint32(&m.note.state) != noteMoving || m.note.witness == m.note.expect {
		return 0, 0, false
	}
	return m.note.ino, m.note.size, true
}
