package builtin

import (
	"context"
	"errors"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"

	"cloister.dev/internal/network"
	"cloister.dev/internal/network/networktest"
)

func TestMain(m *testing.M) { networktest.Main(m) }

var (
	subnets = []netip.Prefix{netip.MustParsePrefix("10.213.0.0/16"), netip.MustParsePrefix("fd13:37::/64")}
	others  = []netip.Prefix{netip.MustParsePrefix("10.212.0.0/16"), netip.MustParsePrefix("fd13:36::/64")}
)

func start(t testing.TB, o Options) *Attacher {
	t.Helper()
	networktest.RemoveAfter(t, o.Bridge)
	a, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func subject() networktest.Subject {
	return networktest.Subject{
		Bridge: "cltest0",
		Open: func(t testing.TB, dir string) network.Attacher {
			return start(t, Options{Bridge: "cltest0", StateDir: dir, HostPorts: true, Subnets: subnets})
		},
	}
}

func TestSuite(t *testing.T) { networktest.Run(t, subject()) }

// TestSuiteDropping runs on a node that drops what it forwards.
func TestSuiteDropping(t *testing.T) {
	networktest.RequireNode(t)
	networktest.DropForwarded(t)
	networktest.Run(t, subject())
}

func BenchmarkAttach(b *testing.B) { networktest.Benchmark(b, subject()) }

func attach(t testing.TB, a *Attacher, id string, ports ...network.PortMapping) (network.Request, netip.Addr) {
	t.Helper()
	ns := networktest.NewNetNS(t)
	r := network.Request{ID: id, NetNS: ns.Path(), Ports: ports}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	res, err := a.Attach(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	networktest.Echo(t, ns, "tcp", netip.AddrPortFrom(res.IPs[0], 80).String())
	return r, res.IPs[0]
}

func TestSideBySide(t *testing.T) {
	networktest.RequireNode(t)
	ctx := context.Background()
	a := start(t, Options{Bridge: "cltest4", StateDir: t.TempDir(), HostPorts: true, Subnets: subnets})
	b := start(t, Options{Bridge: "cltest5", StateDir: t.TempDir(), HostPorts: true, Subnets: others})
	ra, _ := attach(t, a, "one", network.PortMapping{Protocol: "tcp", HostPort: 8001, ContainerPort: 80})
	rb, ipb := attach(t, b, "two", network.PortMapping{Protocol: "tcp", HostPort: 8002, ContainerPort: 80})
	networktest.Reach(t, nil, "tcp", "127.0.0.1:8001")
	networktest.Reach(t, nil, "tcp", "127.0.0.1:8002")
	if err := errors.Join(a.Detach(ctx, ra), a.Close()); err != nil {
		t.Fatal(err)
	}
	networktest.Reach(t, nil, "tcp", netip.AddrPortFrom(ipb, 80).String())
	networktest.Reach(t, nil, "tcp", "127.0.0.1:8002")
	if err := errors.Join(b.Detach(ctx, rb), b.Close()); err != nil {
		t.Fatal(err)
	}
}

func TestPortTaken(t *testing.T) {
	networktest.RequireNode(t)
	a := start(t, Options{Bridge: "cltest4", StateDir: t.TempDir(), HostPorts: true, Subnets: subnets})
	defer a.Close()
	port := network.PortMapping{Protocol: "tcp", HostPort: 8003, ContainerPort: 80}
	first, _ := attach(t, a, "first", port)
	second := network.Request{ID: "second", NetNS: networktest.NewNetNS(t).Path(), Ports: []network.PortMapping{port}}
	if _, err := a.Attach(context.Background(), second); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), "first") || !strings.Contains(err.Error(), "8003") {
		t.Errorf("second: %v, want already exists that names port and owner", err)
	}
	networktest.Reach(t, nil, "tcp", "127.0.0.1:8003")
	if err := a.Detach(context.Background(), first); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Attach(context.Background(), second); err != nil {
		t.Errorf("second, when the first is gone: %v", err)
	}
	if err := a.Detach(context.Background(), second); err != nil {
		t.Error(err)
	}
}

