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
	dir    string
	in     *os.File // nil: not wanted
	out    *os.File
	err    *os.File
	guards []*os.File // stand for the other side's ends until it has opened them
	once   sync.Once
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
		guard, err := f.open("in", os.O_RDONLY)
		if err != nil {
			return err
		}
		f.guards = append(f.guards, guard)
		if f.in, err = f.otherEnd("in"); err != nil {
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
		guard, err := f.otherEnd(o.name)
		if err != nil {
			return err
		}
		f.guards = append(f.guards, guard)
	}
	return nil
}

// otherEnd opens the writing end of a stream that has a reader.
func (f *fifos) otherEnd(name string) (*os.File, error) {
	w, err := os.OpenFile(f.path(name), os.O_WRONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open a stream: %w", err)
	}
	return w, nil
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

// opened is called when the other side has opened its ends: from now on the
// outputs end when it closes them.
func (f *fifos) opened() {
	for _, g := range f.guards {
		g.Close()
	}
	f.guards = nil
}

// feed passes the client's input on until it ends or the other side takes no
// more. containerd's shim opens its end some time after it has said that the
// process runs; a stream that is closed before that takes its content with it.
func (f *fifos) feed(ctx context.Context, from io.Reader) {
	defer f.in.Close()
	for !hasReader(f.in) {
		// There is no event for "a reader has opened".
		select {
		case <-ctx.Done():
			return
		case <-time.After(2 * time.Millisecond):
		}
	}
	_, _ = io.Copy(f.in, from) // either side may go away at any time
}

// hasReader tells whether anybody has the reading end of w open.
func hasReader(w *os.File) bool {
	raw, err := w.SyscallConn()
	if err != nil {
		return true // it is closed, as the first write will tell
	}
	there := true
	_ = raw.Control(func(fd uintptr) { // it fails for a closed file only
		p := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(p, 0)
		there = err != nil || n == 0 || p[0].Revents&unix.POLLERR == 0
	})
	return there
}

func (f *fifos) close() {
	f.once.Do(func() {
		f.opened()
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
