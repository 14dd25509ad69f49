package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/tee"
)

// writeEvery is how often the Node object is written again: kubelet sets
// capacities to zero when the node registers anew.
const writeEvery = time.Minute

// note queues an event; a full queue means that nobody reads them anyway.
func (a *Agent) note(c tee.Change) {
	if a.node == nil {
		return
	}
	select {
	case a.changes <- c:
	default:
	}
}

// writeNode keeps the Node object up to date and tells changes as its events.
func (a *Agent) writeNode(ctx context.Context) {
	if a.node == nil {
		return
	}
	tick := time.NewTicker(writeEvery)
	defer tick.Stop()
	last := ""
	for {
		states, changed := a.inv.States()
		if err := a.writeState(ctx, states); err != nil && ctx.Err() == nil && err.Error() != last {
			last = err.Error()
			a.o.Log.Warn("write the Node object; it is tried again", "err", err)
		} else if err == nil {
			last = ""
		}
		select {
		case <-ctx.Done():
			return
		case c := <-a.changes:
			a.tell(ctx, c)
		case <-changed:
		case <-tick.C:
		}
	}
}

func (a *Agent) tell(ctx context.Context, c tee.Change) {
	reason, message := "TEEHealthy", fmt.Sprintf("%s %s is healthy", c.Resource, c.Part)
	if !c.Healthy {
		reason, message = "TEEUnhealthy", fmt.Sprintf("%s %s is unhealthy: %s", c.Resource, c.Part, c.Reason)
	}
	if err := a.node.Event(ctx, !c.Healthy, reason, message); err != nil && ctx.Err() == nil {
		a.o.Log.Debug("tell an event", "err", err)
	}
}

// writeState sets labels of technologies that were found, and capacities.
func (a *Agent) writeState(ctx context.Context, states []tee.State) error {
	labels, capacity := map[string]string{}, map[string]int64{}
	for _, s := range states {
		if len(s.Resources) > 0 {
			maps.Copy(labels, Labels(s.Backend))
		}
		for _, r := range s.Resources {
			if r.Model != tee.Bytes {
				continue
			}
			capacity[r.Name] = 0
			for n, p := range r.Parts {
				if r.Health[n].Healthy {
					capacity[r.Name] += p.Bytes
				}
			}
		}
	}
	var err error
	if len(labels) > 0 {
		err = a.node.SetLabels(ctx, labels)
	}
	if len(capacity) > 0 {
		err = errors.Join(err, a.node.SetCapacity(ctx, capacity))
	}
	if errors.Is(err, errdefs.ErrNotFound) {
		return fmt.Errorf("is %q the node's name? %w", a.o.NodeName, err)
	}
	return err
}

// Labels are what a node with a technology is labelled with, in the words of
// the original plugins where they have some.
func Labels(backend string) map[string]string {
	l := map[string]string{"tee.cloister.dev/" + backend: "true"}
	switch backend {
	case "trustzone":
		l["teetype"] = "trustzone"
	case "sgx":
		l["sgx.intel.com/capable"] = "true"
	}
	return l
}
