package check_test

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/host/check"
)

func run(t *testing.T, o check.Options) map[string]check.Result {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("what is tried needs root")
	}
	o.Log = slog.New(slog.DiscardHandler)
	found := map[string]check.Result{}
	all, err := check.Run(context.Background(), o, func(r check.Result) { found[r.Check] = r })
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != len(found) {
		t.Errorf("%d results, %d told", len(all), len(found))
	}
	return found
}

// TestHost tries what every machine that runs these tests can do.
func TestHost(t *testing.T) {
	for name, r := range run(t, check.Options{Only: []string{"cgroups", "mounts", "network tap"}}) {
		if r.Status != check.OK || r.Evidence == "" {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

// TestMissing: what is not there is named, with what to do, and what builds
// upon it is skipped.
func TestMissing(t *testing.T) {
	got := run(t, check.Options{Only: []string{"pod machine", "microvm tcg"},
		Machine: &hostv1.MachineOptions{Path: "/nowhere/qemu", Guests: t.TempDir(), VirtioFsDaemon: "/nowhere/virtiofsd", Accel: "auto"}})
	for name, says := range map[string]string{"qemu": "/nowhere/qemu", "virtiofsd": "/nowhere/virtiofsd", "guest": "cloister guest build"} {
		if r := got[name]; r.Status != check.Failed || !strings.Contains(r.Evidence+r.Remedy, says) {
			t.Errorf("%s: %+v does not say %q", name, r, says)
		}
	}
	for _, name := range []string{"pod machine", "microvm tcg"} {
		if r := got[name]; r.Status != check.Skipped {
			t.Errorf("%s: %+v", name, r)
		}
	}
	if err := check.Verdict([]check.Result{got["qemu"], got["pod machine"]}); err == nil || !strings.Contains(err.Error(), "1 of 2") {
		t.Errorf("verdict %v", err)
	}
	if err := check.Verdict([]check.Result{got["pod machine"]}); err != nil {
		t.Errorf("verdict %v", err)
	}
}

func TestUnknown(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("what is tried needs root")
	}
	_, err := check.Run(t.Context(), check.Options{Only: []string{"luck"}, Log: slog.New(slog.DiscardHandler)}, func(check.Result) {})
	if !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
}

func TestContainer(t *testing.T) {
	if _, err := exec.LookPath("runc"); err != nil {
		t.Skip("runc is not installed: test/setup oci")
	}
	if r := run(t, check.Options{OCI: []string{"runc"}, Only: []string{"container runc"}})["container runc"]; r.Status != check.OK {
		t.Errorf("%+v", r)
	}
}
