package image

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/unpack"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
)

// unpack turns the layers of an image into committed snapshots. fetch brings a
// layer into the content store; a layer is unpacked as soon as it is there and
// the ones below it are unpacked, while others are still being fetched. With
// all, layers are fetched even when their snapshots exist already.
func (s *Store) unpack(ctx context.Context, c chosen, snapshotter string, fetch func(context.Context, imagespec.Descriptor) error, track *tracker, all bool) (err error) {
	name, sn, err := s.snapshotter(snapshotter)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var fetches gate
	defer fetches.close()
	defer cancel(nil)
	guardDone := make(chan struct{})
	go func() {
		defer close(guardDone)
		s.guardSpace(ctx, cancel)
	}()
	defer func() {
		cancel(nil)
		<-guardDone
	}()

	options := []unpack.UnpackerOpt{
		unpack.WithUnpackPlatform(unpack.Platform{
			Platform:       platforms.All, // follow has checked it
			SnapshotterKey: name,
			Snapshotter:    sn,
			Applier:        apply.NewFileSystemApplier(s.content),
			ApplyOpts:      []diff.ApplyOpt{diff.WithProgress(track.extracted), diff.WithSyncFs(s.o.SyncFS)},
		}),
		unpack.WithLimiter(s.limiter()),
		unpack.WithDuplicationSuppressor(&s.blobs),
	}
	if all {
		options = append(options, unpack.WithFetchAllContent())
	}
	u, err := unpack.NewUnpacker(ctx, s.content, options...)
	if err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	h := u.Unpack(images.HandlerFunc(func(ctx context.Context, d imagespec.Descriptor) ([]imagespec.Descriptor, error) {
		switch d.Digest {
		case c.manifestDesc().Digest:
			return append([]imagespec.Descriptor{c.configDesc()}, c.layers()...), nil
		case c.configDesc().Digest:
			return nil, nil
		}
		return nil, fetches.pass(func() error { return fetch(ctx, d) })
	}))
	_, err = h.Handle(ctx, c.manifestDesc())
	if err == nil {
		_, err = h.Handle(ctx, c.configDesc())
	}
	_, waitErr := u.Wait()
	if err = errors.Join(err, waitErr); err != nil {
		if cause := context.Cause(ctx); errors.Is(cause, errNoSpace) {
			err = cause
		}
		return fmt.Errorf("unpack into %s: %w", name, err)
	}
	track.finish()
	return nil
}

// gate is where fetches pass. Those of a failed unpack may outlive it inside
// containerd's unpacker: close waits for them and lets no more begin.
type gate struct {
	mu     sync.RWMutex
	closed bool
}

func (g *gate) pass(f func() error) error {
	g.mu.RLock()
	defer g.mu.RUnlock()
	if g.closed {
		return context.Canceled
	}
	return f()
}

func (g *gate) close() {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
}

// guardSpace cancels an unpack that would fill the disk: a small layer may
// unpack to any size. One hundredth of the file system, a gibibyte at most, is
// left to the node.
func (s *Store) guardSpace(ctx context.Context, cancel context.CancelCauseFunc) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		var st syscall.Statfs_t
		if err := syscall.Statfs(s.o.Root, &st); err == nil {
			free := st.Bavail * uint64(st.Bsize)
			if free < min(st.Blocks*uint64(st.Bsize)/100, 1<<30) || st.Files > 0 && st.Ffree < st.Files/100 {
				cancel(errNoSpace)
				return
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// unpackStored unpacks an image from the content store: for a snapshotter that
// it has not been pulled for, or when a snapshot was lost.
func (s *Store) unpackStored(ctx context.Context, img Image, snapshotter string) error {
	lease, err := s.leases.Create(ctx, leases.WithRandomID(), leases.WithExpiration(keepPartial))
	if err != nil {
		return fmt.Errorf("lease: %w", err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaseTimeout)
		defer cancel()
		if err := s.endLeases(ctx, lease); err != nil {
			s.log.Warn("lease stays until it expires", "lease", lease.ID, "error", err)
		}
	}()
	ctx = leases.WithLease(ctx, lease.ID)
	c, err := s.stored(ctx, img.target, img.platform)
	if err != nil {
		return fmt.Errorf("image %s is no longer complete, pull it again: %w", img.ID, err)
	}
	present := func(ctx context.Context, d imagespec.Descriptor) error {
		if _, err := s.content.Info(ctx, d.Digest); err != nil {
			if errdefs.IsNotFound(err) {
				return fmt.Errorf("layer %s of image %s is no longer here, pull the image again: %w", d.Digest, img.ID, errdefs.ErrNotFound)
			}
			return err
		}
		return nil
	}
	return s.unpack(ctx, c, snapshotter, present, newTracker(img.ID), false)
}
