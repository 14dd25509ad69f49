package stdio

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Stream carries the output of one stream of a container into its log and to
// its clients, in one goroutine that sleeps in the poller.
type Stream struct {
	Name    string   // "stdout" or "stderr"
	Pipe    *os.File // reading end, non-blocking
	TTY     *os.File // where Pipe is filled from, or nil
	Log     *Log     // nil: output is thrown away after the clients got it
	Out     *Fanout
	Buffers *Buffers
	Slog    *slog.Logger

	seen    int       // bytes at the pipe's head that clients have got already
	failing time.Time // since when the log cannot be written
	retryAt time.Time // when to try it again once output is thrown away
	backoff time.Duration
	// patience is how long the stream waits on an unfinished line before it
	// looks again; what comes makes it short.
	patience time.Duration
	stopped  chan struct{}
	nudged   chan struct{} // cuts a wait for the log short
	serving  []chan error  // flushers whose text is being carried

	mu       sync.Mutex
	stopping bool
	flushers []chan error
	wanted   ending // by the flushers
	done     chan struct{}
}

type outcome int

const (
	idle outcome = iota
	progress
	ended
)

const (
	// logPatience is how long an unwritable log may hold a container up.
	logPatience = 3 * time.Second
	// flushPatience is how long it may keep a container's end from being told.
	flushPatience = time.Second
	retryTime     = time.Second
	minBackoff    = 50 * time.Millisecond
	maxBackoff    = 2 * time.Second
	// minLook and maxLook bound the time between two looks at an unfinished line.
	minLook = 50 * time.Microsecond
	maxLook = time.Second
)

// Start begins to carry. The stream ends when everybody closed the writing
// end, or with Stop.
func (s *Stream) Start() {
	s.done = make(chan struct{})
	s.stopped = make(chan struct{})
	s.nudged = make(chan struct{}, 1)
	if s.Log != nil && (s.Log.maxLine <= 0 || s.Log.maxLine > smallPipe/4) {
		// Slots of a pipe can be half empty, and a whole line must fit.
		_ = control(s.Pipe, func(fd int) error {
			_, err := unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, bigPipe)
			return err
		})
	}
	go s.run()
}

// Done is closed when the stream has ended and all of it is in the log.
func (s *Stream) Done() <-chan struct{} { return s.done }

// Flush waits until all that an ended container wrote is in the log. An
// unfinished line is written too, although a process that is just being forked
// may hold the pipe open and no hang-up be seen yet. It fails when the log
// cannot be written for a while; writing is tried on.
func (s *Stream) Flush(ctx context.Context) error { return s.flush(ctx, last) }

func (s *Stream) flush(ctx context.Context, end ending) error {
	c := make(chan error, 1)
	s.mu.Lock()
	s.wanted = max(s.wanted, end)
	s.flushers = append(s.flushers, c)
	s.mu.Unlock()
	select {
	case s.nudged <- struct{}{}:
	default:
	}
	s.wake()
	select {
	case err := <-c:
		return err
	case <-s.done:
	case <-ctx.Done():
		return fmt.Errorf("write the last of %s: %w", s.Name, ctx.Err())
	}
	return nil
}

// Stop carries what is in the pipe now and ends the stream. It closes the
// files.
func (s *Stream) Stop() {
	s.mu.Lock()
	if !s.stopping {
		s.stopping = true
		close(s.stopped)
	}
	s.mu.Unlock()
	s.wake()
	<-s.done
}

func (s *Stream) source() *os.File {
	if s.TTY != nil {
		return s.TTY
	}
	return s.Pipe
}

func (s *Stream) wake() { _ = s.source().SetReadDeadline(time.Unix(1, 0)) }

