package tee

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// Options of an Inventory.
type Options struct {
	// Interval is the time between two checks of a backend that is well; 0
	// checks only when something is unwell, or a watched file comes or goes.
	Interval time.Duration
	// Recheck is the time between two checks of a backend that is unwell.
	Recheck time.Duration
	// Recover is how many good checks in a row make a part healthy again.
	Recover int
	// Timeout bounds one check and one allocation.
	Timeout time.Duration
	// OnChange is told of every part that becomes healthy or unhealthy.
	OnChange func(Change)
	// OnCheck is told how long a check took.
	OnCheck func(backend string, took time.Duration, err error)
	Log     *slog.Logger
}

// Change is a part that became healthy or unhealthy.
type Change struct {
	Backend, Resource, Part string
	Healthy                 bool
	Reason                  string // why it is not
}

// Health is the state of a part.
type Health struct {
	Part    string    `json:"part,omitempty"`
	Healthy bool      `json:"healthy"`
	Reason  string    `json:"reason,omitempty"` // why it is not
	Since   time.Time `json:"since"`
	good    int       // checks in a row since it was unwell
}

// ResourceState is a resource with the health of its parts, in their order.
type ResourceState struct {
	Resource
	Health []Health `json:"health"`
}

// State is what is known of a backend.
type State struct {
	Backend   string          `json:"backend"`
	Error     string          `json:"error,omitempty"` // of the last scan
	Checked   time.Time       `json:"checked"`
	Resources []ResourceState `json:"resources"`
}

// Inventory watches backends. Run does the watching; the other methods may be
// called at any time by anybody.
type Inventory struct {
	o        Options
	backends []Backend
	wake     map[string]chan struct{}

	mu      sync.Mutex // guards what follows
	states  map[string]State
	changed chan struct{} // closed at every change, then made anew
}

// New makes an inventory of backends, which have different names.
func New(backends []Backend, o Options) *Inventory {
	if o.Recheck <= 0 {
		o.Recheck = 5 * time.Second
	}
	if o.Recover <= 0 {
		o.Recover = 2
	}
	if o.Timeout <= 0 {
		o.Timeout = 10 * time.Second
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	i := &Inventory{o: o, backends: backends, wake: map[string]chan struct{}{}, states: map[string]State{}, changed: make(chan struct{})}
	for _, b := range backends {
		i.wake[b.Name()] = make(chan struct{}, 1)
	}
	return i
}

// Run checks the backends until ctx ends.
func (i *Inventory) Run(ctx context.Context) {
	var all sync.WaitGroup
	follow := i.watchFiles() // before the first check, so that nothing is missed
	all.Go(func() { follow(ctx) })
	for _, b := range i.backends {
		all.Go(func() { i.watch(ctx, b) })
	}
	all.Wait()
}

// Check asks for a check of a backend soon.
func (i *Inventory) Check(backend string) {
	select {
	case i.wake[backend] <- struct{}{}:
	default: // one is due already
	}
}

func (i *Inventory) watch(ctx context.Context, b Backend) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-i.wake[b.Name()]:
		}
		well := i.check(ctx, b)
		switch {
		case !well && (i.o.Interval == 0 || i.o.Recheck < i.o.Interval):
			timer.Reset(i.o.Recheck)
		case i.o.Interval > 0:
			timer.Reset(i.o.Interval)
		}
	}
}

// check looks at a backend once and tells whether it is well.
func (i *Inventory) check(ctx context.Context, b Backend) bool {
	start := time.Now()
	call, cancel := context.WithTimeout(ctx, i.o.Timeout)
	defer cancel()
	found, err := b.Scan(call)
	for _, r := range found {
		err = errors.Join(err, r.check())
	}
	var ailments []Ailment
	if c, ok := b.(Checker); ok && err == nil {
		ailments = c.Health(call, found)
	}
	if ctx.Err() != nil {
		return true // the end, not a finding
	}
	well, err := i.record(b.Name(), found, ailments, err)
	if i.o.OnCheck != nil {
		i.o.OnCheck(b.Name(), time.Since(start), err)
	}
	return well
}

// taken tells that resources are another backend's already; i.mu is held.
func (i *Inventory) taken(backend string, found []Resource) (err error) {
	for _, r := range found {
		if _, owner := i.find(r.Name); owner != nil && owner.Name() != backend {
			err = errors.Join(err, fmt.Errorf("resource %s is one of backend %s; give it another name: %w", r.Name, owner.Name(), errdefs.ErrAlreadyExists))
		}
	}
	return err
}

// record lays what was found over what is known. A resource that another
// backend has is an error.
func (i *Inventory) record(backend string, found []Resource, ailments []Ailment, err error) (well bool, _ error) {
	i.mu.Lock()
	err = errors.Join(err, i.taken(backend, found))
	old := i.states[backend]
	next, changes := advance(old, found, ailments, err, i.o.Recover, time.Now())
	next.Backend = backend
	i.states[backend] = next
	if !sameState(old, next) {
		close(i.changed)
		i.changed = make(chan struct{})
	}
	i.mu.Unlock()
	if next.Error != old.Error {
		if err != nil {
			i.o.Log.Warn("backend cannot be used", "backend", backend, "err", err)
		} else {
			i.o.Log.Info("backend can be used again", "backend", backend)
		}
	}
	for _, c := range changes {
		c.Backend = backend
		i.tell(c)
	}
	return err == nil && next.well(), err
}

