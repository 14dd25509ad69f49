package cni

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/network/networktest"
)

// A new configuration counts for new pods; those that are attached leave the
// network that they are on.
func TestReconfigure(t *testing.T) {
	networktest.RequireNode(t)
	dir := t.TempDir()
	first, second := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	write(t, filepath.Join(first, "10.conflist"), fmt.Sprintf(bridgeList, dir, "1.0.0"), 0o644)
	write(t, filepath.Join(second, "20.conflist"), fmt.Sprintf(ptpList, dir, "1.0.0"), 0o644)
	options := func(o *Options) {
		o.ConfDir = first
		o.Handlers = map[string]Folder{"vm": {Dir: second, MaxConfNum: 1}}
	}
	a := start(t, dir, options)
	defer a.Close()
	same := a.now.Load().folders["vm"]
	r := newPod(t, "reconfigured")
	was, err := a.Attach(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}

	if err := a.Reconfigure(Options{ConfDir: second, MaxConfNum: 1, IPPref: "ipv7"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a bad value: %v", err)
	}
	if want := []string{filepath.Join(first, "10.conflist"), filepath.Join(second, "20.conflist")}; !slices.Equal(a.Networks(), want) {
		t.Errorf("after a refusal %v are in force, want %v", a.Networks(), want)
	}
	if err := a.Reconfigure(Options{ConfDir: second, BinDirs: []string{binDir(dir)}, MaxConfNum: 1, IPPref: "ipv6"}); err != nil {
		t.Fatal(err)
	}
	if want := []string{filepath.Join(second, "20.conflist")}; !slices.Equal(a.Networks(), want) {
		t.Errorf("in force are %v, want %v", a.Networks(), want)
	}
	if a.now.Load().main != same {
		t.Error("a folder that stays is not taken over")
	}
	// The folder that was left may break, and nobody cares.
	write(t, filepath.Join(first, "10.conflist"), "{", 0o644)
	a.Reload()
	if err := a.LoadError(); err != nil {
		t.Errorf("a folder that was left is read: %v", err)
	}
	next := newPod(t, "after")
	now, err := a.Attach(t.Context(), next)
	if err != nil {
		t.Fatal(err)
	}
	if !was.IPs[0].Is4() || !now.IPs[0].Is6() || !netip.MustParsePrefix("fd13:39::/64").Contains(now.IPs[0]) {
		t.Errorf("addresses were %v and are %v", was.IPs, now.IPs)
	}
	for _, p := range []string{"reconfigured", "after"} {
		if r.ID = p; p == "after" {
			r = next
		}
		if err := a.Detach(t.Context(), r); err != nil {
			t.Errorf("detach %s: %v", p, err)
		}
	}
	if left, err := a.Allocations(t.Context()); err != nil || len(left) != 0 {
		t.Errorf("left are %v, %v", left, err)
	}
}

// The file of a template follows the template.
func TestReconfigureTemplate(t *testing.T) {
	dir := t.TempDir()
	list := `{"cniVersion": "1.0.0", "name": "%s", "plugins": [{"type": "ptp", "ipam": {"type": "host-local", "subnet": "{{.PodCIDR}}"}}]}`
	for _, name := range []string{"one", "two"} {
		write(t, filepath.Join(dir, name), fmt.Sprintf(list, name), 0o644)
	}
	a := start(t, dir, func(o *Options) { o.ConfTemplate = filepath.Join(dir, "one") })
	defer a.Close()
	if err := a.SetPodRanges([]netip.Prefix{netip.MustParsePrefix("10.1.0.0/24")}); err != nil {
		t.Fatal(err)
	}
	o := Options{ConfDir: confDir(dir), BinDirs: []string{binDir(dir)}, MaxConfNum: 1, ConfTemplate: filepath.Join(dir, "two")}
	if err := a.Reconfigure(o); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(confDir(dir), templateFile))
	if want := `{"cniVersion": "1.0.0", "name": "two", "plugins": [{"type": "ptp", "ipam": {"type": "host-local", "subnet": "10.1.0.0/24"}}]}`; err != nil || string(b) != want {
		t.Errorf("got %s, %v", b, err)
	}
}
