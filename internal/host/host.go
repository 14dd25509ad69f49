// Package host is the server side of the shim protocol: it serves containerd's
// Task v3 and Sandbox v1 APIs and Cloister's own Host API for any number of
// containers in one process.
//
// It promises that a container does not notice the death of this process, that
// no exit status and no byte of output is lost by it, and that a successor
// takes up everything from the state folder: every task is a record that is
// written before (intent) and after (outcome) each act, every file that must
// not be closed is also held by the keeper, every exit is on disk before the
// kernel forgets the process.
//
// How containers run is a Backend's business. Nothing here knows of
// Kubernetes, CRI or images.
//
// # The state folder
//
//	shim.sock, address   where clients connect
//	keeper.lock, exits   of the keeper
//	tasks/ID/            task.json, exec-*.json, FIFOs, the log's mark
//	pumps/ID/            pump.json, FIFOs and mark of a task that another shim runs
//	sandboxes/ID/        sandbox.json
//
// # Locks
//
// Host.mu guards the tables and is never held while anything else is called.
// The order otherwise: task.op, execution.op, task.mu, execution.mu, taskIO.mu;
// pump.op, taskIO.mu; sandbox.op, sandbox.mu.
package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/keeper"
	"cloister.dev/internal/host/stdio"
)

// Host holds the tasks and sandboxes of one state folder.
type Host struct {
	dir     string
	version string
	backend backend.Backend
	store   *keeper.Store
	log     *slog.Logger
	bufs    stdio.Buffers
	workers sync.WaitGroup // what follows an exit

	mu        sync.Mutex
	tasks     map[string]*task
	sandboxes map[string]*sandbox
	pumps     map[string]*pump
}

// Config is what a Host needs.
type Config struct {
	Dir     string
	Version string
	Backend backend.Backend
	Store   *keeper.Store       // nil: without a keeper
	Held    map[string]*os.File // what the keeper gave back; the Host owns them
	Log     *slog.Logger
}

// New takes up what an earlier life left in the state folder.
func New(ctx context.Context, c Config) (*Host, error) {
	h := &Host{dir: c.Dir, version: c.Version, backend: c.Backend, store: c.Store, log: c.Log,
		tasks: map[string]*task{}, sandboxes: map[string]*sandbox{}, pumps: map[string]*pump{}}
	for _, d := range []string{"tasks", "pumps", "sandboxes"} {
		if err := os.MkdirAll(filepath.Join(c.Dir, d), 0o711); err != nil {
			return nil, fmt.Errorf("make the state folder: %w", err)
		}
	}
	if c.Held == nil {
		c.Held = map[string]*os.File{}
	}
	if err := h.recover(ctx, c.Held); err != nil {
		return nil, err
	}
	for name, f := range c.Held {
		f.Close()
		h.store.Drop(name)
	}
	return h, nil
}

func (h *Host) taskDir(id string) string    { return filepath.Join(h.dir, "tasks", id) }
func (h *Host) pumpDir(id string) string    { return filepath.Join(h.dir, "pumps", id) }
func (h *Host) sandboxDir(id string) string { return filepath.Join(h.dir, "sandboxes", id) }

// recover reads every record. One that is broken is reported and left alone:
// it must not keep the others from being served.
func (h *Host) recover(ctx context.Context, held map[string]*os.File) error {
	for dir, f := range map[string]func(context.Context, string, map[string]*os.File) error{
		"tasks": h.recoverTask, "pumps": h.recoverPump, "sandboxes": h.recoverSandbox} {
		ids, err := folders(filepath.Join(h.dir, dir))
		if err != nil {
			return fmt.Errorf("list the state folder: %w", err)
		}
		for _, id := range ids {
			if err := f(ctx, id, held); err != nil {
				h.log.Error("not taken up cleanly", "kind", strings.TrimSuffix(dir, "s"), "id", id, "err", err)
			}
		}
		if len(ids) > 0 {
			h.log.Info("taken up", "kind", dir, "count", len(ids))
		}
	}
	return nil
}

func (h *Host) recoverTask(ctx context.Context, id string, held map[string]*os.File) error {
	var rec taskRecord
	err := load(filepath.Join(h.taskDir(id), "task.json"), &rec)
	if errors.Is(err, fs.ErrNotExist) {
		return os.RemoveAll(h.taskDir(id)) // died before the first record
	}
	if err != nil {
		return err
	}
	if rec.Spec.ID != id {
		return fmt.Errorf("the record is of task %q", rec.Spec.ID)
	}
	t := h.newTask(rec)
	h.tasks[id] = t
	return t.recover(ctx, held)
}

// task finds a task.
func (h *Host) task(id string) (*task, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if t := h.tasks[id]; t != nil {
		return t, nil
	}
	return nil, fmt.Errorf("task %q: %w", id, errdefs.ErrNotFound)
}

// createTask adds a task and makes it.
func (h *Host) createTask(ctx context.Context, rec taskRecord) (pid int, err error) {
	id := rec.Spec.ID
	t := h.newTask(rec)
	t.op <- struct{}{}
	defer func() { <-t.op }()
	h.mu.Lock()
	if h.tasks[id] != nil {
		h.mu.Unlock()
		return 0, fmt.Errorf("task %q: %w", id, errdefs.ErrAlreadyExists)
	}
	h.tasks[id] = t
	h.mu.Unlock()
	if pid, err = t.create(ctx); err != nil {
		return 0, errors.Join(err, t.remove(context.WithoutCancel(ctx)))
	}
	return pid, nil
}

func (h *Host) forget(t *task) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.tasks[t.rec.Spec.ID] == t {
		delete(h.tasks, t.rec.Spec.ID)
	}
}

// Shutdown ends serving: the tasks run on, and what they write waits in their
// pipes for a successor.
func (h *Host) Shutdown() { h.workers.Wait() }
