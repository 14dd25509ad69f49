package pod

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// StopSandbox stops the sandbox's containers and takes its network down. It
// may be repeated; an absent sandbox is success.
func (s *Service) StopSandbox(ctx context.Context, id string) error {
	return s.withSandbox(ctx, id, s.stopSandbox)
}

// withSandbox runs f with the sandbox's operation lock. It does nothing when
// the sandbox is not there, or was removed by the operation that it waited for.
func (s *Service) withSandbox(ctx context.Context, id string, f func(context.Context, *sandbox) error) error {
	sb, err := s.index.sandbox(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := sb.op.lock(ctx); err != nil {
		return err
	}
	defer sb.op.unlock()
	if _, err := s.index.sandbox(sb.record().ID); errdefs.IsNotFound(err) {
		return nil
	}
	return f(ctx, sb)
}

// stopSandbox goes the whole way again after a failure: each step finds what
// is left for it. The caller holds sb.op.
func (s *Service) stopSandbox(ctx context.Context, sb *sandbox) error {
	id := sb.get().ID
	if sb.phase() == stopped || sb.phase() == removing {
		return nil
	}
	if sb.phase() == ready {
		if err := s.changeSandbox(sb, func(r *sandboxRecord) { r.Phase = stopping }); err != nil {
			return err
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	for _, c := range s.index.containersOf(id) {
		g.Go(func() error { return s.stopContainer(gctx, c, 0) })
	}
	if err := g.Wait(); err != nil {
		return fmt.Errorf("stop the containers of pod %s: %w", sb.record().Name, err)
	}
	if s.o.NRI.Active() {
		s.tell("StopPodSandbox", id, s.o.NRI.StopPod(ctx, s.describePod(sb)))
	}
	if err := sb.handler.StopSandbox(ctx, id, s.podDir(id)); err != nil {
		return fmt.Errorf("stop pod %s on its shim: %w", sb.record().Name, err)
	}
	if sb.record().NetworkUp {
		if err := s.detach(ctx, sb); err != nil {
			return err
		}
	}
	if err := s.changeSandbox(sb, func(r *sandboxRecord) { r.Phase, r.NetworkUp, r.Pid = stopped, false, 0 }); err != nil {
		return err
	}
	s.emit(runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, id, id)
	return nil
}

// detach releases the sandbox's network. After a reboot the namespace is gone
// and only what lives outside of it is released.
func (s *Service) detach(ctx context.Context, sb *sandbox) error {
	req := s.networkRequest(sb)
	if _, err := os.Stat(req.NetNS); errors.Is(err, os.ErrNotExist) {
		req.NetNS = ""
	}
	if err := timed(s.o.Observer.Network, "detach", func() error { return s.o.Network.Detach(ctx, req) }); err != nil {
		return fmt.Errorf("detach pod %s from the network: %w", sb.record().Name, err)
	}
	return nil
}

// RemoveSandbox removes the sandbox with its containers, stopping what runs.
// It may be repeated; an absent sandbox is success.
func (s *Service) RemoveSandbox(ctx context.Context, id string) error {
	return s.withSandbox(ctx, id, func(ctx context.Context, sb *sandbox) error {
		if err := s.stopSandbox(ctx, sb); err != nil {
			return err
		}
		return s.removeSandbox(ctx, sb)
	})
}

// removeSandbox removes a stopped sandbox. The caller holds sb.op.
func (s *Service) removeSandbox(ctx context.Context, sb *sandbox) error {
	id := sb.get().ID
	for _, c := range s.index.containersOf(id) {
		if err := s.RemoveContainer(ctx, c.get().ID); err != nil {
			return fmt.Errorf("remove pod %s: %w", sb.record().Name, err)
		}
	}
	if sb.phase() != removing {
		if err := s.changeSandbox(sb, func(r *sandboxRecord) { r.Phase = removing }); err != nil {
			return err
		}
	}
	if s.o.NRI.Active() {
		s.tell("RemovePodSandbox", id, s.o.NRI.RemovePod(ctx, s.describePod(sb)))
	}
	if err := sb.handler.ShutdownSandbox(ctx, id, s.podDir(id)); err != nil {
		return fmt.Errorf("shut down pod %s on its shim: %w", sb.record().Name, err)
	}
	if err := s.removeFolders(sb); err != nil {
		return err
	}
	if err := s.deleteSandbox(sb); err != nil {
		return err
	}
	s.emit(runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT, id, id)
	return nil
}

func (sb *sandbox) phase() phase { return sb.record().Phase }

func (c *container) phase() phase { return c.record().Phase }
