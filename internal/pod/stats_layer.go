package pod

import (
	"cmp"
	"context"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

const (
	layerAge   = 10 * time.Second       // after which a writable layer is measured again, unless Options say
	layerWait  = 500 * time.Millisecond // how long a call waits for layers never measured before
	layerWidth = 2                      // walks at the same time
)

// layer is the last known size of a container's writable layer. Walking it may
// take long, so that happens in the background and callers get the last result.
type layer struct {
	mu     sync.Mutex // leaf lock
	size   layerSize
	known  bool
	walked chan struct{} // closed when the walk under way is over; nil without one
}

type layerSize struct {
	at            time.Time
	bytes, inodes uint64
}

// layerSize gives what is known of the writable layer of the container,
// starting a walk when that is old. The first time it waits until wait for one.
func (s *Service) layerSize(ctx context.Context, id string, wait time.Time) (layerSize, bool) {
	l := &s.stats.container(id).layer
	l.mu.Lock()
	walked := l.walked
	if walked == nil && (!l.known || time.Since(l.size.at) >= cmp.Or(s.o.LayerPeriod, layerAge)) && s.ctx.Err() == nil {
		walked = make(chan struct{})
		l.walked = walked
		s.work.Go(func() { s.walkLayer(l, id, walked) })
	}
	size, known := l.size, l.known
	l.mu.Unlock()
	if known || walked == nil {
		return size, known
	}
	ctx, cancel := context.WithDeadline(ctx, wait)
	defer cancel()
	select {
	case <-walked:
	case <-ctx.Done():
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.size, l.known
}

func (s *Service) walkLayer(l *layer, id string, walked chan struct{}) {
	defer close(walked)
	release, err := s.stats.walks.acquire(s.ctx)
	if err == nil {
		defer release()
	}
	var size layerSize
	if err == nil {
		size.bytes, size.inodes, err = s.o.Images.RootfsUsage(s.ctx, id)
	}
	if err != nil && !errdefs.IsNotFound(err) && s.ctx.Err() == nil {
		s.log.Warn("cannot measure a writable layer", "container", id, "err", err)
	}
	size.at = time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.walked = nil
	if err == nil {
		l.size, l.known = size, true
	}
}

// turnstile lets layerWidth through at a time. Its zero value is open.
type turnstile struct {
	once  sync.Once
	slots chan struct{}
}

func (t *turnstile) acquire(ctx context.Context) (release func(), err error) {
	t.once.Do(func() { t.slots = make(chan struct{}, layerWidth) })
	select {
	case t.slots <- struct{}{}:
		return func() { <-t.slots }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
