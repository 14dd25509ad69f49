package stdio

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// Log is the log file that the streams of one container share.
type Log struct {
	path    string
	maxLine int

	mu   sync.Mutex
	file *os.File // nil: not open now
	mark *Mark
	lost map[string]int64 // bytes thrown away per stream and not told yet
}

// OpenLog opens the log at path, whose folder must exist, and repairs what a
// killed predecessor left half written. markPath is kept between lives.
func OpenLog(path, markPath string, maxLine int) (*Log, error) {
	l, err := newLog(path, markPath, maxLine)
	if err != nil {
		return nil, err
	}
	if err := l.open(); err != nil {
		l.mark.Close()
		return nil, err
	}
	return l, nil
}

// TakeUpLog is OpenLog for a log that exists. When it cannot be opened now, it
// is one that cannot be written for a while.
func TakeUpLog(path, markPath string, maxLine int) (*Log, error) {
	l, err := newLog(path, markPath, maxLine)
	if err == nil {
		_ = l.open() // tried again, and told of, when there is something to write
	}
	return l, err
}

func newLog(path, markPath string, maxLine int) (*Log, error) {
	mark, err := OpenMark(markPath)
	if err != nil {
		return nil, err
	}
	return &Log{path: path, maxLine: maxLine, mark: mark, lost: map[string]int64{}}, nil
}

// open opens the file and repairs it; mu is held, or nobody else knows l.
func (l *Log) open() error {
	if err := l.recover(); err != nil {
		return err
	}
	f, err := openLogFile(l.path)
	if err == nil {
		l.file = f
	}
	return err
}

func openLogFile(path string) (*os.File, error) {
	// A symlink at the log's place is not ours.
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY|unix.O_NOFOLLOW, 0o640)
	if err != nil {
		return nil, fmt.Errorf("open the container's log: %w", err)
	}
	return f, nil
}

// recover cuts entries off the log whose text is still in the pipe.
func (l *Log) recover() error {
	ino, size, yes := l.mark.undone()
	if yes {
		path, err := findInode(l.path, ino)
		if err != nil {
			return fmt.Errorf("find the log that was being written: %w", err)
		}
		if path != "" {
			if err := cut(path, size); err != nil {
				return fmt.Errorf("cut the log to its last noted size: %w", err)
			}
		}
	}
	l.mark.clear()
	return nil
}

func cut(path string, size int64) error {
	fi, err := os.Lstat(path)
	if err != nil || fi.Size() <= size {
		return err
	}
	return os.Truncate(path, size)
}

// findInode looks for a file by its inode, at path first, then beside it;
// "" when it is no more.
func findInode(path string, ino uint64) (string, error) {
	if inode(path) == ino {
		return path, nil
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return "", nil
		}
		return "", err
	}
	for _, e := range entries {
		if p := filepath.Join(filepath.Dir(path), e.Name()); e.Type().IsRegular() && inode(p) == ino {
			return p, nil
		}
	}
	return "", nil
}

func inode(path string) uint64 {
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil {
		return 0
	}
	return st.Ino
}

// Path is where the log is.
func (l *Log) Path() string { return l.path }

// Reopen goes on in a new file at the log's path.
func (l *Log) Reopen() error {
	f, err := openLogFile(l.path)
	if err != nil {
		return err
	}
	old, err := l.swap(f)
	if old != nil {
		err = errors.Join(err, old.Close())
	}
	return err
}

// swap takes f as the file and gives the one that is to be closed.
func (l *Log) swap(f *os.File) (old *os.File, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.mark == nil: // closed meanwhile
		return f, nil
	case l.file == nil: // with something to repair, maybe
		return f, l.open()
	}
	old, l.file = l.file, f
	return old, nil
}

// Close closes the file; nothing may be written any more.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	err := l.mark.Close()
	l.mark = nil
	if l.file != nil {
		err = errors.Join(l.file.Close(), err)
	}
	return err
}

// move writes entries and drains the text that they were made of from pipe.
// On error nothing is written and nothing is drained.
func (l *Log) move(entries, text []byte, pipe int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		if err := l.open(); err != nil {
			return err
		}
	}
	var st unix.Stat_t
	if err := fstat(l.file, &st); err != nil {
		return err
	}
	l.mark.set(st.Ino, st.Size, len(text), text[len(text)-1])
	if err := l.write(entries, st.Size); err != nil {
		l.mark.clear()
		return err
	}
	drain(pipe, text[:len(text)-1], l.mark.witness())
	l.mark.clear()
	return nil
}

// write adds entries as a whole or not at all.
func (l *Log) write(entries []byte, size int64) error {
	n, err := l.file.Write(entries)
	if err == nil {
		return nil
	}
	if n > 0 {
		err = errors.Join(err, l.file.Truncate(size))
	}
	return err
}

// discard drains text without writing it.
func (l *Log) discard(stream string, text []byte, pipe int) {
	var witness [1]byte
	drain(pipe, text[:len(text)-1], witness[:])
	l.addLost(stream, int64(len(text)))
}

func (l *Log) addLost(stream string, n int64) {
	l.mu.Lock()
	l.lost[stream] += n
	l.mu.Unlock()
}

// takeLost gives and forgets how much of a stream was discarded.
func (l *Log) takeLost(stream string) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := l.lost[stream]
	delete(l.lost, stream)
	return n
}

func fstat(f *os.File, st *unix.Stat_t) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var e error
	if err := rc.Control(func(fd uintptr) { e = unix.Fstat(int(fd), st) }); err != nil {
		return err
	}
	return os.NewSyscallError("fstat", e)
}

// drain takes len(buf)+1 bytes out of pipe, the last one into witness. They
// are known to be there (only the container itself could have read its own
// output meanwhile, and then nothing is left to drain); buf is overwritten
// with what it holds already.
func drain(pipe int, buf, witness []byte) {
	for {
		if _, err := unix.Readv(pipe, [][]byte{buf, witness}); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}