func (s *Stream) run() {
	defer close(s.done)
	defer s.Pipe.Close()
	rc, err := s.source().SyscallConn()
	for err == nil {
		var o outcome
		err = rc.Read(func(fd uintptr) bool {
			o = s.carry(int(fd), more)
			if o == idle && s.TTY == nil && s.seen > 0 {
				s.lookAgain()
			}
			return o != idle
		})
		if errors.Is(err, os.ErrDeadlineExceeded) {
			if o, err = s.wokenUp(rc); err != nil {
				break
			}
		}
		if o == ended {
			return
		}
	}
	if err != nil && !errors.Is(err, os.ErrClosed) {
		s.Slog.Error("stream ended early", "stream", s.Name, "err", err)
	}
}

// lookAgain makes the stream look at its pipe after a while although nobody
// wakes it. An unfinished line stays in the pipe, and to a pipe that is not
// empty the kernel does not wake a reader before a write is through: one write
// that is larger than the pipe would wait for us and we for it.
func (s *Stream) lookAgain() {
	s.patience = min(max(2*s.patience, minLook), maxLook)
	_ = s.source().SetReadDeadline(time.Now().Add(s.patience)) // fails on a closed file, and so does the read
	s.mu.Lock()
	called := s.stopping || len(s.flushers) > 0
	s.mu.Unlock()
	if called { // before the line above, which took the call's place
		s.wake()
	}
}

// wokenUp serves Flush and Stop: their callers want all that is in the pipe
// at this moment to be carried.
func (s *Stream) wokenUp(rc syscall.RawConn) (outcome, error) {
	if err := s.source().SetReadDeadline(time.Time{}); err != nil {
		return idle, err
	}
	s.mu.Lock()
	s.serving = append(s.serving, s.flushers...)
	stopping, end := s.stopping, s.wanted
	s.flushers, s.wanted = nil, more
	s.mu.Unlock()
	if stopping {
		end = last
	}
	o := idle
	if err := rc.Control(func(fd uintptr) { o = s.carry(int(fd), end) }); err != nil {
		return idle, err
	}
	s.served(nil)
	if stopping {
		return ended, nil
	}
	return o, nil
}

// served tells those who wait for a flush how it went.
func (s *Stream) served(err error) {
	for _, c := range s.serving {
		c <- err
	}
	s.serving = nil
}

// carry works until nothing is left to do now.
func (s *Stream) carry(src int, end ending) outcome {
	if s.TTY == nil {
		return s.carryPipe(src, end)
	}
	over := false
	for {
		o := idle
		_ = control(s.Pipe, func(fd int) error {
			if over {
				end = last
			}
			o = s.carryPipe(fd, end)
			return nil
		})
		if over || o == ended {
			return ended
		}
		n, err := s.fill(src)
		if n > 0 {
			continue
		}
		if errors.Is(err, unix.EAGAIN) {
			return idle
		}
		over = true // EIO: the last process closed the terminal
	}
}

// fill moves output of the terminal into the pipe.
func (s *Stream) fill(tty int) (n int64, err error) {
	e := control(s.Pipe, func(pipe int) error {
		for {
			n, err = unix.Splice(tty, nil, pipe, nil, smallPipe, unix.SPLICE_F_NONBLOCK)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if errors.Is(err, unix.EINVAL) { // before Linux 5.11
				n, err = copyOnce(tty, pipe)
			}
			return nil
		}
	})
	return n, errors.Join(err, e)
}

func copyOnce(from, to int) (int64, error) {
	var buf [4096]byte
	n, err := unix.Read(from, buf[:])
	if err != nil || n <= 0 {
		return 0, err
	}
	n, err = unix.Write(to, buf[:n])
	return int64(n), err
}

func (s *Stream) carryPipe(pipe int, end ending) outcome {
	for {
		o := s.step(pipe, end)
		if o != progress {
			return o
		}
	}
}

