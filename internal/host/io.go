package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/keeper"
	"cloister.dev/internal/host/stdio"
	"cloister.dev/internal/osutil"
)

// ioSpec says what the streams of a task are. It is on disk.
type ioSpec struct {
	Client      *clientIO `json:"client,omitempty"` // the client's own FIFOs instead of all below
	LogPath     string    `json:"log,omitempty"`
	MaxLine     int64     `json:"maxLine,omitempty"`
	Stdin       bool      `json:"stdin,omitempty"`
	StdinOnce   bool      `json:"stdinOnce,omitempty"`
	StdinClosed bool      `json:"stdinClosed,omitempty"`
	Terminal    bool      `json:"terminal,omitempty"`
	UID         uint32    `json:"uid,omitempty"`
	GID         uint32    `json:"gid,omitempty"`
	// External says that another shim runs the task: FIFOs stay open until
	// the client says that they are done.
	External bool `json:"external,omitempty"`
}

// taskIO is the streams of one task: FIFOs in its folder, the log, clients.
type taskIO struct {
	ioSpec
	dir   string
	name  string // prefix of the names at the keeper
	store *keeper.Store
	bufs  *stdio.Buffers
	slog  *slog.Logger
	// stdinClosed is called once stdin was closed for good.
	stdinClosed func()

	fan stdio.Fanout

	mu      sync.Mutex
	log     *stdio.Log
	streams []*stdio.Stream
	pipes   map[string]*os.File // reading ends that no stream has taken yet
	stdin   *stdio.Stdin
	tty     *os.File
}

func (t *taskIO) fifo(stream string) string { return filepath.Join(t.dir, stream) }

// outputs are the streams that have a pipe of their own.
func (t *taskIO) outputs() []string {
	if t.Terminal {
		return []string{"stdout"}
	}
	return []string{"stdout", "stderr"}
}

// open makes or takes up the FIFOs, the log and stdin. held are files that
// the keeper gave back; open takes those it needs.
func (t *taskIO) open(held map[string]*os.File) (err error) {
	t.pipes = map[string]*os.File{}
	defer func() {
		if err != nil {
			t.close()
		}
	}()
	if t.LogPath != "" {
		if err := t.openLog(held != nil); err != nil {
			return err
		}
	}
	if t.Terminal && !t.External {
		return nil // the pipe comes with the terminal
	}
	flags := unix.O_RDONLY
	if t.External {
		flags = unix.O_RDWR
	}
	for _, s := range t.outputs() {
		if t.pipes[s], err = t.openFIFO(s, flags, held); err != nil {
			return err
		}
	}
	if t.Stdin && !t.StdinClosed {
		return t.openStdin(held)
	}
	return nil
}

// openLog opens the log. One that an earlier life wrote may be out of reach for
// a while, like any log: that is no reason to leave the container alone.
func (t *taskIO) openLog(takeUp bool) (err error) {
	open := stdio.OpenLog
	if takeUp {
		open = stdio.TakeUpLog
	}
	t.log, err = open(t.LogPath, filepath.Join(t.dir, "mark"), int(t.MaxLine))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return err
}

func (t *taskIO) openFIFO(stream string, flags int, held map[string]*os.File) (*os.File, error) {
	if f := take(held, t.name+stream); f != nil {
		return f, nil
	}
	if err := stdio.MakeFIFO(t.fifo(stream)); err != nil {
		return nil, err
	}
	f, err := stdio.OpenFIFO(t.fifo(stream), flags|unix.O_NONBLOCK)
	if err != nil {
		return nil, err
	}
	t.store.Put(t.name+stream, f)
	return f, nil
}

func (t *taskIO) openStdin(held map[string]*os.File) error {
	// Opened for both: there may be no reader yet, and the input must not end
	// when a reader goes.
	f, err := t.openFIFO("stdin", unix.O_RDWR, held)
	if err != nil {
		return err
	}
	t.stdin = stdio.NewStdin(f, t.StdinOnce, func() {
		t.store.Drop(t.name + "stdin")
		t.stdinClosed()
	})
	return nil
}

func take(held map[string]*os.File, name string) *os.File {
	f := held[name]
	delete(held, name)
	return f
}

// childStreams opens the ends for the container. Outputs are opened for
// reading too, so that the container never meets EPIPE while nobody reads.
func (t *taskIO) childStreams() (s backend.Streams, err error) {
	if t.Terminal {
		return backend.Streams{Terminal: true}, nil
	}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.Stdout, err = t.childEnd("stdout", unix.O_RDWR); err != nil {
		return s, err
	}
	if s.Stderr, err = t.childEnd("stderr", unix.O_RDWR); err != nil {
		return s, err
	}
	if t.Stdin {
		flags := unix.O_RDWR
		if t.StdinOnce { // it must be able to end
			flags = unix.O_RDONLY | unix.O_NONBLOCK
		}
		s.Stdin, err = t.childEnd("stdin", flags)
	}
	return s, err
}

func (t *taskIO) childEnd(stream string, flags int) (*os.File, error) {
	f, err := stdio.OpenFIFO(t.fifo(stream), flags)
	if err != nil {
		return nil, err
	}
	if flags&unix.O_NONBLOCK != 0 {
		err = stdio.ForChild(f)
	}
	if err == nil && (t.UID != 0 || t.GID != 0) {
		err = f.Chown(int(t.UID), int(t.GID))
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("prepare %s for the container: %w", stream, err)
	}
	return f, nil
}