// TestCloseLeavesNothing is about instances that come and go, as those of tests
// and of single commands do.
func TestCloseLeavesNothing(t *testing.T) {
	networktest.RequireNode(t)
	before := networktest.TakeTrace(t)
	a := start(t, Options{Bridge: "cltest8", StateDir: t.TempDir(), HostPorts: true, Subnets: subnets})
	r, _ := attach(t, a, "one", network.PortMapping{Protocol: "tcp", HostPort: 8005, ContainerPort: 80})
	if err := errors.Join(a.Detach(context.Background(), r), a.Close()); err != nil {
		t.Fatal(err)
	}
	// Fewer there may be: the kernel ends namespaces of other tests late.
	if after := networktest.TakeTrace(t); after.Links > before.Links || after.Elements > before.Elements || after.Rules > before.Rules {
		t.Errorf("after: %+v, before: %+v", after, before)
	}
}

func TestOverlap(t *testing.T) {
	networktest.RequireNode(t)
	networktest.Outside(t) // the node is in 192.0.2.0/24
	a := start(t, Options{Bridge: "cltest6", StateDir: t.TempDir(), Subnets: []netip.Prefix{netip.MustParsePrefix("192.0.0.0/16")}})
	defer a.Close()
	_, attachErr := a.Attach(context.Background(), network.Request{ID: "x", NetNS: networktest.NewNetNS(t).Path()})
	for _, err := range []error{a.Ready(), attachErr} {
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "192.0.2.0/24") || !strings.Contains(err.Error(), "outside") {
			t.Errorf("%v, want failed precondition that names route and interface", err)
		}
	}
	if _, err := netlink.LinkByName("cltest6"); err == nil {
		t.Error("the bridge was made nevertheless")
	}
}

// TestSubnetChanges detaches what was attached in another subnet.
func TestSubnetChanges(t *testing.T) {
	networktest.RequireNode(t)
	ctx, dir := context.Background(), t.TempDir()
	a := start(t, Options{Bridge: "cltest7", StateDir: dir, HostPorts: true, Subnets: subnets})
	r, _ := attach(t, a, "old", network.PortMapping{Protocol: "tcp", HostPort: 8004, ContainerPort: 80})
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	a = start(t, Options{Bridge: "cltest7", StateDir: dir, HostPorts: true, Subnets: others})
	defer a.Close()
	if err := a.Detach(ctx, r); err != nil {
		t.Fatal(err)
	}
	if n, err := a.rules.Count(ctx); err != nil || n != 0 {
		t.Errorf("%d elements left, %v", n, err)
	}
}

func TestOptions(t *testing.T) {
	dir := t.TempDir()
	for name, o := range map[string]Options{
		"long name":     {Bridge: "a-name-that-is-too-long", StateDir: dir},
		"slash":         {Bridge: "a/b", StateDir: dir},
		"no folder":     {},
		"relative":      {StateDir: filepath.Base(dir)},
		"no room":       {StateDir: dir, Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/31")}},
		"not valid":     {StateDir: dir, Subnets: []netip.Prefix{{}}},
		"two of a kind": {StateDir: dir, Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("10.1.0.0/24")}},
	} {
		if _, err := New(o); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v, want invalid argument", name, err)
		}
	}
}

func TestHostPortsOff(t *testing.T) {
	networktest.RequireNode(t)
	a := start(t, Options{Bridge: "cltest4", StateDir: t.TempDir(), Subnets: subnets})
	defer a.Close()
	_, err := a.Attach(context.Background(), network.Request{
		ID: "x", NetNS: networktest.NewNetNS(t).Path(), Ports: []network.PortMapping{{Protocol: "tcp", HostPort: 1, ContainerPort: 1}},
	})
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("%v, want failed precondition", err)
	}
}
