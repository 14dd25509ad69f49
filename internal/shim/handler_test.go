package shim

import (
	"encoding/json"
	"log/slog"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

func TestFormerHandler(t *testing.T) {
	c, err := New(Options{State: filepath.Join(t.TempDir(), "s"), Binary: "/bin/false", Log: slog.New(slog.DiscardHandler),
		Runtimes: map[string]Runtime{"kata": {Type: "io.containerd.kata.v2", Path: "/bin/true"}}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	now, err := c.Lookup("kata")
	if err != nil || !now.Usable() {
		t.Fatalf("%+v, %v", now, err)
	}
	if _, err := c.Lookup("dropped"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an unknown handler: %v", err)
	}
	for _, r := range []Runtime{{}, {Type: containerType, Binary: "crun", SystemdCgroup: true}, {Type: containerType, Path: "/opt/shim"}, {Type: "io.containerd.kata.v2"}} {
		former := c.Former("dropped", r)
		if former.Usable() || former.Supports().Works {
			t.Errorf("%+v can still be used", r)
		}
		if _, err := former.Features(t.Context()); err != nil {
			t.Errorf("its probe has no end: %v", err)
		}
		if r.Type == "" {
			r.Type = containerType
		}
		if former.Runtime.resident() != r.resident() || former.Runtime.SystemdCgroup != r.SystemdCgroup {
			t.Errorf("%+v is another one as former: %+v", r, former.Runtime)
		}
	}
}

// A pod keeps its handler over a reload; what did not change is not tried again.
func TestReload(t *testing.T) {
	kata := Runtime{Type: "io.containerd.kata.v2", Path: "/bin/true"}
	c, err := New(Options{State: filepath.Join(t.TempDir(), "s"), Binary: "/bin/false", Log: slog.New(slog.DiscardHandler),
		Runtimes: map[string]Runtime{"kata": kata, "gone": kata}, Default: "kata"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	handler := func(name string) *Handler {
		t.Helper()
		h, err := c.Handler(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	first, gone := handler("kata"), handler("gone")
	if err := c.Reload(map[string]Runtime{"kata": kata}, "gone"); !errdefs.IsInvalidArgument(err) || handler("gone") != gone {
		t.Errorf("a default handler that is not there: %v", err)
	}
	if err := c.Reload(map[string]Runtime{"kata": {Type: "kata"}}, ""); !errdefs.IsInvalidArgument(err) || handler("kata") != first {
		t.Errorf("a bad type: %v", err)
	}
	annotated, moved := kata, kata
	annotated.PodAnnotations, moved.Path = []string{"a.*"}, "/bin/false"
	for _, next := range []struct {
		r     Runtime
		trial bool // the old one holds
	}{{annotated, true}, {moved, false}} {
		before := handler("kata")
		if err := c.Reload(map[string]Runtime{"kata": next.r}, "kata"); err != nil {
			t.Fatal(err)
		}
		after := handler("")
		if after == before || after.Runtime.Path != next.r.Path || (after.trial == before.trial) != next.trial {
			t.Errorf("%+v became %+v", before, after)
		}
		if err := c.Reload(map[string]Runtime{"kata": next.r}, "kata"); err != nil || handler("kata") != after {
			t.Errorf("the same configuration makes another handler: %v", err)
		}
	}
	if _, err := c.Handler(t.Context(), "gone"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a handler that was dropped: %v", err)
	}
	if !first.Usable() || !gone.Usable() || !first.Supports().Works || first.Runtime.Path != "/bin/true" {
		t.Errorf("pods lost their handler: %+v, %+v", first, gone)
	}
}

// After a restart a pod gets the handler of its own version back.
func TestKept(t *testing.T) {
	now := Runtime{Type: "io.containerd.kata.v2", Path: "/bin/true", Options: map[string]any{"n": int64(7)}}
	c, err := New(Options{State: filepath.Join(t.TempDir(), "s"), Binary: "/bin/false", Log: slog.New(slog.DiscardHandler),
		Runtimes: map[string]Runtime{"kata": now}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	configured, err := c.Handler(t.Context(), "kata")
	if err != nil {
		t.Fatal(err)
	}
	onDisk := func(r Runtime) (back Runtime) {
		if err := json.Unmarshal(r.encode(), &back); err != nil {
			t.Fatal(err)
		}
		return back
	}
	if h := c.Kept("kata", onDisk(now)); h != configured {
		t.Errorf("the configured version is another one: %+v", h)
	}
	old := now
	old.Path = "/bin/false"
	a, b := c.Kept("kata", onDisk(old)), c.Kept("kata", onDisk(old))
	if a != b || a == configured || a.Runtime.Path != "/bin/false" || !a.Usable() {
		t.Errorf("got %+v and %+v", a, b)
	}
	if _, err := a.Features(t.Context()); err != nil {
		t.Error(err)
	}
}