// discard throws away what a container that did not start left in its pipes.
func (t *taskIO) discard() {
	t.mu.Lock()
	defer t.mu.Unlock()
	buf := make([]byte, 4096)
	for _, f := range t.pipes {
		rc, err := f.SyscallConn()
		if err != nil {
			continue
		}
		_ = rc.Control(func(fd uintptr) {
			for {
				if n, err := unix.Read(int(fd), buf); n <= 0 || err != nil {
					return
				}
			}
		})
	}
}

// run begins to carry output; console is the task's terminal or nil.
func (t *taskIO) run(console *os.File, held map[string]*os.File) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.pipes == nil {
		return errors.New("the streams could not be opened")
	}
	if t.Terminal && held == nil { // it was just started
		t.fan.KeepEarly("stdout")
	}
	if t.Terminal && !t.External {
		if console == nil {
			return errors.New("the runtime gave no terminal")
		}
		t.tty = console
		t.store.Put(t.name+"tty", console)
		pipe := take(held, t.name+"pending")
		if pipe == nil {
			var err error
			if pipe, err = stdio.NewPipe(); err != nil {
				return err
			}
			t.store.Put(t.name+"pending", pipe)
		}
		t.pipes["stdout"] = pipe
		if t.Stdin {
			t.stdin = stdio.NewStdin(console, false, nil)
		}
	}
	for _, name := range t.outputs() {
		s := &stdio.Stream{Name: name, Pipe: t.pipes[name], TTY: t.tty, Log: t.log, Out: &t.fan, Buffers: t.bufs, Slog: t.slog}
		delete(t.pipes, name)
		s.Start()
		t.streams = append(t.streams, s)
	}
	return nil
}

// flush waits until all that the ended container wrote is in the log.
func (t *taskIO) flush(ctx context.Context) error {
	t.mu.Lock()
	streams := t.streams
	t.mu.Unlock()
	var errs []error
	for _, s := range streams {
		errs = append(errs, s.Flush(ctx))
	}
	return errors.Join(errs...)
}

// close ends everything after the last output was carried.
func (t *taskIO) close() {
	t.mu.Lock()
	streams, pipes, stdin, tty, log := t.streams, t.pipes, t.stdin, t.tty, t.log
	t.streams, t.pipes, t.stdin, t.tty, t.log = nil, nil, nil, nil, nil
	t.mu.Unlock()
	for _, s := range streams {
		s.Stop()
	}
	t.fan.Close()
	for _, p := range pipes {
		if p != nil {
			p.Close()
		}
	}
	if stdin != nil {
		stdin.Close()
	}
	if tty != nil {
		tty.Close()
	}
	if log != nil {
		if err := log.Close(); err != nil {
			t.slog.Warn("log not closed cleanly", "path", t.LogPath, "err", err)
		}
	}
	t.store.Clear(t.name)
}

func (t *taskIO) reopenLog() error {
	t.mu.Lock()
	log := t.log
	t.mu.Unlock()
	if log == nil {
		return fmt.Errorf("the task has no log: %w", errdefs.ErrFailedPrecondition)
	}
	return log.Reopen()
}

func (t *taskIO) closeStdin() {
	t.mu.Lock()
	stdin := t.stdin
	t.mu.Unlock()
	if stdin != nil && t.StdinOnce && !t.Terminal {
		stdin.Close()
	}
}

// attach adds a client with its FIFOs.
func (t *taskIO) attach(ctx context.Context, c clientIO) error {
	t.mu.Lock()
	stdin := t.stdin
	t.mu.Unlock()
	outputs := map[string]string{"stdout": c.Stdout, "stderr": c.Stderr}
	var opened []*os.File
	files := map[string]*os.File{}
	for _, name := range []string{"stdout", "stderr"} {
		if outputs[name] == "" {
			continue
		}
		f, err := stdio.OpenClientOutput(ctx, outputs[name])
		if err != nil {
			for _, o := range opened {
				o.Close()
			}
			return fmt.Errorf("attach %s: %w", name, err)
		}
		files[name] = f
		opened = append(opened, f)
	}
	if c.Stdin != "" && stdin != nil {
		f, err := stdio.OpenClientInput(c.Stdin)
		if err != nil {
			for _, o := range opened {
				o.Close()
			}
			return fmt.Errorf("attach stdin: %w", err)
		}
		stdin.Add(f)
	}
	for name, f := range files {
		if err := t.fan.Add(name, f); err != nil {
			// Everything was said: the client sees its FIFOs end.
			t.slog.Debug("attached after the end", "stream", name)
		}
	}
	return nil
}

func (t *taskIO) resize(width, height uint32) error {
	t.mu.Lock()
	tty := t.tty
	t.mu.Unlock()
	return resize(tty, width, height)
}

// resize sets the size of a terminal.
func resize(tty *os.File, width, height uint32) error {
	if tty == nil {
		return fmt.Errorf("the process has no terminal: %w", errdefs.ErrFailedPrecondition)
	}
	if err := osutil.SetWindow(tty, width, height); err != nil {
		return fmt.Errorf("resize the terminal: %w", err)
	}
	return nil
}
