package link_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"

	"cloister.dev/internal/network/link"
	"cloister.dev/internal/network/networktest"
)

func TestMain(m *testing.M) { networktest.Main(m) }

func self(t testing.TB) string {
	t.Helper()
	s, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestDo looks for threads that stayed in a foreign namespace.
func TestDo(t *testing.T) {
	networktest.RequireNode(t)
	home := self(t)
	ns := networktest.NewNetNS(t)
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			boom := errors.New("boom")
			err := ns.Do(func() error {
				if s, err := os.Readlink("/proc/thread-self/ns/net"); err != nil || s == home {
					return fmt.Errorf("inside: %s, %v", s, err)
				}
				return boom
			})
			if !errors.Is(err, boom) {
				t.Errorf("%d: %v", i, err)
			}
			if s := self(t); s != home {
				t.Errorf("%d: outside: %s, want %s", i, s, home)
			}
		})
	}
	wg.Wait()
	tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		if s, err := os.Readlink(task); err == nil && s != home {
			t.Errorf("%s stayed in %s", task, s)
		}
	}
}

func TestOpenNetNS(t *testing.T) {
	networktest.RequireNode(t)
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"", "/nowhere", plain} {
		if _, err := link.OpenNetNS(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q: %v, want not exist", path, err)
		}
	}
	gone := networktest.NewNetNS(t)
	if err := gone.Do(func() error { return nil }); err != nil {
		t.Error(err)
	}
}

func TestNames(t *testing.T) {
	a, b := link.HostName("id", "eth0"), link.HostName("id", "eth1")
	if a == b || len(a) > 15 || len(link.IFBName("id", "eth0")) > 15 {
		t.Errorf("names %s, %s", a, b)
	}
	for addr, want := range map[string]string{"10.1.2.3": "0a:58:0a:01:02:03", "::ffff:10.1.2.3": "0a:58:0a:01:02:03"} {
		if got := link.MACFor(netip.MustParseAddr(addr)).String(); got != want {
			t.Errorf("%s: %s, want %s", addr, got, want)
		}
	}
}

func TestBucket(t *testing.T) {
	if _, err := link.Bucket(7, 0); !errdefs.IsInvalidArgument(err) {
		t.Errorf("less than a byte per second: %v", err)
	}
	b, err := link.Bucket(8_000_000, 800_000)
	if err != nil || b.Rate != 1_000_000 || b.Limit != 125_000 {
		t.Errorf("%+v, %v", b, err)
	}
}

func node(t testing.TB) *link.Node {
	t.Helper()
	networktest.RequireNode(t)
	n, err := link.Open(nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

func TestBridge(t *testing.T) {
	n := node(t)
	networktest.RemoveAfter(t, "clbr")
	c := link.BridgeConfig{Name: "clbr", Addrs: []netip.Prefix{netip.MustParsePrefix("10.3.0.1/24"), netip.MustParsePrefix("fd00:3::1/64")}}
	first, err := n.EnsureBridge(c)
	if err != nil || !first.Made {
		t.Fatalf("%+v, %v", first, err)
	}
	again, err := n.EnsureBridge(c)
	if err != nil || again.Made || again.MAC.String() != first.MAC.String() {
		t.Errorf("again: %+v, %v", again, err)
	}
	c.Addrs[0] = netip.MustParsePrefix("10.3.0.2/24")
	if _, err := n.EnsureBridge(c); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("another address: %v, want failed precondition", err)
	}
	c.ForceAddress = true
	if _, err := n.EnsureBridge(c); err != nil {
		t.Errorf("another address by force: %v", err)
	}
	l, err := netlink.LinkByName("clbr")
	if err != nil {
		t.Fatal(err)
	}
	addrs, err := netlink.AddrList(l, netlink.FAMILY_V4)
	if err != nil || len(addrs) != 1 || addrs[0].IP.String() != "10.3.0.2" {
		t.Errorf("addresses %v, %v", addrs, err)
	}
	if _, err := n.EnsureBridge(link.BridgeConfig{Name: "lo"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("lo as a bridge: %v, want failed precondition", err)
	}
}

// TestSweep is a process that died between cutting off and deleting.
func TestSweep(t *testing.T) {
	n := node(t)
	ns := networktest.NewNetNS(t)
	name := link.HostName("dead", "eth0")
	if _, err := n.AddVeth(ns, link.VethConfig{Host: name, Pod: "eth0"}); err != nil {
		t.Fatal(err)
	}
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	const graveyard = 0x636c7374
	if err := netlink.LinkSetGroup(l, graveyard); err != nil {
		t.Fatal(err)
	}
	next := node(t)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := next.Settle(ctx); err != nil {
		t.Fatal(err)
	}
	if there, err := n.Exists(name); err != nil || there {
		t.Errorf("%s is still there: %v", name, err)
	}
	if found, err := n.Remove(name); err != nil || found {
		t.Errorf("removal of what is gone: %v, %v", found, err)
	}
}
