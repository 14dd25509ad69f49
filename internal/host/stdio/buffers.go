package stdio

import (
	"errors"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	smallPipe = 64 << 10
	bigPipe   = 1 << 20
	keepIdle  = 2
)

// Buffers lends the memory and the scratch pipe that one step of a stream
// needs, so that a thousand silent streams cost nothing. The zero value works.
type Buffers struct {
	mu   sync.Mutex
	idle []*scratch
}

// scratch is an empty pipe with as many slots as the one that is teed into
// it, the text read from it, and the entries made of the text.
type scratch struct {
	r, w int
	size int
	text []byte
	out  []byte
}

func (b *Buffers) get(size int) (*scratch, error) {
	if size <= smallPipe {
		size = smallPipe
		b.mu.Lock()
		if n := len(b.idle); n > 0 {
			s := b.idle[n-1]
			b.idle = b.idle[:n-1]
			b.mu.Unlock()
			return s, nil
		}
		b.mu.Unlock()
	}
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, os.NewSyscallError("pipe2", err)
	}
	if n, err := unix.FcntlInt(uintptr(p[1]), unix.F_GETPIPE_SZ, 0); err == nil && n != size {
		if _, err := unix.FcntlInt(uintptr(p[1]), unix.F_SETPIPE_SZ, size); err != nil && n < smallPipe {
			// Too many pipes on this machine: slow, but right.
			size = n
		}
	}
	return &scratch{r: p[0], w: p[1], size: size, text: make([]byte, size), out: make([]byte, 0, 2*size)}, nil
}

func (b *Buffers) put(s *scratch) {
	if s.size == smallPipe {
		b.mu.Lock()
		if len(b.idle) < keepIdle {
			b.idle = append(b.idle, s)
			s = nil
		}
		b.mu.Unlock()
	}
	if s != nil {
		s.close()
	}
}

func (s *scratch) close() {
	unix.Close(s.r)
	unix.Close(s.w)
}

// tee copies what pipe holds without taking it. full tells that pipe may hold
// more slots than fit.
func (s *scratch) tee(pipe int) (text []byte, full bool, err error) {
	var n int64
	for {
		n, err = unix.Tee(pipe, s.w, s.size, unix.SPLICE_F_NONBLOCK)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil || n == 0 {
		return nil, false, err
	}
	p := []unix.PollFd{{Fd: int32(s.w), Events: unix.POLLOUT}}
	_, _ = unix.Poll(p, 0)
	full = p[0].Revents&unix.POLLOUT == 0
	for got := 0; got < int(n); {
		m, err := unix.Read(s.r, s.text[got:n])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || m == 0 {
			return nil, false, os.NewSyscallError("read the scratch pipe", err)
		}
		got += m
	}
	return s.text[:n], full, nil
}
