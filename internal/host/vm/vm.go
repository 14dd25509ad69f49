// Package vm is the host's backend for pods that have a kernel of their own: a
// sandbox is a virtual machine, and its tasks run in it, where the agent (package
// guest) runs them with the container backend.
//
// It promises that a machine outlives this process and is found again by its
// record; that the end of a machine is the end of its tasks, with its reason;
// that nothing the guest sends is believed beyond what it can be; and that a
// stopped sandbox leaves no process, mount, device or cgroup.
//
// It knows nothing of logs, records of tasks or clients. What it shares with
// the guest are files (share), packets (link) and streams (channel).
//
// Lock order: Backend.mu, sandbox.op, sandbox.mu. Neither mu is held while
// anything is waited for; op is, and serializes making and taking down.
package vm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/singleflight"

	"cloister.dev/internal/host"
	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/proc"
)

// Backend runs tasks in virtual machines.
type Backend struct {
	dir    string // state folder of the host
	reaper *proc.Reaper
	log    *slog.Logger

	ctx     context.Context // ends with Close
	cancel  context.CancelFunc
	workers sync.WaitGroup

	images singleflight.Group // of layers that are being made

	mu        sync.Mutex
	sandboxes map[string]*sandbox
	probes    map[string]*probedKVM
}

var (
	_ backend.Backend         = (*Backend)(nil)
	_ host.Machines           = (*Backend)(nil)
	_ backend.TerminalResizer = (*Backend)(nil)
)

// New gives a backend whose files are under dir, which it alone uses.
func New(dir string, reaper *proc.Reaper, log *slog.Logger) *Backend {
	b := &Backend{dir: dir, reaper: reaper, log: log, sandboxes: map[string]*sandbox{}, probes: map[string]*probedKVM{}}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	if left := b.leftovers(); len(left) > 0 {
		b.workers.Go(func() { b.clear(left) })
	}
	return b
}

// Close lets go of all machines, which run on.
func (b *Backend) Close() {
	b.cancel()
	b.workers.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range b.sandboxes {
		s.letGo()
	}
}

// Name is part of backend.Backend.
func (b *Backend) Name() string { return "vm" }

// sandbox gives a sandbox, taking it up from its record when an earlier life
// of this program made it.
func (b *Backend) sandbox(ctx context.Context, id string) (*sandbox, error) {
	s := b.sandboxFor(id)
	s.op.Lock()
	defer s.op.Unlock()
	if s.machine() != nil {
		return s, nil
	}
	err := s.takeUp(ctx)
	if err == nil {
		return s, nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		b.forget(s)
		return nil, fmt.Errorf("the machine of sandbox %q: %w", id, errdefs.ErrNotFound)
	}
	return nil, fmt.Errorf("take up the machine of sandbox %s: %w", id, err)
}

func (b *Backend) forget(s *sandbox) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.sandboxes[s.id] == s {
		delete(b.sandboxes, s.id)
	}
}

// machinesDir holds the folders of machines.
const machinesDir = "m"

// shortDir is a folder whose path leaves room for the names of sockets.
func (b *Backend) shortDir(id string) string {
	sum := sha256.Sum256([]byte(id))
	return filepath.Join(b.dir, machinesDir, hex.EncodeToString(sum[:6]))
}

// sandboxesDir holds the folders that the host keeps for sandboxes.
const sandboxesDir = "sandboxes"

func (b *Backend) sandboxDir(id string) string { return filepath.Join(b.dir, sandboxesDir, id) }

// recordPath is where a sandbox's record is, in the host's folder for it.
func (b *Backend) recordPath(id string) string {
	return filepath.Join(b.sandboxDir(id), "backend.json")
}

// sandboxOf finds the sandbox of a task.
func (b *Backend) sandboxOf(ctx context.Context, t *backend.TaskSpec) (*sandbox, error) {
	id := t.Sandbox
	if id == "" {
		var err error
		if id, err = sandboxInBundle(t.Bundle); err != nil {
			return nil, fmt.Errorf("task %s: %w", t.ID, err)
		}
	}
	return b.sandbox(ctx, id)
}

// holderPlace marks the process that is a machine and no task's.
const holderPlace = "machine"

// Watch is part of backend.Backend. For a sandbox held is kept; the processes of
// tasks have no pidfd here.
func (b *Backend) Watch(t *backend.TaskSpec, p backend.Process, held *os.File, exited func(proc.Exit)) *os.File {
	if p.Place == holderPlace {
		b.workers.Go(func() { b.watchMachine(t.ID, p, exited) })
		return held
	}
	if held != nil {
		held.Close()
	}
	b.workers.Go(func() { b.await(t, p, exited) })
	return nil
}

// watchMachine tells the end of a machine that an earlier life started.
func (b *Backend) watchMachine(id string, p backend.Process, exited func(proc.Exit)) {
	s, err := b.sandbox(b.ctx, id)
	if err != nil {
		b.log.Error("machine not taken up, ending it", "sandbox", id, "err", err)
		if err := proc.Signal(p.Pid, p.Start, syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
			b.log.Error("machine not ended", "sandbox", id, "pid", p.Pid, "err", err)
		}
		exited(proc.UnknownExit())
		return
	}
	s.awaitMachine(exited)
}
