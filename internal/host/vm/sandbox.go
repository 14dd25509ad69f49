package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/proc"
	"cloister.dev/internal/host/vm/machine"
	"cloister.dev/internal/host/vm/share"
)

// record is a sandbox on disk. It is written before anything is made and again
// when everything is there.
type record struct {
	Dir      string        `json:"dir"` // of sockets and shared files
	NetNS    string        `json:"netns,omitempty"`
	Cgroups  []string      `json:"cgroups,omitempty"` // that we made
	Machine  machine.State `json:"machine"`
	Share    share.State   `json:"share"`
	Accel    string        `json:"accel"`
	Kernel   string        `json:"kernel,omitempty"` // what the guest says, cut to a line
	SharePID bool          `json:"sharePid,omitempty"`
	Up       bool          `json:"up,omitempty"`
	BootTook time.Duration `json:"bootTook,omitempty"`
	// Limits are those of the tasks that have any.
	Limits map[string]limits `json:"limits,omitempty"`
	// Disks lists the tasks that use, or are to use, each disk by its ID.
	Disks map[string][]string `json:"disks,omitempty"`
	// Mkfs is the program that makes disks of image layers; empty: they are shared.
	Mkfs string `json:"mkfs,omitempty"`
}

// sandbox is one virtual machine.
type sandbox struct {
	backend *Backend
	id      string
	op      sync.Mutex

	mu   sync.Mutex
	rec  record
	m    machine.Machine // nil: none, or not taken up
	fs   *share.FS
	ctl  *control
	dial sync.Mutex // held while a control connection is made; outer to mu
	// sizing is held while limits, and the machine's size with them, change;
	// outer to dial and mu.
	sizing sync.Mutex
	// plugging is held while disks come and go; outer to dial and mu.
	plugging sync.Mutex
}

// sandboxFor gives the one that is known under the id, or a new one.
func (b *Backend) sandboxFor(id string) *sandbox {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.sandboxes[id]
	if s == nil {
		s = &sandbox{backend: b, id: id}
		b.sandboxes[id] = s
	}
	return s
}

func (s *sandbox) machine() machine.Machine {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.m
}

func (s *sandbox) files() *share.FS {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fs
}

func (s *sandbox) record() record {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rec
}

// update changes the record and writes it, whole.
func (s *sandbox) update(f func(*record)) error {
	s.mu.Lock()
	f(&s.rec)
	b, err := json.Marshal(&s.rec)
	s.mu.Unlock()
	path := s.backend.recordPath(s.id)
	if err == nil {
		err = os.WriteFile(path+".new", b, 0o600)
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return fmt.Errorf("write the machine's record: %w", err)
	}
	return nil
}

// takeUp finds the machine of an earlier life by its record; op is held.
func (s *sandbox) takeUp(ctx context.Context) error {
	b, err := os.ReadFile(s.backend.recordPath(s.id))
	if err != nil {
		return err
	}
	var rec record
	if err := json.Unmarshal(b, &rec); err != nil {
		return fmt.Errorf("read its record: %w", err)
	}
	if rec.Dir != s.backend.shortDir(s.id) {
		return fmt.Errorf("its record names the folder %q: %w", rec.Dir, errdefs.ErrDataLoss)
	}
	if !rec.Up {
		return fmt.Errorf("it was never up: %w", errdefs.ErrFailedPrecondition)
	}
	m, err := machine.Attach(ctx, s.backend.reaper, rec.Machine, nil)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.rec, s.m, s.fs = rec, m, share.Attach(s.backend.reaper, rec.Share)
	s.mu.Unlock()
	s.backend.workers.Go(s.catchUp)
	return nil
}

// letGo forgets what is open; the machine runs on.
func (s *sandbox) letGo() {
	s.mu.Lock()
	m, ctl := s.m, s.ctl
	s.ctl = nil
	s.mu.Unlock()
	ctl.close()
	if m != nil {
		m.Close()
	}
}

// awaitMachine tells the machine's end.
func (s *sandbox) awaitMachine(exited func(proc.Exit)) {
	m := s.machine()
	select {
	case <-m.Done():
	case <-s.backend.ctx.Done():
		return
	}
	e := m.Exit()
	exit := e.Exit
	exit.Reason = e.Reason
	s.backend.log.Info("machine ended", "sandbox", s.id, "status", exit.Status, "reason", e.Reason)
	exited(exit)
}

// stopTime bounds taking a machine down.
const stopTime = 20 * time.Second

// StopSandbox is part of backend.Backend.
func (b *Backend) StopSandbox(ctx context.Context, spec *backend.SandboxSpec, _ backend.Process) error {
	s := b.sandboxFor(spec.ID)
	s.op.Lock()
	defer s.op.Unlock()
	if s.machine() == nil {
		if err := s.takeUp(ctx); err != nil && !errors.Is(err, os.ErrNotExist) {
			b.log.Debug("taken down without having been taken up", "sandbox", s.id, "err", err)
		}
	}
	if err := s.takeDown(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	b.forget(s)
	return nil
}

// takeDown removes all that a machine is made of, as far as it was made. It
// may be repeated; op is held.
func (s *sandbox) takeDown(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stopTime)
	defer cancel()
	rec := s.intent()
	if rec.Dir == "" {
		return nil
	}
	s.mu.Lock()
	m, files, ctl := s.m, s.fs, s.ctl
	s.ctl = nil
	s.mu.Unlock()
	ctl.close()
	var errs []error
	if m == nil {
		// It may have come into being although nobody could note it.
		var err error
		if m, err = machine.Attach(ctx, s.backend.reaper, machine.State{ID: s.id, Dir: rec.Dir}, nil); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, err)
		}
	}
	if m != nil {
		errs = append(errs, m.Kill(ctx))
		m.Close()
	}
	if files == nil {
		state := rec.Share
		state.Dir = rec.Dir
		files = share.Attach(s.backend.reaper, state)
	}
	errs = append(errs, files.Stop(ctx))
	for _, dir := range rec.Cgroups {
		errs = append(errs, removeCgroup(ctx, dir))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("take the machine of sandbox %s down: %w", s.id, err)
	}
	if err := os.RemoveAll(rec.Dir); err != nil {
		return fmt.Errorf("remove the machine's folder: %w", err)
	}
	if err := os.Remove(s.backend.recordPath(s.id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove the machine's record: %w", err)
	}
	return nil
}

// intent gives the record, that of an earlier life when this one has none.
func (s *sandbox) intent() record {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rec.Dir != "" {
		return s.rec
	}
	var rec record
	b, err := os.ReadFile(s.backend.recordPath(s.id))
	if err == nil && json.Unmarshal(b, &rec) == nil && rec.Dir == s.backend.shortDir(s.id) {
		return rec
	}
	return record{}
}
