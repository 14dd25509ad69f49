// Package container is the host's backend for ordinary containers: it runs
// them with an OCI runtime found on the machine (crun, runc, runsc).
//
// It promises one execution of the runtime for each act and none for what the
// kernel can be asked directly (signals, process lists, metrics); that what a
// runtime refuses is reported in its own words; and that nothing that a
// container started survives its init.
//
// It knows nothing of logs, records or clients.
package container

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/proc"
	"cloister.dev/internal/osutil"
)

// Backend runs containers with OCI runtimes.
type Backend struct {
	dir    string // state folder of the host
	reaper *proc.Reaper
	log    *slog.Logger

	// mu guards runtimes only.
	mu       sync.Mutex
	runtimes map[string]*ociRuntime // by path
	holder   sync.Mutex             // serializes writing the holder programs
	moves    *osutil.CgroupMoves
}

var _ backend.Backend = (*Backend)(nil)

// New gives a backend whose files are under dir.
func New(dir string, reaper *proc.Reaper, log *slog.Logger) *Backend {
	return &Backend{dir: dir, reaper: reaper, log: log, runtimes: map[string]*ociRuntime{}, moves: osutil.NewCgroupMoves(log)}
}

// WithoutQuickMoves leaves the kernel's lock on cgroup moves as it is.
func (b *Backend) WithoutQuickMoves() *Backend {
	b.moves = nil
	return b
}

// Name is part of backend.Backend.
func (b *Backend) Name() string { return "container" }

// ociRuntime is one binary, and what was learned about it.
type ociRuntime struct {
	path string

	learn       sync.Mutex // held while hybrid is found out
	known       bool
	hideUnified bool // see hybrid.go

	sealed sealed
}

// defaultRuntimes are tried in this order when none is named.
var defaultRuntimes = [...]string{"runc", "crun"}

// runtime finds the binary.
func (b *Backend) runtime(name string) (*ociRuntime, error) {
	path, err := lookPath(name)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	r := b.runtimes[path]
	if r == nil {
		r = &ociRuntime{path: path}
		b.runtimes[path] = r
	}
	return r, nil
}

func lookPath(name string) (string, error) {
	if name != "" {
		path, err := exec.LookPath(name)
		if err != nil {
			return "", fmt.Errorf("OCI runtime %q is not on this machine (%w): install it, or name another one: %w", name, err, errdefs.ErrNotFound)
		}
		return filepath.Abs(path)
	}
	for _, n := range defaultRuntimes {
		if path, err := exec.LookPath(n); err == nil {
			return filepath.Abs(path)
		}
	}
	return "", fmt.Errorf("no OCI runtime on this machine: install crun or runc: %w", errdefs.ErrNotFound)
}

// root is the runtime's own state folder.
func (b *Backend) root(r *ociRuntime, named string) string {
	if named != "" {
		return named
	}
	return filepath.Join(b.dir, "runtime", filepath.Base(r.path))
}

// Create is part of backend.Backend.
func (b *Backend) Create(ctx context.Context, t *backend.TaskSpec, s backend.Streams, exited func(proc.Exit)) (backend.Started, error) {
	return b.launch(ctx, t, "create", s, exited)
}

// Start is part of backend.Backend.
func (b *Backend) Start(ctx context.Context, t *backend.TaskSpec, s backend.Streams, exited func(proc.Exit)) (backend.Started, error) {
	if t.RunOnStart {
		return b.launch(ctx, t, "run", s, exited)
	}
	return backend.Started{}, b.command(ctx, t, invocation{verb: "start", args: []string{t.ID}})
}

// launch makes a container's init, which runs (verb "run") or waits for Start.
func (b *Backend) launch(ctx context.Context, t *backend.TaskSpec, verb string, s backend.Streams, exited func(proc.Exit)) (st backend.Started, err error) {
	if err := MountRootfs(t); err != nil {
		return st, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.Delete(context.WithoutCancel(ctx), t))
		}
	}()
	args := []string{"--bundle", t.Bundle}
	if verb == "run" {
		args = append(args, "--detach")
	}
	if t.Runtime.NoNewKeyring {
		args = append(args, "--no-new-keyring")
	}
	if t.Runtime.NoPivotRoot {
		args = append(args, "--no-pivot")
	}
	return b.process(ctx, t, invocation{verb: verb, args: args, streams: s}, filepath.Join(t.Dir, "backend-pid"), []string{t.ID}, exited)
}

// Exec is part of backend.Backend.
func (b *Backend) Exec(ctx context.Context, t *backend.TaskSpec, id string, process []byte, s backend.Streams, exited func(proc.Exit)) (backend.Started, error) {
	file := filepath.Join(t.Dir, "backend-exec-"+id)
	if err := os.WriteFile(file, process, 0o600); err != nil {
		return backend.Started{}, fmt.Errorf("write the process of exec %s: %w", id, err)
	}
	defer os.Remove(file)
	return b.process(ctx, t, invocation{verb: "exec", args: []string{"--detach", "--process", file}, streams: s},
		file+".pid", []string{t.ID}, exited)
}

