package link

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
)

// graveyard is the link group of interfaces that are cut off and wait for their
// deletion, so that a later process can finish it.
const graveyard = 0x636c7374

const (
	reapers   = 4
	reapTries = 5
)

// reaper deletes interfaces in the background. The kernel lets the deleting
// thread wait for its grace periods outside of all locks, so several wait side
// by side.
type reaper struct {
	log  *slog.Logger
	slot chan struct{}
	stop chan struct{}

	mu      sync.Mutex
	pending map[string]bool
	idle    chan struct{} // closed when pending is empty
	closed  bool
	wg      sync.WaitGroup
}

func newReaper(log *slog.Logger) *reaper {
	idle := make(chan struct{})
	close(idle)
	return &reaper{
		log:     log,
		slot:    make(chan struct{}, reapers),
		stop:    make(chan struct{}),
		pending: map[string]bool{},
		idle:    idle,
	}
}

func (r *reaper) add(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pending[name] || r.closed {
		return
	}
	if len(r.pending) == 0 {
		r.idle = make(chan struct{})
	}
	r.pending[name] = true
	r.wg.Go(func() { r.reap(name) })
}

func (r *reaper) reap(name string) {
	r.slot <- struct{}{}
	defer func() {
		<-r.slot
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.pending, name)
		if len(r.pending) == 0 {
			close(r.idle)
		}
	}()
	for try := 1; ; try++ {
		err := deleteLink(name)
		if err == nil {
			return
		}
		if try == reapTries {
			r.log.Error("interface stays, cut off", "interface", name, "err", err)
			return
		}
		select {
		case <-time.After(time.Duration(try) * 50 * time.Millisecond):
		case <-r.stop:
		}
	}
}

func (r *reaper) wait(ctx context.Context) error {
	r.mu.Lock()
	idle := r.idle
	r.mu.Unlock()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (r *reaper) close() {
	r.mu.Lock()
	if !r.closed {
		r.closed = true
		close(r.stop)
	}
	r.mu.Unlock()
	r.wg.Wait()
}

// sweep takes up the deletions that a former process had begun.
func (n *Node) sweep() error {
	links, err := n.h.LinkList()
	if err != nil {
		return err
	}
	for _, l := range links {
		if l.Attrs().Group != graveyard {
			continue
		}
		switch l.(type) {
		case *netlink.Veth, *netlink.Ifb:
			n.reaper.add(l.Attrs().Name)
		}
	}
	return nil
}
