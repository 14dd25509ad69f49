package tee

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestUnitIDs(t *testing.T) {
	r := Resource{Name: "a/b", Parts: []Part{{Key: "x", Units: 100_000}, {Key: "y", Units: 3}}}
	seen := map[string]bool{}
	for at, p := range r.Parts {
		for n := range p.Units {
			id := p.ID(n)
			part, unit, ok := r.Find(id)
			if seen[id] || !ok || part != at || unit != n {
				t.Fatalf("unit %d of part %d has id %q, which is unit %d of part %d (%v)", n, at, id, unit, part, ok)
			}
			seen[id] = true
		}
	}
	for _, id := range []string{"", ".", "x", "x.", "1", "y.3", "y.-1", "y.+1", "y.01", "y.A", "z.1", "x.y.1", "y.99999999999999999999", "y.1 "} {
		if _, _, ok := r.Find(id); ok {
			t.Errorf("%q is taken for a unit", id)
		}
	}
}

func FuzzFind(f *testing.F) {
	f.Add("x.1")
	f.Add("y.-00")
	r := Resource{Name: "a/b", Parts: []Part{{Key: "x", Units: 5}, {Key: "y", Units: 40}}}
	f.Fuzz(func(t *testing.T, id string) {
		if part, unit, ok := r.Find(id); ok && r.Parts[part].ID(unit) != id {
			t.Errorf("%q is found as %q", id, r.Parts[part].ID(unit))
		}
	})
}

func TestAdvance(t *testing.T) {
	one := []Resource{{Name: "a/b", Model: Count, Parts: []Part{{Key: "x", Units: 1}, {Key: "y", Units: 1}}}}
	sick := []Ailment{{"a/b", "x", "hot"}}
	gone := errors.New("gone")
	type look struct {
		found    []Resource
		ailments []Ailment
		err      error
		want     string // health of the parts, and changes
	}
	tests := map[string][]look{
		"one bad check is enough, two good ones heal": {
			{one, nil, nil, "x+ y+ changes 2"}, {one, sick, nil, "x- y+ changes 1"}, {one, nil, nil, "x- y+ changes 0"}, {one, nil, nil, "x+ y+ changes 1"},
		},
		"a good check between bad ones does not heal": {
			{one, nil, nil, "x+ y+ changes 2"}, {one, sick, nil, "x- y+ changes 1"}, {one, nil, nil, "x- y+ changes 0"},
			{one, sick, nil, "x- y+ changes 0"}, {one, nil, nil, "x- y+ changes 0"}, {one, nil, nil, "x+ y+ changes 1"},
		},
		"an error makes all unhealthy": {
			{nil, nil, gone, " changes 0"}, {one, nil, nil, "x+ y+ changes 2"}, {nil, nil, gone, "x- y- changes 2"},
			{one, nil, nil, "x- y- changes 0"}, {one, nil, nil, "x+ y+ changes 2"},
		},
		"what is not found any more stays known": {
			{one, nil, nil, "x+ y+ changes 2"}, {nil, nil, nil, "x- y- changes 2"},
			{[]Resource{{Name: "a/b", Model: Count, Parts: []Part{{Key: "y", Units: 1}}}}, nil, nil, "y- x- changes 0"},
		},
		"born unhealthy": {{one, sick, nil, "x- y+ changes 2"}},
	}
	for name, looks := range tests {
		t.Run(name, func(t *testing.T) {
			var s State
			for n, l := range looks {
				found := slices.Clone(l.found)
				for i := range found {
					found[i].Parts = slices.Clone(found[i].Parts)
				}
				var changes []Change
				s, changes = advance(s, found, l.ailments, l.err, 2, time.Unix(int64(n), 0))
				var got strings.Builder
				for _, r := range s.Resources {
					for _, h := range r.Health {
						sign := "-"
						if h.Healthy {
							sign = "+"
						} else if h.Reason == "" {
							t.Errorf("step %d: %s is unhealthy without a reason", n, h.Part)
						}
						got.WriteString(h.Part + sign + " ")
					}
				}
				if g := strings.TrimSuffix(got.String(), " ") + fmt.Sprint(" changes ", len(changes)); g != l.want {
					t.Errorf("step %d: got %q, want %q", n, g, l.want)
				}
			}
		})
	}
}

// told is a backend that finds one resource, unless it is told otherwise.
type told struct {
	mu    sync.Mutex
	err   error
	sick  bool
	scans int
	watch string
	hang  bool
}

func (b *told) Name() string { return "told" }

func (b *told) Scan(ctx context.Context) ([]Resource, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.scans++
	if b.hang {
		<-ctx.Done()
		return nil, fmt.Errorf("no answer: %w", ctx.Err())
	}
	return []Resource{{Name: "a/b", Model: Count, Parts: []Part{{Units: 2}}}}, b.err
}

