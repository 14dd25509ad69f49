package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	guestv1 "cloister.dev/api/guest/v1"
	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/osutil"
)

// relay carries a process's streams between its pipes, or its terminal, and
// the machine's ports.
type relay struct {
	log     *slog.Logger
	outputs []*output
	files   []*os.File // what close has to close
	wg      sync.WaitGroup
}

// output carries one stream to a port.
type output struct {
	from, port *os.File
	done       chan struct{}

	mu       sync.Mutex
	flushers []chan struct{}
}

// prepare opens the ports and makes the pipes; child are the ends for the
// process, which the caller closes.
func (a *Agent) prepare(ctx context.Context, s *guestv1.Streams) (r *relay, child backend.Streams, err error) {
	r = &relay{log: a.log}
	defer func() {
		if err != nil {
			child.Close()
			r.close()
		}
	}()
	if s.GetTerminal() != "" {
		child.Terminal = true
		return r, child, nil
	}
	if child.Stdout, err = r.addOutput(ctx, a.ports, s.GetStdout()); err != nil {
		return r, child, err
	}
	if child.Stderr, err = r.addOutput(ctx, a.ports, s.GetStderr()); err != nil {
		return r, child, err
	}
	child.Stdin, err = r.addInput(ctx, a.ports, s.GetStdin())
	return r, child, err
}

// pipeSize is that of an output: what a container writes at once should not
// have to be carried in many portions.
const pipeSize = 1 << 20

func (r *relay) addOutput(ctx context.Context, p *ports, name string) (child *os.File, err error) {
	if name == "" {
		return nil, nil
	}
	port, err := p.open(ctx, name)
	if err != nil {
		return nil, err
	}
	r.files = append(r.files, port)
	read, write, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	if rc, err := read.SyscallConn(); err == nil {
		_ = rc.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeSize) })
	}
	r.carry(read, port)
	return write, nil
}

// carry begins to copy output; it owns from, close closes port.
func (r *relay) carry(from, port *os.File) {
	o := &output{from: from, port: port, done: make(chan struct{})}
	r.outputs = append(r.outputs, o)
	r.wg.Go(o.run)
}

func (r *relay) addInput(ctx context.Context, p *ports, name string) (child *os.File, err error) {
	if name == "" {
		return nil, nil
	}
	port, err := p.open(ctx, name)
	if err != nil {
		return nil, err
	}
	r.files = append(r.files, port)
	read, write, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	r.feed(write, port)
	return read, nil
}

// feed copies input until the host ends it or the process reads no more; it
// owns to.
func (r *relay) feed(to, port *os.File) {
	r.wg.Go(func() {
		defer to.Close()
		buf := make([]byte, 16<<10)
		for {
			n, err := port.Read(buf)
			if n > 0 {
				if _, werr := to.Write(buf[:n]); werr != nil {
					return
				}
			}
			if err != nil {
				return
			}
		}
	})
}

// terminal connects a process's terminal.
func (r *relay) terminal(ctx context.Context, p *ports, name string, console *os.File) error {
	port, err := p.open(ctx, name)
	if err != nil {
		return fmt.Errorf("connect the terminal: %w", err)
	}
	r.files = append(r.files, port)
	in, err := osutil.Dup(console)
	if err != nil {
		return err
	}
	r.feed(in, port)
	out, err := osutil.Dup(console)
	if err != nil {
		return err
	}
	r.carry(out, port)
	return nil
}

// flush waits until what was written before has been taken by the host.
func (r *relay) flush(ctx context.Context) {
	for _, o := range r.outputs {
		o.flush(ctx)
	}
}

// close ends the relay; processes that still write get EPIPE.
func (r *relay) close() {
	for _, o := range r.outputs {
		o.from.Close()
	}
	for _, f := range r.files {
		f.Close()
	}
	r.wg.Wait()
}

const (
	// portion is what one write to a port takes at most.
	portion = 32 << 10
	// burst is what is read at once from who writes much. With less, writer
	// and agent would take turns on the processor at each portion, and on an
	// emulated one a turn costs as much as carrying it.
	burst = 16 * portion
)

// fitting gives the buffer for the next read after one of n bytes.
func fitting(buf []byte, n int) []byte {
	switch {
	case n == len(buf) && n < burst:
		return make([]byte, burst)
	case n < portion && len(buf) > portion:
		return make([]byte, portion)
	}
	return buf
}

func (o *output) run() {
	defer close(o.done)
	defer o.from.Close()
	buf := make([]byte, portion)
	for {
		n, err := o.from.Read(buf)
		if n > 0 {
			if _, werr := o.port.Write(buf[:n]); werr != nil {
				return
			}
		}
		buf = fitting(buf, n)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if !o.wokenUp(buf) {
				return
			}
		case err != nil:
			o.settled()
			return
		}
	}
}

// wokenUp serves flush: it carries what is there now and waits until the host
// has it.
func (o *output) wokenUp(buf []byte) (alive bool) {
	if err := o.from.SetReadDeadline(time.Time{}); err != nil {
		return false
	}
	o.mu.Lock()
	flushers := o.flushers
	o.flushers = nil
	o.mu.Unlock()
	defer func() {
		for _, c := range flushers {
			close(c)
		}
	}()
	rc, err := o.from.SyscallConn()
	if err != nil {
		return false
	}
	for {
		n := 0
		var rerr error
		if err := rc.Control(func(fd uintptr) { n, rerr = unix.Read(int(fd), buf) }); err != nil {
			return false
		}
		if errors.Is(rerr, unix.EINTR) {
			continue
		}
		if n <= 0 {
			o.settled()
			return errors.Is(rerr, unix.EAGAIN)
		}
		if _, err := o.port.Write(buf[:n]); err != nil {
			return false
		}
	}
}

// settled waits until the host has taken the last write.
func (o *output) settled() {
	rc, err := o.port.SyscallConn()
	if err != nil {
		return
	}
	_ = rc.Write(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		_, _ = unix.Poll(p, 0)
		return p[0].Revents != 0
	})
}

func (o *output) flush(ctx context.Context) {
	c := make(chan struct{})
	o.mu.Lock()
	o.flushers = append(o.flushers, c)
	o.mu.Unlock()
	_ = o.from.SetReadDeadline(time.Unix(1, 0))
	select {
	case <-c:
	case <-o.done:
	case <-ctx.Done():
	}
}