func (i *Inventory) tell(c Change) {
	attrs := []any{"backend", c.Backend, "resource", c.Resource, "part", c.Part}
	if c.Healthy {
		i.o.Log.Info("healthy", attrs...)
	} else {
		i.o.Log.Warn("unhealthy", append(attrs, "reason", c.Reason)...)
	}
	if i.o.OnChange != nil {
		i.o.OnChange(c)
	}
}

func (s State) well() bool {
	for _, r := range s.Resources {
		for _, h := range r.Health {
			if !h.Healthy {
				return false
			}
		}
	}
	return true
}

// States gives what is known of every backend, in the order of New, and a
// channel that is closed when there is news. The result is not to be changed.
func (i *Inventory) States() ([]State, <-chan struct{}) {
	i.mu.Lock()
	defer i.mu.Unlock()
	all := make([]State, 0, len(i.backends))
	for _, b := range i.backends {
		if s, ok := i.states[b.Name()]; ok {
			all = append(all, s)
		}
	}
	return all, i.changed
}

// lookup finds a resource and the backend that it belongs to.
func (i *Inventory) lookup(resource string) (ResourceState, Backend, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if r, b := i.find(resource); b != nil {
		return r, b, nil
	}
	return ResourceState{}, nil, fmt.Errorf("resource %s: %w", resource, errdefs.ErrNotFound)
}

// find gives a resource's owner, nil when there is none; i.mu is held.
func (i *Inventory) find(resource string) (ResourceState, Backend) {
	for _, b := range i.backends {
		for _, r := range i.states[b.Name()].Resources {
			if r.Name == resource {
				return r, b
			}
		}
	}
	return ResourceState{}, nil
}

// Ready tells why a backend cannot be used, or nil when it can: the handlers
// that need it are as ready as it is.
func (i *Inventory) Ready(backend string) error {
	if _, ok := i.wake[backend]; !ok {
		return fmt.Errorf("backend %s is not switched on; add it to backends of [device_plugin]: %w", backend, errdefs.ErrFailedPrecondition)
	}
	i.mu.Lock()
	s, ok := i.states[backend]
	i.mu.Unlock()
	switch {
	case !ok:
		return fmt.Errorf("backend %s was not checked yet: %w", backend, errdefs.ErrUnavailable)
	case s.Error != "":
		return fmt.Errorf("backend %s: %s: %w", backend, s.Error, errdefs.ErrUnavailable)
	case len(s.Resources) == 0:
		return fmt.Errorf("backend %s finds nothing on this machine: %w", backend, errdefs.ErrUnavailable)
	}
	var reasons []string
	for _, r := range s.Resources {
		for _, h := range r.Health {
			if h.Healthy {
				return nil
			}
			if !slices.Contains(reasons, h.Reason) {
				reasons = append(reasons, h.Reason)
			}
		}
	}
	return fmt.Errorf("backend %s: %s: %w", backend, strings.Join(reasons, "; "), errdefs.ErrUnavailable)
}

// Allocate hands out units. Either all of them are known and healthy, and the
// backend agrees, or nothing is given.
func (i *Inventory) Allocate(ctx context.Context, resource string, ids []string) (Grant, error) {
	r, b, err := i.lookup(resource)
	if err != nil {
		return Grant{}, err
	}
	if err := r.usable(ids); err != nil {
		return Grant{}, err
	}
	var g Grant
	for n, p := range r.Parts {
		if slices.ContainsFunc(ids, func(id string) bool { at, _, ok := r.Find(id); return ok && at == n }) {
			g.merge(p.Grant)
		}
	}
	a, ok := b.(Allocator)
	if !ok {
		return g, nil
	}
	ctx, cancel := context.WithTimeout(ctx, i.o.Timeout)
	defer cancel()
	if err := a.Allocate(ctx, r.Resource, ids, &g); err != nil {
		return Grant{}, fmt.Errorf("%s: %w", b.Name(), err)
	}
	return g, nil
}

// usable tells why units cannot be handed out.
func (r ResourceState) usable(ids []string) error {
	if len(ids) == 0 {
		return fmt.Errorf("no unit of %s was asked for: %w", r.Name, errdefs.ErrInvalidArgument)
	}
	seen := make(map[string]bool, len(ids))
	for _, id := range ids {
		at, _, ok := r.Find(id)
		switch {
		case !ok:
			return fmt.Errorf("%s has no unit %q; it has %d: %w", r.Name, clip(id), r.Units(), errdefs.ErrNotFound)
		case seen[id]:
			return fmt.Errorf("unit %q of %s was asked for twice: %w", id, r.Name, errdefs.ErrInvalidArgument)
		case !r.Health[at].Healthy:
			return fmt.Errorf("unit %q of %s is unhealthy: %s: %w", id, r.Name, r.Health[at].Reason, errdefs.ErrFailedPrecondition)
		}
		seen[id] = true
	}
	return nil
}

// Usable tells why units cannot be used now; nil means that they can.
func (i *Inventory) Usable(resource string, ids []string) error {
	r, _, err := i.lookup(resource)
	if err != nil {
		return err
	}
	return r.usable(ids)
}

// clip keeps what a caller sent from filling the log.
func clip(s string) string {
	if len(s) > 64 {
		return s[:64] + "…"
	}
	return s
}