func (b *told) Health(context.Context, []Resource) []Ailment {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.watch != "" {
		if _, err := os.Stat(b.watch); err == nil {
			return []Ailment{{"a/b", AllParts, "the file is there"}}
		}
	}
	if b.sick {
		return []Ailment{{"a/b", AllParts, "told so"}}
	}
	return nil
}

func (b *told) WatchPaths() []string {
	if b.watch == "" {
		return nil
	}
	return []string{b.watch}
}

// second is told under another name.
type second struct{ *told }

func (second) Name() string { return "second" }

// Of two backends with one resource the first keeps it, and the other says so.
func TestOneResourceOfTwoBackends(t *testing.T) {
	i := run(t, &told{}, Options{Recheck: time.Millisecond}, second{&told{}})
	until(t, i, "a reason", func() bool {
		for name, owner := range map[string]string{"second": "told", "told": "second"} {
			if err := i.Ready(name); err != nil && strings.Contains(err.Error(), "a/b is one of backend "+owner) {
				return i.Ready(owner) == nil
			}
		}
		return false
	})
}

func run(t *testing.T, b Backend, o Options, more ...Backend) *Inventory {
	i := New(append([]Backend{b}, more...), o)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); i.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return i
}

func until(t *testing.T, i *Inventory, what string, ok func() bool) {
	t.Helper()
	limit := time.After(10 * time.Second)
	for {
		_, changed := i.States()
		if ok() {
			return
		}
		select {
		case <-changed:
		case <-limit:
			t.Fatal("not within 10s: ", what)
		}
	}
}

func TestReady(t *testing.T) {
	b := &told{}
	i := run(t, b, Options{Interval: 5 * time.Millisecond, Recheck: 5 * time.Millisecond})
	until(t, i, "readiness", func() bool { return i.Ready("told") == nil })
	if err := i.Ready("other"); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("a backend that is not there: %v", err)
	}
	b.mu.Lock()
	b.sick = true
	b.mu.Unlock()
	until(t, i, "the loss", func() bool { err := i.Ready("told"); return err != nil && strings.Contains(err.Error(), "told so") })
	b.mu.Lock()
	b.sick, b.err = false, errors.New("no library")
	b.mu.Unlock()
	until(t, i, "the error", func() bool { err := i.Ready("told"); return err != nil && strings.Contains(err.Error(), "no library") })
	b.mu.Lock()
	b.err = nil
	b.mu.Unlock()
	until(t, i, "recovery", func() bool { return i.Ready("told") == nil })
}

// With an interval of 0 a watched file is what makes a check.
func TestWatchedFile(t *testing.T) {
	b := &told{watch: filepath.Join(t.TempDir(), "fault")}
	i := run(t, b, Options{Interval: 0, Recheck: 10 * time.Millisecond})
	until(t, i, "readiness", func() bool { return i.Ready("told") == nil })
	b.mu.Lock()
	before := b.scans
	b.mu.Unlock()
	if err := os.WriteFile(b.watch, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	until(t, i, "loss", func() bool { return i.Ready("told") != nil })
	if err := os.Remove(b.watch); err != nil {
		t.Fatal(err)
	}
	until(t, i, "recovery", func() bool { return i.Ready("told") == nil })
	b.mu.Lock()
	after := b.scans
	b.mu.Unlock()
	if before != 1 {
		t.Errorf("%d checks without a reason", before)
	}
	select {
	case <-time.After(100 * time.Millisecond):
	case <-t.Context().Done():
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.scans > after+1 { // one more may have been due
		t.Errorf("%d more checks of a backend that is well, with health checks off", b.scans-after)
	}
}

func TestHangingBackend(t *testing.T) {
	b := &told{hang: true}
	i := run(t, b, Options{Interval: time.Hour, Timeout: 50 * time.Millisecond, Recheck: time.Millisecond})
	until(t, i, "the reason", func() bool { err := i.Ready("told"); return err != nil && strings.Contains(err.Error(), "no answer") })
	b.mu.Lock()
	b.hang = false
	b.mu.Unlock()
	until(t, i, "recovery", func() bool { return i.Ready("told") == nil })
}

func TestBadResources(t *testing.T) {
	for _, r := range []Resource{
		{Name: "noslash"}, {Name: "/x"}, {Name: "a/"}, {Name: "a/b/c"},
		{Name: "a/b", Parts: []Part{{}, {Key: "x"}}}, {Name: "a/b", Parts: []Part{{Key: "x"}, {Key: "x"}}},
		{Name: "a/b", Parts: []Part{{Key: "x.y"}}}, {Name: "a/b", Parts: []Part{{Units: -1}}},
		{Name: "a/b", Parts: []Part{{Units: 1 << 40}}},
	} {
		if r.check() == nil {
			t.Errorf("%+v is taken", r)
		}
	}
}
