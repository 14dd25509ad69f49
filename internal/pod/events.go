package pod

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// eventBacklog is how many events a reader may lag behind before it is told
// that it lost some.
const eventBacklog = 10000

// ErrLagged is what a subscription answers that lost events: its reader was
// more than the backlog behind. The reader has to list and subscribe again.
var ErrLagged = fmt.Errorf("event stream lagged too far behind, list again: %w", errdefs.ErrOutOfRange)

// hub passes events to subscriptions. Publishing never blocks.
type hub struct {
	mu     sync.Mutex
	subs   map[*Subscription]struct{}
	closed bool
}

func newHub() *hub { return &hub{subs: map[*Subscription]struct{}{}} }

// Subscription is one reader of events.
type Subscription struct {
	hub    *hub
	wake   chan struct{}                        // holds one token when queue, lagged or closed changed
	queue  []*runtimeapi.ContainerEventResponse // guarded by hub.mu, like the rest
	lagged bool
	closed bool
}

// Subscribe starts a subscription, which the caller must Close.
func (s *Service) Subscribe() *Subscription {
	sub := &Subscription{hub: s.hub, wake: make(chan struct{}, 1)}
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	sub.closed = s.hub.closed
	s.hub.subs[sub] = struct{}{}
	return sub
}

// Next gives the next event, in the order of what happened.
func (sub *Subscription) Next(ctx context.Context) (*runtimeapi.ContainerEventResponse, error) {
	for {
		sub.hub.mu.Lock()
		switch {
		case sub.lagged:
			sub.hub.mu.Unlock()
			return nil, ErrLagged
		case len(sub.queue) > 0:
			e := sub.queue[0]
			sub.queue = sub.queue[1:]
			sub.hub.mu.Unlock()
			return e, nil
		case sub.closed:
			sub.hub.mu.Unlock()
			return nil, errClosing
		}
		sub.hub.mu.Unlock()
		select {
		case <-sub.wake:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Close ends the subscription.
func (sub *Subscription) Close() {
	sub.hub.mu.Lock()
	defer sub.hub.mu.Unlock()
	delete(sub.hub.subs, sub)
}

func (sub *Subscription) signal() {
	select {
	case sub.wake <- struct{}{}:
	default:
	}
}

func (h *hub) publish(e *runtimeapi.ContainerEventResponse) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for sub := range h.subs {
		if len(sub.queue) >= eventBacklog {
			sub.lagged, sub.queue = true, nil
		}
		if !sub.lagged {
			sub.queue = append(sub.queue, e)
		}
		sub.signal()
	}
}

func (h *hub) listening() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.subs) > 0
}

func (h *hub) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for sub := range h.subs {
		sub.closed = true
		sub.signal()
	}
}

// emit publishes what happened to a container, or to a sandbox when
// containerID is the sandbox's own id.
func (s *Service) emit(t runtimeapi.ContainerEventType, containerID, sandboxID string) {
	if !s.hub.listening() {
		return
	}
	e := &runtimeapi.ContainerEventResponse{ContainerId: containerID, ContainerEventType: t, CreatedAt: time.Now().UnixNano()}
	if sb, err := s.index.sandbox(sandboxID); err == nil {
		e.PodSandboxStatus = SandboxStatus(sb.get())
	}
	for _, c := range s.index.containersOf(sandboxID) {
		e.ContainersStatuses = append(e.ContainersStatuses, ContainerStatus(c.get()))
	}
	s.hub.publish(e)
}