// process runs the runtime and adopts the process that it leaves behind.
func (b *Backend) process(ctx context.Context, t *backend.TaskSpec, i invocation, pidFile string, last []string, exited func(proc.Exit)) (st backend.Started, err error) {
	defer b.moves.Hold()()
	i.args = append(i.args, "--pid-file", pidFile)
	defer os.Remove(pidFile)
	var console *consoleSocket
	if i.streams.Terminal {
		if console, err = b.listenConsole(); err != nil {
			return st, err
		}
		defer console.close()
		i.args = append(i.args, "--console-socket", console.path)
	}
	i.args = append(i.args, last...)
	done := b.reaper.Birth()
	defer done()
	if err := b.command(ctx, t, i); err != nil {
		return st, err
	}
	if console != nil {
		if st.Console, err = console.receive(ctx); err != nil {
			return st, err
		}
	}
	pid, err := readPid(pidFile)
	if err != nil {
		return st, err
	}
	st.Pid = pid
	// Read before the exit can be reaped: afterwards nobody knows the place.
	st.Place, err = cgroupOf(pid)
	if err != nil || placeLost(st.Place) {
		st.Place = placeOfSpec(t)
	}
	if st.Pidfd, st.Process.Start, err = b.reaper.Adopt(pid, exited); err != nil {
		return st, fmt.Errorf("watch process %d: %w", pid, err)
	}
	return st, nil
}

func readPid(path string) (int, error) {
	s, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("read the pid from the runtime: %w", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(s)))
	if err != nil || pid <= 1 {
		return 0, fmt.Errorf("the runtime wrote %q as the container's pid: %w", s, errdefs.ErrInternal)
	}
	return pid, nil
}

// Watch is part of backend.Backend.
func (b *Backend) Watch(_ *backend.TaskSpec, p backend.Process, held *os.File, exited func(proc.Exit)) *os.File {
	return b.reaper.Resume(p.Pid, p.Start, held, exited)
}

// Delete is part of backend.Backend. The runtime's own folder for the container
// tells whether there is anything to delete at all. A caller that goes away
// does not cut the runtime off: half deleted, it would not know the container.
func (b *Backend) Delete(ctx context.Context, t *backend.TaskSpec) error {
	ctx = context.WithoutCancel(ctx)
	r, err := b.runtime(t.Runtime.Binary)
	if err != nil {
		return errors.Join(UnmountRootfs(t), ignoreNotFound(err))
	}
	state := filepath.Join(b.root(r, t.Runtime.Root), t.ID)
	if _, serr := os.Stat(state); serr == nil {
		// With --force runc sleeps for 100 ms before it looks whether anything
		// is left to kill; an ended container needs none of that.
		if err = b.command(ctx, t, invocation{verb: "delete", args: []string{t.ID}}); err != nil {
			err = b.command(ctx, t, invocation{verb: "delete", args: []string{"--force", t.ID}})
		}
		if err != nil {
			err = forget(ctx, t, state, err)
		}
	} else {
		// Nothing was there to delete, or the runtime died before it noted it.
		err = sweep(ctx, placeOfSpec(t))
	}
	return errors.Join(err, UnmountRootfs(t))
}

// forget removes a container that its runtime cannot delete because its state
// is not whole: the runtime died while it wrote or removed it.
func forget(ctx context.Context, t *backend.TaskSpec, state string, cause error) error {
	switch _, err := os.Stat(state); {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return errors.Join(cause, err)
	case readable(state):
		return cause
	}
	if err := sweep(ctx, placeOfSpec(t)); err != nil {
		return errors.Join(cause, err)
	}
	return os.RemoveAll(state)
}

// readable tells whether the files are there in which runc, or crun, keeps what
// it knows of a container.
func readable(state string) bool {
	for _, files := range [][]string{{"state.json"}, {"status", "config.json"}} {
		whole := true
		for _, f := range files {
			_, err := os.Stat(filepath.Join(state, f))
			whole = whole && err == nil
		}
		if whole {
			return true
		}
	}
	return false
}

func ignoreNotFound(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// Pause is part of backend.Backend.
func (b *Backend) Pause(ctx context.Context, t *backend.TaskSpec) error {
	return b.command(ctx, t, invocation{verb: "pause", args: []string{t.ID}})
}

// Resume is part of backend.Backend.
func (b *Backend) Resume(ctx context.Context, t *backend.TaskSpec) error {
	return b.command(ctx, t, invocation{verb: "resume", args: []string{t.ID}})
}

// Update is part of backend.Backend.
func (b *Backend) Update(ctx context.Context, t *backend.TaskSpec, resources []byte) error {
	f, err := os.CreateTemp(t.Dir, "backend-update-")
	if err != nil {
		return fmt.Errorf("write the resources: %w", err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(resources)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write the resources: %w", err)
	}
	return b.command(ctx, t, invocation{verb: "update", args: []string{"--resources", f.Name(), t.ID}})
}

// Signal is part of backend.Backend.
func (b *Backend) Signal(ctx context.Context, t *backend.TaskSpec, p backend.Process, signal int, all bool) error {
	if signal <= 0 || signal > 64 {
		return fmt.Errorf("signal %d does not exist: %w", signal, errdefs.ErrInvalidArgument)
	}
	if all {
		return b.signalAll(ctx, p, unix.Signal(signal))
	}
	err := proc.Signal(p.Pid, p.Start, unix.Signal(signal))
	if errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("process %d of task %s: %w", p.Pid, t.ID, errdefs.ErrNotFound)
	}
	if err == nil && signal == int(unix.SIGKILL) {
		thaw(p.Place) // cgroup v1 keeps even a killed process frozen
	}
	return err
}
