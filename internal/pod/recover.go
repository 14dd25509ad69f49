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
func (s *Service) recover() error {
	sandboxes, damagedPods, err := load[sandboxRecord](s.store, sandboxBucket)
	if err != nil {
		return err
	}
	containers, damagedContainers, err := s.store.containers()
	if err != nil {
		return err
	}
	lost, err := s.setAside(append(damagedPods, damagedContainers...))
	if err != nil {
		return err
	}
	for _, rec := range sandboxes {
		s.recoverSandbox(rec)
	}
	byPod := map[string][]*container{}
	for _, rec := range containers {
		c := s.recoverRecord(rec)
		byPod[rec.SandboxID] = append(byPod[rec.SandboxID], c)
	}
	if err := s.dropForgotten(lost); err != nil {
		return err
	}
	for _, sb := range s.index.allSandboxes() {
		cs := byPod[sb.record().ID]
		delete(byPod, sb.record().ID)
		s.inBackground(sb.op, sb.record().ID, func(ctx context.Context) error {
			for ; len(cs) > 0; cs = cs[1:] { // a repeat goes on where the last one failed
				if err := s.recoverContainer(ctx, cs[0]); err != nil {
					return err
				}
				cs[0].op.unlock()
			}
			return s.recoverPod(ctx, sb)
		})
	}
	for id, orphans := range byPod {
		for _, c := range orphans {
			s.recoverOrphan(c, lost[id])
		}
	}
	return nil
}

// dropForgotten removes the files of containers without a record that a power
// cut left or brought back: no container of this boot is without a bundle.
func (s *Service) dropForgotten(lost map[string]bool) error {
	known, err := s.knownIDs()
	if err != nil {
		return err
	}
	for _, list := range []func(context.Context) ([]orphan, error){s.listVolumes, s.listSnapshots} {
		all, err := list(s.ctx)
		if err != nil {
			return err
		}
		for _, o := range all {
			if _, err := os.Lstat(s.containerDir(o.owner)); known[o.owner] || lost[o.owner] || !errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err := o.remove(s.ctx); err != nil {
				return fmt.Errorf("remove %s %s of a container that a power cut took: %w", o.Kind, o.ID, err)
			}
			s.log.Info("files of a container that has no record were left by a power cut, removed", "kind", o.Kind, "container", o.owner)
		}
	}
	return nil
}

// setAside takes records that cannot be read out of the way, and gives the ids
// of all that were, now or at an earlier start.
func (s *Service) setAside(bad []damaged) (ids map[string]bool, err error) {
	for _, d := range bad {
		s.log.Error("a record of the pod store cannot be read and is set aside; \"cloister debug fsck --repair\" removes it with what is left on the node",
			"record", d.what(), "id", d.id, "err", d.cause)
	}
	if err := s.store.setAside(bad); err != nil {
		return nil, err
	}
	all, err := s.store.damaged()
	if err != nil {
		return nil, err
	}
	ids = map[string]bool{}
	for _, d := range all {
		ids[d.id] = true
	}
	return ids, nil
}

// recoverOrphan takes up a container whose pod has no record. When that is
// because it cannot be read, the container goes on until somebody stops it;
// else the pod's removal was cut off, and the container goes too.
func (s *Service) recoverOrphan(c *container, podLost bool) {
	id := c.record().ID
	s.log.Warn("container without a pod", "container", id, "sandbox", c.record().SandboxID)
	if podLost {
		s.heldInBackground(c.op, id, func(ctx context.Context) error {
			if c.removed() { // between two tries
				return nil
			}
			return s.recoverContainer(ctx, c)
		})
		return
	}
	c.deleted.pass()
	c.op.unlock()
	s.work.Go(func() {
		if err := s.RemoveContainer(s.ctx, id); err != nil {
			s.log.Error("remove a container without a pod", "container", id, "err", err)
		}
	})
}

func (s *Service) recoverSandbox(rec *sandboxRecord) {
	sb := &sandbox{op: newOpLock(), rec: *rec}
	sb.snap.Store(rec)
	sb.handler = s.recoverHandler(rec)
	if err := selinux.ReserveLabelV2(rec.ProcessLabel); err != nil {
		s.log.Warn("SELinux label of a pod may be given to a second one", "sandbox", rec.ID, "err", err)
	}
	s.index.addSandbox(sb)
	if rec.Phase != creating { // a half-made one has given its name up
		s.attempts.reserve(rec.Name, rec.Hash, rec.ID)
	}
}

