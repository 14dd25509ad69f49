package pod

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// fifos are the daemon's ends of the streams of an exec or an attach; the
// process, or the shim, opens the other ends by path.
type fifos struct {
	dir     string
	in      *os.File // nil: not wanted
	out     *os.File
	err     *os.File
	writers []*os.File // keep the outputs from ending before the other side opened them
	once    sync.Once
}

func newFifos(dir string, in, out, errs bool) (*fifos, error) {
	// Not the bundle around them: it may just have been removed.
	for _, d := range []string{filepath.Dir(dir), dir} {
		if err := os.Mkdir(d, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("make the folder of the streams: %w", err)
		}
	}
	f := &fifos{dir: dir}
	if err := f.make(in, out, errs); err != nil {
		f.close()
		return nil, err
	}
	return f, nil
}

func (f *fifos) make(in, out, errs bool) (err error) {
	if in {
		// Read-write, so that opening does not wait for the reader.
		if f.in, err = f.open("in", os.O_RDWR); err != nil {
			return err
		}
	}
	for _, o := range []struct {
		want bool
		name string
		end  **os.File
	}{{out, "out", &f.out}, {errs, "err", &f.err}} {
		if !o.want {
			continue
		}
		if *o.end, err = f.open(o.name, os.O_RDONLY); err != nil {
			return err
		}
		w, err := os.OpenFile(f.path(o.name), os.O_WRONLY|syscall.O_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("open a stream: %w", err)
		}
		f.writers = append(f.writers, w)
	}
	return nil
}

func (f *fifos) open(name string, mode int) (*os.File, error) {
	if err := syscall.Mkfifo(f.path(name), 0o600); err != nil {
		return nil, fmt.Errorf("make a stream: %w", err)
	}
	file, err := os.OpenFile(f.path(name), mode|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open a stream: %w", err)
	}
	return file, nil
}

func (f *fifos) path(name string) string { return filepath.Join(f.dir, name) }

// paths are what the other side is told; empty for streams not wanted.
func (f *fifos) paths() (in, out, errs string) {
	if f.in != nil {
		in = f.path("in")
	}
	if f.out != nil {
		out = f.path("out")
	}
	if f.err != nil {
		errs = f.path("err")
	}
	return in, out, errs
}

// opened is called when the other side has opened its ends, or is about to:
// from now on the outputs end when it closes them, and the input can be written
// as long as somebody reads it.
func (f *fifos) opened() error {
	f.closeWriters()
	if f.in == nil {
		return nil
	}
	w, err := os.OpenFile(f.path("in"), os.O_WRONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("open a stream: %w", err)
	}
	f.in.Close()
	f.in = w
	return nil
}

func (f *fifos) closeWriters() {
	for _, w := range f.writers {
		w.Close()
	}
	f.writers = nil
}

// readerPause is the time between two looks for a reader.
const readerPause = 2 * time.Millisecond

// send passes the input on and ends it; either side may go away at any time. It
// waits for a reader before: some shims open their end after they have answered,
// and what was written and closed by then would be lost, with its end.
func (f *fifos) send(ctx context.Context, from io.Reader) {
	defer f.in.Close()
	for !isRead(f.in) {
		select {
		case <-ctx.Done():
			return
		case <-time.After(readerPause): // there is no event for "a reader has opened"
		}
	}
	_, _ = io.Copy(f.in, from)
}

// isRead tells whether somebody has the other end of a pipe open.
func isRead(w *os.File) bool {
	rc, err := w.SyscallConn()
	if err != nil {
		return true // and writing fails
	}
	p := []unix.PollFd{{}}
	err = rc.Control(func(fd uintptr) {
		p[0].Fd = int32(fd)
		_, _ = unix.Poll(p, 0)
	})
	return err != nil || p[0].Revents&unix.POLLERR == 0
}

func (f *fifos) close() {
	f.once.Do(func() {
		f.closeWriters()
		for _, file := range []*os.File{f.in, f.out, f.err} {
			if file != nil {
				file.Close()
			}
		}
		os.RemoveAll(f.dir)
	})
}

// copyOut passes the outputs on until they end or ctx does; a client that
// takes no more ends it too.
func (f *fifos) copyOut(ctx context.Context, out, errs io.Writer) error {
	stop := context.AfterFunc(ctx, f.close)
	defer stop()
	var wg sync.WaitGroup
	var problems [2]error
	for i, c := range []struct {
		from *os.File
		to   io.Writer
	}{{f.out, out}, {f.err, errs}} {
		if c.from == nil {
			continue
		}
		wg.Go(func() {
			_, err := io.Copy(c.to, c.from)
			if err != nil && !errors.Is(err, os.ErrClosed) {
				problems[i] = err
				f.close()
			}
		})
	}
	wg.Wait()
	return errors.Join(problems[0], problems[1], ctx.Err())
}

// limited keeps the first bytes while there is room, which it shares with
// others, and drops the rest.
type limited struct {
	data []byte
	room *atomic.Int64
}

func (l *limited) Write(p []byte) (int, error) {
	missing := max(0, -l.room.Add(-int64(len(p))))
	keep := max(0, int64(len(p))-missing)
	l.data = append(l.data, p[:keep]...)
	return len(p), nil
}
