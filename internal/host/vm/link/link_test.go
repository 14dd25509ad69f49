package link_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"cloister.dev/internal/host/vm/link"
	"cloister.dev/internal/host/vm/machine"
	"cloister.dev/internal/host/vm/vmtest"
	"cloister.dev/internal/osutil"
)

const (
	podAddr, podAddr6   = "10.211.7.2/24", "fd00:7::2/64"
	nodeAddr, nodeAddr6 = "10.211.7.1/24", "fd00:7::1/64"
	podMAC              = "02:00:00:00:07:02"
)

func pinned(t *testing.T, name string, setup func() error) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err := osutil.OnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if err := unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), path, "", unix.MS_BIND, ""); err != nil {
			return err
		}
		return setup()
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
	return path
}

// in runs f in a namespace.
func in(t *testing.T, path string, f func() error) {
	t.Helper()
	err := osutil.OnThread(func() error {
		ns, err := os.Open(path)
		if err != nil {
			return err
		}
		defer ns.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return f()
	})
	if err != nil {
		t.Fatal(err)
	}
}

func address(l netlink.Link, text string) error {
	a, err := netlink.ParseAddr(text)
	if err != nil {
		return err
	}
	a.Flags = unix.IFA_F_NODAD
	return netlink.AddrAdd(l, a)
}

// newPod makes both namespaces and gives their paths.
func newPod(t *testing.T, mtu int) (pod, node string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("namespaces are made by root")
	}
	pod = pinned(t, "pod", func() error { return nil })
	node = pinned(t, "node", func() error {
		ns, err := os.Open(pod)
		if err != nil {
			return err
		}
		defer ns.Close()
		mac, _ := net.ParseMAC(podMAC)
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = "veth0", mtu
		v := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerHardwareAddr: mac, PeerNamespace: netlink.NsFd(ns.Fd())}
		if err := netlink.LinkAdd(v); err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetUp(v), address(v, nodeAddr), address(v, nodeAddr6))
	})
	in(t, pod, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := errors.Join(netlink.LinkSetUp(lo), netlink.LinkSetMTU(l, mtu), netlink.LinkSetUp(l), address(l, podAddr), address(l, podAddr6)); err != nil {
			return err
		}
		mac, _ := net.ParseMAC("02:00:00:00:07:09")
		return errors.Join(
			netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.ParseIP("10.211.7.1")}),
			netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.ParseIP("fd00:7::1")}),
			netlink.NeighSet(&netlink.Neigh{LinkIndex: l.Attrs().Index, IP: net.ParseIP("10.211.7.9"), HardwareAddr: mac, State: netlink.NUD_PERMANENT}))
	})
	return pod, node
}

func TestInspect(t *testing.T) {
	pod, _ := newPod(t, 1400)
	got, err := link.Inspect(pod)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Interfaces) != 1 {
		t.Fatalf("interfaces: %+v", got.Interfaces)
	}
	want := link.Interface{Name: "eth0", MAC: podMAC, MTU: 1400, Addrs: []netip.Prefix{netip.MustParsePrefix(podAddr), netip.MustParsePrefix(podAddr6)}}
	if !reflect.DeepEqual(got.Interfaces[0], want) {
		t.Errorf("interface %+v, want %+v", got.Interfaces[0], want)
	}
	defaults := 0
	for i, r := range got.Routes {
		if r.Dst.Bits() == 0 {
			defaults++
			if !r.Gateway.IsValid() || r.Interface != "eth0" || i < 2 {
				t.Errorf("route %d: %+v", i, r)
			}
		}
	}
	if defaults != 2 {
		t.Errorf("%d default routes in %+v", defaults, got.Routes)
	}
	if len(got.Neighbours) != 1 || got.Neighbours[0] != (link.Neighbour{Interface: "eth0", Addr: netip.MustParseAddr("10.211.7.9"), MAC: "02:00:00:00:07:09"}) {
		t.Errorf("neighbours %+v", got.Neighbours)
	}
	if _, err := link.Inspect("/nowhere/at/all"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent namespace: %v", err)
	}
	if err := link.Detach("/nowhere/at/all"); err != nil {
		t.Errorf("detach an absent namespace: %v", err)
	}
}

// TestTraffic: the guest stands in for the pod, both ways, and a second one
// after the first.
func TestTraffic(t *testing.T) {
	pod, node := newPod(t, 1400)
	c := vmtest.Config(t, machine.Microvm)
	r := vmtest.Reaper(t)
	greet(t, node, "10.211.7.1:7001")
	for range 2 {
		c.Dir = vmtest.Dir(t)
		a, err := link.Attach(pod)
		if err != nil {
			t.Fatal(err)
		}
		if len(a.Taps) != 1 || a.Taps[0].MAC != podMAC || len(a.Network.Interfaces) != 1 {
			t.Fatalf("attached: %+v", a)
		}
		c.NICs = []machine.NIC{{MAC: a.Taps[0].MAC, Tap: a.Taps[0].File}}
		s := vmtest.Boot(t, r, c)
		a.Close()
		s.Must("net", podMAC, "1400", podAddr, "10.211.7.1")
		s.Must("listen", ":7000")
		in(t, node, func() error {
			c, err := net.DialTimeout("tcp", "10.211.7.2:7000", 20*time.Second)
			if err != nil {
				return err
			}
			defer c.Close()
			b, err := io.ReadAll(c)
			if string(b) != "hello from the guest" {
				return fmt.Errorf("the guest says %q: %w", b, err)
			}
			return nil
		})
		if got := s.Must("dial", "10.211.7.1:7001"); got != "hello from the node" {
			t.Errorf("the node says %q", got)
		}
		if err := s.Machine.Kill(context.Background()); err != nil {
			t.Fatal(err)
		}
		in(t, pod, func() error {
			all, err := netlink.LinkList()
			if len(all) != 2 {
				return fmt.Errorf("the pod has the interfaces %v: %w", all, err)
			}
			return nil
		})
	}
	if err := link.Detach(pod); err != nil {
		t.Fatal(err)
	}
	// The namespace is the pod's own again.
	greet(t, pod, "10.211.7.2:7002")
	in(t, node, func() error {
		c, err := net.DialTimeout("tcp", "10.211.7.2:7002", 10*time.Second)
		if err == nil {
			c.Close()
		}
		return err
	})
}

// greet serves one connection in a namespace.
func greet(t *testing.T, ns, addr string) {
	t.Helper()
	in(t, ns, func() error {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				io.WriteString(c, "hello from the node")
				c.Close()
			}
		}()
		return nil
	})
}
