package stdio

import (
	"errors"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxBacklog is how far a client may fall behind before it is cut off.
const maxBacklog = 1 << 20

const (
	// earlyTime is for how long a terminal's output waits for the first client.
	earlyTime = 10 * time.Second
	// maxEarly bounds it; what is older than that is in the log alone.
	maxEarly = 64 << 10
)

// Fanout copies a container's output to its attached clients. The zero value
// has no client.
type Fanout struct {
	mu     sync.Mutex // taken before a sink's
	sinks  map[*sink]struct{}
	closed bool
	kept   string      // stream of which the beginning is kept, if any
	early  []byte      // what was kept
	expiry *time.Timer // ends the keeping
}

// sink is one output of one client.
type sink struct {
	fan    *Fanout
	stream string
	file   *os.File

	mu       sync.Mutex
	backlog  []byte
	flushing bool
	finish   bool // close when the backlog is gone
	dead     bool
}

// ErrEnded tells that the container's output has ended.
var ErrEnded = errors.New("output has ended")

// KeepEarly keeps a stream's output for a moment, for the first client: who
// starts a program on a terminal can only attach to it afterwards, and wants
// to see it from its beginning.
func (f *Fanout) KeepEarly(stream string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.kept = stream
	f.expiry = time.AfterFunc(earlyTime, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.takeEarly(stream)
	})
}

// takeEarly gives what was kept of a stream and ends the keeping; mu is held.
func (f *Fanout) takeEarly(stream string) []byte {
	if f.kept == "" || f.kept != stream {
		return nil
	}
	f.expiry.Stop()
	text := f.early
	f.kept, f.early, f.expiry = "", nil, nil
	return text
}

// Add copies a stream to file, a non-blocking writing end, from now on. It
// owns file.
func (f *Fanout) Add(stream string, file *os.File) error {
	s := &sink{fan: f, stream: stream, file: file}
	f.mu.Lock()
	early := f.takeEarly(stream)
	if f.closed && early == nil {
		f.mu.Unlock()
		file.Close()
		return ErrEnded
	}
	if f.sinks == nil {
		f.sinks = map[*sink]struct{}{}
	}
	s.write(early) // before mu is given up, and with it what comes next
	if f.closed {
		s.end()
	} else {
		f.sinks[s] = struct{}{}
	}
	f.mu.Unlock()
	go s.watch()
	return nil
}

// Write hands text of a stream to the clients; it never waits for one.
func (f *Fanout) Write(stream string, text []byte) {
	f.mu.Lock()
	if f.kept == stream {
		f.early = append(f.early, text...)
		f.early = f.early[max(0, len(f.early)-maxEarly):]
	}
	if len(f.sinks) == 0 {
		f.mu.Unlock()
		return
	}
	var to []*sink
	for s := range f.sinks {
		if s.stream == stream {
			to = append(to, s)
		}
	}
	f.mu.Unlock()
	for _, s := range to {
		s.write(text)
	}
}

// Close ends all clients once they have got everything.
func (f *Fanout) Close() {
	f.mu.Lock()
	f.closed = true
	sinks := f.sinks
	f.sinks = nil
	f.mu.Unlock()
	for s := range sinks {
		s.end()
	}
}

func (f *Fanout) remove(s *sink) {
	f.mu.Lock()
	delete(f.sinks, s)
	f.mu.Unlock()
}

func (s *sink) write(text []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dead || s.finish {
		return
	}
	if len(s.backlog) == 0 {
		n, err := s.try(text)
		if err != nil {
			s.die()
			return
		}
		text = text[n:]
	}
	if len(text) == 0 {
		return
	}
	if len(s.backlog)+len(text) > maxBacklog {
		s.die()
		return
	}
	s.backlog = append(s.backlog, text...)
	if !s.flushing {
		s.flushing = true
		go s.flush()
	}
}

// try writes what fits without waiting.
func (s *sink) try(text []byte) (n int, err error) {
	e := control(s.file, func(fd int) error {
		for n < len(text) {
			m, err := unix.Write(fd, text[n:])
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if errors.Is(err, unix.EAGAIN) {
				return nil
			}
			if err != nil {
				return err
			}
			n += m
		}
		return nil
	})
	return n, e
}

// flush delivers the backlog as the client reads.
func (s *sink) flush() {
	rc, err := s.file.SyscallConn()
	if err == nil {
		err = rc.Write(func(uintptr) bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			n, err := s.try(s.backlog)
			if err != nil {
				s.backlog = nil
				s.die()
				return true
			}
			s.backlog = s.backlog[n:]
			if len(s.backlog) > 0 {
				return false
			}
			s.backlog, s.flushing = nil, false
			if s.finish {
				s.die()
			}
			return true
		})
	}
	if err != nil {
		s.mu.Lock()
		s.die()
		s.mu.Unlock()
	}
}

// end closes the sink after its backlog.
func (s *sink) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.finish = true
	if len(s.backlog) == 0 {
		s.die()
	}
}

// die closes the client's end; mu is held.
func (s *sink) die() {
	if s.dead {
		return
	}
	s.dead = true
	// Closing waits for flush and watch to let go of the file, and they wait
	// for mu.
	go func() {
		s.fan.remove(s)
		s.file.Close()
	}()
}

// watch notices that the client went away while nothing is written.
func (s *sink) watch() {
	rc, err := s.file.SyscallConn()
	if err != nil {
		return
	}
	_ = rc.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd)}}
		_, _ = unix.Poll(p, 0)
		return p[0].Revents&unix.POLLERR != 0
	})
	s.mu.Lock()
	s.die()
	s.mu.Unlock()
}
