package shim

import (
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
	if err != nil || !now.Configured() {
		t.Fatalf("%+v, %v", now, err)
	}
	if _, err := c.Lookup("dropped"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an unknown handler: %v", err)
	}
	for _, r := range []Runtime{{}, {Type: containerType, Binary: "crun", SystemdCgroup: true}, {Type: containerType, Path: "/opt/shim"}, {Type: "io.containerd.kata.v2"}} {
		former := c.Former("dropped", r.Trace())
		if former.Configured() || former.Supports().Works {
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
