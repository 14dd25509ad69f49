package pod

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/selinux/go-selinux"

	"cloister.dev/internal/shim"
)

// recover takes up what an earlier daemon left. Records are read at once, so
// that no client sees an empty node; intents are finished and shims are asked
// in the background, where a slow one holds up nobody else.
func (s *Service) recover(ctx context.Context) error {
	sandboxes, err := load[sandboxRecord](s.store, sandboxBucket)
	if err != nil {
		return err
	}
	containers, err := load[containerRecord](s.store, containerBucket)
	if err != nil {
		return err
	}
	for _, rec := range sandboxes {
		sb := &sandbox{op: newOpLock(), rec: *rec}
		sb.snap.Store(rec)
		if sb.handler, err = s.o.Shims.Lookup(rec.HandlerName); err != nil {
			s.log.Warn("pod of a handler that is not configured any more", "sandbox", rec.ID, "handler", rec.HandlerName)
		}
		selinux.ReserveLabel(rec.ProcessLabel)
		s.index.addSandbox(sb)
		s.attempts.reserve(rec.Name, rec.Hash, rec.ID)
	}
	byPod := map[string][]*container{}
	for _, rec := range containers {
		c := s.recoverRecord(rec)
		byPod[rec.SandboxID] = append(byPod[rec.SandboxID], c)
	}
	for _, sb := range s.index.allSandboxes() {
		cs := byPod[sb.record().ID]
		delete(byPod, sb.record().ID)
		s.inBackground(sb, func(ctx context.Context) error { return s.recoverPod(ctx, sb, cs) })
	}
	for _, orphans := range byPod { // their pod's record is gone: a removal was cut off
		for _, c := range orphans {
			s.log.Warn("container without a pod", "container", c.record().ID)
			close(c.deleted)
			s.work.Go(func() {
				if err := s.RemoveContainer(s.ctx, c.record().ID); err != nil {
					s.log.Error("remove a container without a pod", "container", c.record().ID, "err", err)
				}
			})
		}
	}
	return nil
}

func (s *Service) recoverRecord(rec *containerRecord) *container {
	c := &container{op: newOpLock(), rec: *rec, ended: make(chan struct{}), deleted: make(chan struct{})}
	c.snap.Store(rec)
	if sb, err := s.index.sandbox(rec.SandboxID); err == nil {
		c.handler = sb.handler
	}
	if rec.Phase == exited || rec.Phase == removing {
		close(c.ended)
	}
	s.index.addContainer(c)
	s.attempts.reserve(rec.Name, rec.Hash, rec.ID)
	return c
}

// inBackground runs f until it succeeds, holding the sandbox's operation lock
// each time, so that requests of clients wait for it.
func (s *Service) inBackground(sb *sandbox, f func(context.Context) error) {
	if sb.op.lock(s.ctx) != nil {
		return
	}
	s.work.Go(func() {
		for pause := 100 * time.Millisecond; ; pause = min(2*pause, 30*time.Second) {
			err := f(s.ctx)
			sb.op.unlock()
			if err == nil || s.ctx.Err() != nil {
				return
			}
			s.log.Warn("recovery of a pod failed, trying again", "sandbox", sb.record().ID, "in", pause, "err", err)
			select {
			case <-s.ctx.Done():
				return
			case <-time.After(pause):
			}
			if sb.op.lock(s.ctx) != nil {
				return
			}
		}
	})
}

// recoverPod finishes what the daemon's end cut off. It may run again after a
// failure. The caller holds sb.op.
func (s *Service) recoverPod(ctx context.Context, sb *sandbox, cs []*container) error {
	for _, c := range cs {
		if err := s.recoverContainer(ctx, c); err != nil {
			return err
		}
	}
	switch sb.phase() {
	case creating:
		return s.takeDown(ctx, sb)
	case removing:
		return s.removeSandbox(ctx, sb)
	case stopping:
		return s.stopSandbox(ctx, sb)
	case ready:
		if _, err := os.Stat(s.podDir(sb.record().ID)); errors.Is(err, fs.ErrNotExist) || !mountRoot(s.podDir(sb.record().ID)) {
			s.log.Info("pod did not survive a reboot", "sandbox", sb.record().ID)
			return s.stopSandbox(ctx, sb)
		}
		s.watchHolder(sb)
	}
	return nil
}

// takeDown undoes a half-made sandbox: no client knows it.
func (s *Service) takeDown(ctx context.Context, sb *sandbox) error {
	id := sb.record().ID
	s.log.Info("taking down a half-made pod", "sandbox", id)
	if sb.handler != nil {
		if err := sb.handler.ShutdownSandbox(ctx, id, s.podDir(id)); err != nil {
			return err
		}
	}
	if sb.record().NetworkUp {
		if err := s.detach(ctx, sb); err != nil {
			return err
		}
	}
	if err := removeFolder(s.podDir(id)); err != nil {
		return err
	}
	if err := s.store.delete(sandboxBucket, id); err != nil {
		return err
	}
	s.index.dropSandbox(id)
	selinux.ReleaseLabel(sb.record().ProcessLabel)
	s.attempts.release(sb.record().Name, id)
	return nil
}

// recoverContainer asks the shim what became of a container.
func (s *Service) recoverContainer(ctx context.Context, c *container) error {
	switch c.phase() {
	case creating:
		if err := s.releaseFiles(ctx, c); err != nil {
			return err
		}
		return s.dropContainer(c)
	case removing, exited:
		closeOnce(c.deleted, func() {
			if c.handler == nil {
				return
			}
			if err := c.task(s).Delete(ctx); err != nil {
				s.log.Warn("delete an ended container on its shim", "container", c.record().ID, "err", err)
			}
		})
		if c.phase() == exited {
			return nil
		}
		if err := s.releaseFiles(ctx, c); err != nil {
			return err
		}
		return s.dropContainer(c)
	}
	return s.recoverLive(ctx, c)
}

// recoverLive takes up a container that was created or running.
func (s *Service) recoverLive(ctx context.Context, c *container) error {
	state, err := shim.State{}, error(errdefs.ErrNotFound)
	if c.handler != nil {
		state, err = c.task(s).State(ctx)
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("ask for container %.13s: %w", c.record().ID, err)
	}
	known := err == nil && (state.Pid != 0 || state.Exited)
	switch {
	case known && c.phase() == ready:
		// Started, and the daemon died before it noted that.
		if err := s.changeContainer(c, func(r *containerRecord) { r.Phase, r.Pid, r.StartedAt = running, state.Pid, time.Now() }); err != nil {
			return err
		}
		s.watch(c)
	case known:
		s.watch(c)
	case c.phase() == running:
		// Neither alive nor remembered: a reboot.
		if err := s.noteExit(c, shim.Exit{Status: 255, At: time.Now(), Unknown: true}); err != nil {
			return err
		}
		close(c.deleted)
	case !mountRoot(c.record().Bundle + "/rootfs"):
		if err := s.noteFailedStart(c, errors.New("the node was restarted before the container was started")); err != nil {
			return err
		}
	}
	return nil
}

func closeOnce(ch chan struct{}, before func()) {
	select {
	case <-ch:
	default:
		before()
		close(ch)
	}
}
