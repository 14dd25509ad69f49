package image

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/unpack"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"
)

// unpacking is what unpack has to know.
type unpacking struct {
	chosen
	content     content.Store
	keys        layerKeys
	snapshotter string
	fetch       func(context.Context, imagespec.Descriptor) error // brings a layer into the content store
	track       *tracker
	all         bool // fetch layers even when their snapshots exist already
	ref         string
}

// unpack turns the layers of an image into committed snapshots. A layer is
// unpacked as soon as it has been fetched, while others still are.
func (s *Store) unpack(ctx context.Context, u unpacking) (err error) {
	name, sn, err := s.snapshotter(u.snapshotter)
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

	platform, parallel := s.unpackPlatform(name, sn, u)
	options := []unpack.UnpackerOpt{
		unpack.WithUnpackPlatform(platform),
		unpack.WithLimiter(s.limiter()),
		unpack.WithDuplicationSuppressor(&s.blobs),
	}
	if parallel {
		options = append(options, unpack.WithUnpackLimiter(semaphore.NewWeighted(unpackers())))
	}
	if u.all && !s.o.ProxySnapshotters[name].Remote {
		options = append(options, unpack.WithFetchAllContent())
	}
	unpacker, err := unpack.NewUnpacker(ctx, u.content, options...)
	if err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	c := u.chosen
	h := unpacker.Unpack(images.HandlerFunc(func(ctx context.Context, d imagespec.Descriptor) ([]imagespec.Descriptor, error) {
		switch d.Digest {
		case c.manifestDesc().Digest:
			return append([]imagespec.Descriptor{c.configDesc()}, s.layersFor(name, u.ref, c)...), nil
		case c.configDesc().Digest:
			return nil, nil
		}
		return nil, fetches.pass(func() error { return u.fetch(ctx, d) })
	}))
	_, err = h.Handle(ctx, c.manifestDesc())
	if err == nil {
		_, err = h.Handle(ctx, c.configDesc())
	}
	_, waitErr := unpacker.Wait()
	if err = errors.Join(err, waitErr); err != nil {
		if cause := context.Cause(ctx); errors.Is(cause, errNoSpace) {
			err = cause
		}
		return fmt.Errorf("unpack into %s: %w", name, err)
	}
	u.track.finish()
	return nil
}

// unpackPlatform says where and how layers are unpacked. Where they are put on
// one another by an overlay they can be unpacked at the same time.
func (s *Store) unpackPlatform(name string, sn snapshots.Snapshotter, u unpacking) (p unpack.Platform, parallel bool) {
	parallel = overlays(name) && s.direct
	var dirs *unnamedDirs
	if parallel {
		dirs = &unnamedDirs{stay: name == snapshotterOverlay}
	}
	var lowest string
	if chains := u.chains(); len(chains) > 0 {
		lowest = chains[0]
	}
	p = unpack.Platform{
		Platform:       platforms.All, // follow has checked it
		SnapshotterKey: name,
		Snapshotter:    layering{sn, dirs, u.decrypted(), lowest},
		Applier:        &applier{content: u.content, track: u.track, syncFS: s.o.SyncFS, dirs: dirs, keys: u.keys},
	}
	if parallel {
		p.SnapshotterCapabilities = []string{snapshots.RebaseCap}
	}
	return p, parallel
}

// unpackers is how many layers of an image are unpacked at a time.
func unpackers() int64 { return int64(min(max(runtime.GOMAXPROCS(0), 2), 8)) }

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
	keys, err := s.authorise(ctx, c)
	if err != nil {
		return fmt.Errorf("image %s: %w", img.ID, err)
	}
	return s.unpack(ctx, unpacking{c, s.content, keys, snapshotter, present, newTracker(img.ID), false, ""})
}