// step moves one portion, as the package comment describes.
func (s *Stream) step(pipe int, end ending) outcome {
	size := smallPipe
	if n, err := unix.FcntlInt(uintptr(pipe), unix.F_GETPIPE_SZ, 0); err == nil {
		size = n
	}
	b, err := s.Buffers.get(size)
	if err != nil {
		s.Slog.Error("output waits", "stream", s.Name, "err", err)
		s.sleep(maxBackoff)
		return progress
	}
	text, full, err := b.tee(pipe)
	switch {
	case errors.Is(err, unix.EAGAIN):
		s.Buffers.put(b)
		return idle
	case err != nil:
		b.close()
		s.Slog.Error("output cannot be read", "stream", s.Name, "err", err)
		return ended
	case len(text) == 0:
		s.Buffers.put(b)
		return ended
	}
	fresh := len(text) > s.seen
	if fresh {
		s.Out.Write(s.Name, text[s.seen:])
		s.seen = len(text)
		s.patience = 0
	}
	if full {
		end = forced // whatever the end, there may be more behind this
	}
	if !fresh && end == more && hungUp(pipe) {
		// Look again: something may have come just before the hang-up, and
		// nothing can come after it.
		s.Buffers.put(b)
		return s.step(pipe, last)
	}
	used, err := s.write(b, text, pipe, end)
	s.Buffers.put(b)
	if err != nil {
		s.hold(err)
		return progress
	}
	s.seen -= used
	if used > 0 || fresh {
		return progress
	}
	return idle
}

// write puts text into the log and takes what it wrote out of the pipe.
func (s *Stream) write(b *scratch, text []byte, pipe int, end ending) (used int, err error) {
	if s.Log == nil {
		var witness [1]byte
		drain(pipe, text[:len(text)-1], witness[:])
		return len(text), nil
	}
	now := time.Now()
	hopeless := !s.failing.IsZero() && now.Sub(s.failing) > logPatience
	if hopeless && now.Before(s.retryAt) {
		s.Log.discard(s.Name, text, pipe)
		return len(text), nil
	}
	out := b.out[:0]
	lost := s.Log.takeLost(s.Name)
	if lost > 0 {
		out, _ = Format(out, fmt.Appendf(nil, "cloister-shim: %d bytes of output are missing here: the log could not be written\n", lost), s.Name, now, 0, last)
	}
	out, used = Format(out, text, s.Name, now, s.Log.maxLine, end)
	if used > 0 {
		err = s.Log.move(out, text[:used], pipe)
	}
	if lost > 0 && (used == 0 || err != nil) {
		s.Log.addLost(s.Name, lost)
	}
	if err != nil && hopeless {
		s.retryAt = now.Add(retryTime)
		s.Log.discard(s.Name, text, pipe)
		return len(text), nil
	}
	if err != nil {
		return 0, err
	}
	if used > 0 && !s.failing.IsZero() {
		s.Slog.Info("log is written again", "stream", s.Name, "lost", lost)
		s.failing, s.backoff = time.Time{}, 0
	}
	return used, nil
}

// hold waits because the log could not be written.
func (s *Stream) hold(err error) {
	if s.failing.IsZero() {
		s.failing = time.Now()
		s.Slog.Error("log cannot be written, output waits", "stream", s.Name, "path", s.Log.path, "err", err)
	}
	if time.Since(s.failing) >= flushPatience {
		s.mu.Lock()
		s.serving, s.flushers = append(s.serving, s.flushers...), nil
		s.mu.Unlock()
		s.served(fmt.Errorf("write the last of %s: %w", s.Name, err))
	}
	s.backoff = min(max(2*s.backoff, minBackoff), maxBackoff)
	if !s.sleep(s.backoff) { // told to stop: nobody may wait for a full disk
		s.failing = time.Now().Add(-2 * logPatience)
	}
}

func (s *Stream) sleep(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-s.nudged:
		return true
	case <-s.stopped:
		return false
	}
}

func hungUp(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd)}}
	_, _ = unix.Poll(p, 0)
	return p[0].Revents&unix.POLLHUP != 0
}

// control runs f on a file's descriptor without taking it out of the poller.
func control(file *os.File, f func(fd int) error) error {
	rc, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var e error
	if err := rc.Control(func(fd uintptr) { e = f(int(fd)) }); err != nil {
		return err
	}
	return e
}
