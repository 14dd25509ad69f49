package shim

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// handlerSet is what one configuration makes of handlers. A reload makes a new
// one; a handler that a pod holds stays what it was.
type handlerSet struct {
	byName map[string]*Handler // never changed
	def    string              // the handler for "", empty: the best one that works
	chosen *Handler            // that one, once it is known
}

func (c *Client) current() handlerSet {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.set
}

// choose keeps the best handler, unless a reload has dropped it meanwhile.
func (c *Client) choose(h *Handler) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.set.byName[h.Name] == h {
		c.set.chosen = h
	}
}

func (s handlerSet) names() []string { return slices.Sorted(maps.Keys(s.byName)) }

// preference orders the handlers that may become the default one: the faster
// runtime first.
var preference = [...]string{"crun", "runc"}

// order lists the handlers that may become the default one: configured ones
// before those that were found, then by preference, then by name.
func (s handlerSet) order() []string {
	var all []string
	for _, found := range []bool{false, true} {
		for _, n := range slices.Concat(preference[:], s.names()) {
			h := s.byName[n]
			if h != nil && h.Runtime.Type == containerType && h.Runtime.Found == found && !slices.Contains(all, n) {
				all = append(all, n)
			}
		}
	}
	return all
}

func (s handlerSet) lookup(name string) (*Handler, error) {
	h := s.byName[cmp.Or(name, s.def)]
	if h == nil {
		return nil, fmt.Errorf("runtime handler %q is not configured; there are %s: %w",
			name, strings.Join(s.names(), ", "), errdefs.ErrInvalidArgument)
	}
	return h, nil
}

// Reload replaces the configured handlers. Those that did not change and work
// stay as they are; the others are probed in the background, as New does. Pods
// keep the handler that they have. On error nothing is changed.
func (c *Client) Reload(runtimes map[string]Runtime, def string) error {
	for name, r := range runtimes {
		if _, _, err := shimName(r.Type); err != nil && r.Path == "" {
			return fmt.Errorf("handler %q: %w", name, err)
		}
	}
	if _, ok := runtimes[def]; def != "" && !ok {
		return fmt.Errorf("default_runtime_name %q: no such handler; configured are %s: %w",
			def, strings.Join(slices.Sorted(maps.Keys(runtimes)), ", "), errdefs.ErrInvalidArgument)
	}
	old := c.current()
	next := handlerSet{byName: map[string]*Handler{}, def: def}
	var fresh []*Handler
	for name, r := range runtimes {
		h, probed := c.follow(old.byName[name], name, r)
		if next.byName[name] = h; !probed {
			fresh = append(fresh, h)
		}
	}
	c.mu.Lock()
	c.set = next
	c.mu.Unlock()
	for _, h := range fresh {
		c.probes.Go(func() { h.probe(c.ctx) })
	}
	return nil
}

// follow makes the handler that comes after old, nil being none, and tells
// whether what is known of that one holds for it.
func (c *Client) follow(old *Handler, name string, r Runtime) (h *Handler, probed bool) {
	h = &Handler{Name: name, Runtime: r, client: c, trial: &trial{done: make(chan struct{})}}
	if old == nil || !old.worked() || !bytes.Equal(old.Runtime.seen(), r.seen()) {
		return h, false
	}
	if bytes.Equal(old.Runtime.encode(), r.encode()) {
		return old, true
	}
	h.trial = old.trial
	return h, true
}

// worked tells whether a probe has found that the handler works. One that did
// not may do so now.
func (h *Handler) worked() bool {
	select {
	case <-h.trial.done:
		return h.trial.features.Works
	default:
		return false
	}
}

// encode gives a form in which a runtime that was kept on disk equals the one
// that it was.
func (r Runtime) encode() []byte {
	b, err := json.Marshal(r)
	if err != nil { // a number that JSON has no form for
		return fmt.Appendf(nil, "%+v", r)
	}
	return b
}

// seen is what of a runtime a probe may depend on: all but what only shapes
// the containers' specs.
func (r Runtime) seen() []byte {
	r.Snapshotter, r.Platform, r.BaseSpec, r.ReadOnlyMounts = "", "", "", ""
	r.PodAnnotations, r.CtrAnnotations, r.Rlimits = nil, nil, nil
	r.NoHostDevices, r.AllDevices, r.CgroupWritable = false, false, false
	return r.encode()
}

// Kept gives the handler of a pod that an earlier daemon made, whose runtime
// was kept with it: the configured one where that has not changed, else one
// of the pod's own version.
func (c *Client) Kept(name string, r Runtime) *Handler {
	now := c.current().byName[name]
	if now != nil && bytes.Equal(now.Runtime.encode(), r.encode()) {
		return now
	}
	key := name + "\x00" + string(r.encode())
	c.mu.Lock()
	h := c.kept[key]
	probed := h != nil
	if !probed {
		h, probed = c.follow(now, name, r)
		c.kept[key] = h
	}
	c.mu.Unlock()
	if !probed {
		c.probes.Go(func() { h.probe(c.ctx) })
	}
	return h
}

// Former gives a handler that is not configured any more for what still runs
// on it, when little is known of it: that can be watched, stopped and removed,
// but nothing can be started.
func (c *Client) Former(name string, r Runtime) *Handler {
	if r.Type == "" {
		r.Type = containerType
	}
	h := &Handler{Name: name, Runtime: r, client: c, former: true,
		trial: &trial{done: make(chan struct{}), features: Features{Reason: "not configured any more"}}}
	close(h.trial.done)
	return h
}

// Usable tells whether containers can be started on the handler, were it to
// work: not on a former one.
func (h *Handler) Usable() bool { return !h.former }
