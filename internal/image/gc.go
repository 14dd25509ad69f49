package image

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	gcQuiet    = 200 * time.Millisecond // no further removal for so long …
	gcLatest   = 2 * time.Second        // … or this after the first one
	gcShare    = 20                     // rest so many times the duration of a run
	gcExpiry   = 10 * time.Minute       // period while leases wait to expire
	sweepBytes = "cloister: removed at once; makes the collector look at the whole store"
)

// collector runs the metadata database's garbage collection in the background:
// soon after something was removed, once when the store opens, and while
// leases of failed pulls wait for their end.
type collector struct {
	kicks chan struct{}

	mu    sync.Mutex
	until time.Time
}

func (c *collector) start(s *Store) {
	c.kicks = make(chan struct{}, 1)
	s.wg.Go(func() { c.run(s) })
}

// kick asks for a run. It never blocks.
func (c *collector) kick() {
	select {
	case c.kicks <- struct{}{}:
	default:
	}
}

// keepUntil makes the collector look now and then until t has passed.
func (c *collector) keepUntil(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t.After(c.until) {
		c.until = t
	}
}

func (c *collector) expiring() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Before(c.until.Add(gcExpiry))
}

func (c *collector) run(s *Store) {
	if err := s.markAll(s.ctx); err != nil && s.ctx.Err() == nil {
		s.log.Warn("cannot prepare the first garbage collection", "error", err)
	}
	c.collect(s)
	tick := time.NewTicker(gcExpiry)
	defer tick.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-tick.C:
			if !c.expiring() {
				continue
			}
		case <-c.kicks:
			if !c.settle(s.ctx) {
				return
			}
		}
		took := c.collect(s)
		if !pause(s.ctx, gcShare*took) {
			return
		}
	}
}

// settle waits until no more removals come, for a bounded time.
func (c *collector) settle(ctx context.Context) bool {
	latest := time.After(gcLatest)
	for {
		select {
		case <-ctx.Done():
			return false
		case <-latest:
			return true
		case <-time.After(gcQuiet):
			return true
		case <-c.kicks:
		}
	}
}

func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(min(d, gcLatest)):
		return true
	}
}

func (c *collector) collect(s *Store) time.Duration {
	start := time.Now()
	if err := s.collectFolders(s.ctx); err != nil && s.ctx.Err() == nil {
		s.log.Warn("root file systems not collected", "error", err)
	}
	stats, err := s.db.GarbageCollect(s.ctx)
	if isNoSpace(err) {
		s.reserve.release()
		stats, err = s.db.GarbageCollect(s.ctx)
	}
	took := time.Since(start)
	if err != nil {
		if s.ctx.Err() == nil {
			s.log.Warn("garbage collection failed", "error", err)
		}
		return took
	}
	s.reserve.fill()
	s.log.Debug("garbage collected", "took", took, "held", stats.Elapsed())
	return took
}

// markAll makes the next collection compare the whole content store and all
// snapshot directories with the database. The database only remembers in
// memory where something was removed; what it forgot in a crash would stay on
// disk for ever. Adding a thing that nothing refers to is the one way to tell it.
func (s *Store) markAll(ctx context.Context) error {
	d := digest.FromString(sweepBytes)
	desc := imagespec.Descriptor{MediaType: "text/plain", Digest: d, Size: int64(len(sweepBytes))}
	if err := content.WriteBlob(ctx, s.content, "sweep", bytes.NewReader([]byte(sweepBytes)), desc); err != nil {
		return fmt.Errorf("write the mark: %w", err)
	}
	for name, sn := range s.snapshotters {
		if !s.inUse(name) {
			continue
		}
		_, err := sn.Prepare(ctx, "sweep", "")
		if _, ok := s.o.ProxySnapshotters[name]; ok && err != nil {
			s.log.Warn("proxy snapshotter does not answer", "snapshotter", name, "error", clean(err.Error()))
		} else if err != nil && !errdefs.IsAlreadyExists(err) {
			return fmt.Errorf("mark snapshotter %s: %w", name, err)
		}
	}
	return nil
}

// collectNow is for tests.
func (s *Store) collectNow(ctx context.Context) error {
	if err := s.collectFolders(s.within(ctx)); err != nil {
		return err
	}
	_, err := s.db.GarbageCollect(s.within(ctx))
	return err
}