// recoverHandler gives the version of its handler that the sandbox was made on.
func (s *Service) recoverHandler(rec *sandboxRecord) *shim.Handler {
	if rec.Whole {
		return s.o.Shims.Kept(rec.HandlerName, rec.Runtime)
	}
	h, err := s.o.Shims.Lookup(rec.HandlerName)
	if err != nil {
		s.log.Warn("pod of a handler that is not configured any more", "sandbox", rec.ID, "handler", rec.HandlerName)
		return s.o.Shims.Former(rec.HandlerName, rec.Runtime)
	}
	return h
}

// recoverRecord gives a container whose operation lock is held, until it is
// known what became of it.
func (s *Service) recoverRecord(rec *containerRecord) *container {
	c := &container{op: newOpLock(), rec: *rec, ended: newMilestone(), deleted: newMilestone()}
	c.op <- struct{}{}
	c.snap.Store(rec)
	c.handler = s.handlerOf(rec)
	if rec.Phase == exited || rec.Phase == removing {
		c.ended.pass()
	}
	s.index.addContainer(c)
	if rec.Phase != creating {
		s.attempts.reserve(rec.Name, rec.Hash, rec.ID)
	}
	return c
}

// handlerOf gives the handler of a recovered container, its sandbox's where
// that is known.
func (s *Service) handlerOf(rec *containerRecord) *shim.Handler {
	if sb, err := s.index.sandbox(rec.SandboxID); err == nil {
		return sb.handler
	}
	h, err := s.o.Shims.Lookup(rec.Handler)
	if err != nil {
		h = s.o.Shims.Former(rec.Handler, shim.Runtime{})
	}
	return h
}

// inBackground runs f until it succeeds, holding an operation lock each time,
// so that requests of clients wait for it.
func (s *Service) inBackground(op opLock, id string, f func(context.Context) error) {
	if op.lock(s.ctx) == nil {
		s.heldInBackground(op, id, f)
	}
}

// heldInBackground is inBackground for a caller that holds the lock and gives
// it away.
func (s *Service) heldInBackground(op opLock, id string, f func(context.Context) error) {
	s.work.Go(func() {
		for pause := 100 * time.Millisecond; ; pause = min(2*pause, 30*time.Second) {
			err := f(s.ctx)
			op.unlock()
			if err == nil || s.ctx.Err() != nil {
				return
			}
			s.log.Warn("clean-up or recovery failed, trying again", "id", id, "in", pause, "err", err)
			select {
			case <-s.ctx.Done():
				return
			case <-time.After(pause):
			}
			if op.lock(s.ctx) != nil {
				return
			}
		}
	})
}

// recoverPod finishes what the daemon's end cut off. It may run again after a
// failure. The caller holds sb.op.
func (s *Service) recoverPod(ctx context.Context, sb *sandbox) error {
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
	if err := sb.handler.ShutdownSandbox(ctx, id, s.podDir(id)); err != nil {
		return err
	}
	if sb.record().NetworkUp {
		if err := s.detach(ctx, sb); err != nil {
			return err
		}
	}
	if err := s.removeFolders(sb); err != nil {
		return err
	}
	return s.deleteSandbox(sb)
}

// recoverContainer asks the shim what became of a container. The caller holds
// c.op, and does not call it again after a success.
func (s *Service) recoverContainer(ctx context.Context, c *container) error {
	switch c.phase() {
	case creating:
		return s.discardContainer(ctx, c)
	case removing, exited:
		// What a failed start left may run still.
		if err := c.task(s).Discard(ctx); err != nil {
			s.keptOnShim(c, err)
		}
		c.deleted.pass()
		if c.phase() == exited {
			return nil
		}
		return s.discardContainer(ctx, c)
	default:
		return s.recoverLive(ctx, c)
	}
}

// recoverLive takes up a container that was created or running.
func (s *Service) recoverLive(ctx context.Context, c *container) error {
	state, err := c.task(s).State(ctx)
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("ask for container %.13s: %w", c.record().ID, err)
	}
	known := err == nil && (state.Pid != 0 || state.Exited)
	if !known && (err == nil || c.handler.External()) { // its start was cut off, by which an external shim may have left half of it
		c.onShim.Store(true)
		if err := c.task(s).Discard(ctx); err != nil {
			return fmt.Errorf("clear container %.13s off its shim: %w", c.record().ID, err)
		}
	}
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
		c.deleted.pass()
	case !mountRoot(c.record().Bundle + "/rootfs"):
		if err := s.noteFailedStart(c, errors.New("the node was restarted before the container was started")); err != nil {
			return err
		}
	}
	return nil
}
