package networktest

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"cloister.dev/internal/network"
	"cloister.dev/internal/network/link"
)

func testTraffic(e *env) {
	t := e.t
	a, b := e.attach("a"), e.attach("b")
	for _, ip := range []netip.Addr{b.ip4(), b.ip6()} {
		Echo(t, b.ns, "tcp", netip.AddrPortFrom(ip, 8080).String())
	}
	for _, ip := range []netip.Addr{OutsideIP4, OutsideIP6} {
		Echo(t, e.outside, "tcp", netip.AddrPortFrom(ip, 9000).String())
	}
	for _, hop := range []struct {
		name string
		from *link.NetNS
		to   netip.AddrPort
		seen netip.Addr // zero: any
	}{
		{"pod to pod", a.ns, netip.AddrPortFrom(b.ip4(), 8080), a.ip4()},
		{"pod to pod, IPv6", a.ns, netip.AddrPortFrom(b.ip6(), 8080), a.ip6()},
		{"node to pod", nil, netip.AddrPortFrom(b.ip4(), 8080), netip.Addr{}},
		{"node to pod, IPv6", nil, netip.AddrPortFrom(b.ip6(), 8080), netip.Addr{}},
		{"pod to outside", a.ns, netip.AddrPortFrom(OutsideIP4, 9000), NodeIP4},
		{"pod to outside, IPv6", a.ns, netip.AddrPortFrom(OutsideIP6, 9000), NodeIP6},
	} {
		start := time.Now()
		if seen := Reach(t, hop.from, "tcp", hop.to.String()); hop.seen.IsValid() && seen != hop.seen {
			t.Errorf("%s: seen as %s, want %s", hop.name, seen, hop.seen)
		}
		if d := time.Since(start); d > 900*time.Millisecond {
			t.Errorf("%s: the first packet took %s: something waits for address detection or lost it", hop.name, d)
		}
	}
}

func testPorts(e *env) {
	t := e.t
	server := e.attach("server", network.PortMapping{Protocol: "tcp", ContainerPort: 8080, HostPort: 18080})
	other := e.attach("other")
	for _, ip := range []netip.Addr{server.ip4(), server.ip6()} {
		Echo(t, server.ns, "tcp", netip.AddrPortFrom(ip, 8080).String())
	}
	for _, c := range []struct {
		name string
		from *link.NetNS
		to   netip.Addr
		seen netip.Addr // zero: any
	}{
		{"node over 127.0.0.1", nil, netip.MustParseAddr("127.0.0.1"), netip.Addr{}},
		{"node over its address", nil, NodeIP4, netip.Addr{}},
		{"node over its IPv6 address", nil, NodeIP6, netip.Addr{}},
		{"outside", e.outside, NodeIP4, OutsideIP4},
		{"outside, IPv6", e.outside, NodeIP6, OutsideIP6},
		{"other pod", other.ns, NodeIP4, netip.Addr{}},
		{"other pod, IPv6", other.ns, NodeIP6, netip.Addr{}},
		{"itself", server.ns, NodeIP4, netip.Addr{}},
		{"itself, IPv6", server.ns, NodeIP6, netip.Addr{}},
	} {
		seen, err := TryReach(c.from, "tcp", netip.AddrPortFrom(c.to, 18080).String(), 2*time.Second)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
		} else if c.seen.IsValid() && seen != c.seen {
			t.Errorf("%s: seen as %s, want %s", c.name, seen, c.seen)
		}
	}
	e.detach(server)
	if _, err := TryReach(nil, "tcp", netip.AddrPortFrom(NodeIP4, 18080).String(), time.Second); err == nil {
		t.Error("port still leads to the pod after Detach")
	}
}

func testPortsUDP(e *env) {
	t := e.t
	server := e.attach("udp", network.PortMapping{Protocol: "udp", ContainerPort: 53, HostPort: 10053})
	Echo(t, server.ns, "udp", netip.AddrPortFrom(server.ip4(), 53).String())
	for _, to := range []string{"127.0.0.1:10053", NodeIP4.String() + ":10053"} {
		if _, err := TryReach(nil, "udp", to, 2*time.Second); err != nil {
			t.Errorf("from the node to %s: %v", to, err)
		}
	}
	if _, err := TryReach(e.outside, "udp", NodeIP4.String()+":10053", 2*time.Second); err != nil {
		t.Errorf("from outside: %v", err)
	}
	if _, err := TryReach(nil, "tcp", "127.0.0.1:10053", time.Second); err == nil {
		t.Error("a UDP port is reachable by TCP")
	}
}

func testPortsHostIP(e *env) {
	t := e.t
	server := e.attach("hostip",
		network.PortMapping{Protocol: "tcp", ContainerPort: 8080, HostPort: 18081, HostIP: netip.MustParseAddr("127.0.0.1")},
		network.PortMapping{Protocol: "tcp", ContainerPort: 8080, HostPort: 18082, HostIP: netip.IPv4Unspecified()})
	Echo(t, server.ns, "tcp", netip.AddrPortFrom(server.ip4(), 8080).String())
	Reach(t, nil, "tcp", "127.0.0.1:18081")
	Reach(t, nil, "tcp", "127.0.0.1:18082")
	Reach(t, e.outside, "tcp", NodeIP4.String()+":18082")
	if _, err := TryReach(e.outside, "tcp", NodeIP4.String()+":18081", time.Second); err == nil {
		t.Error("a port published at 127.0.0.1 is reachable from outside")
	}
}

func testBandwidth(e *env) {
	t := e.t
	r := e.request("limited")
	r.Bandwidth = &network.Bandwidth{IngressRate: 80_000_000, EgressRate: 40_000_000}
	p := e.attachRequest(r)
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	rates := map[string]uint64{}
	for _, l := range links {
		qs, err := netlink.QdiscList(l)
		if err != nil {
			t.Fatal(err)
		}
		for _, q := range qs {
			if tbf, ok := q.(*netlink.Tbf); ok {
				rates[l.Type()] = tbf.Rate
			}
		}
	}
	if rates["veth"] != 10_000_000 || rates["ifb"] != 5_000_000 {
		t.Errorf("rates in bytes per second %v, want veth 10 M, ifb 5 M", rates)
	}
	Echo(t, e.outside, "tcp", netip.AddrPortFrom(OutsideIP4, 9000).String())
	Reach(t, p.ns, "tcp", netip.AddrPortFrom(OutsideIP4, 9000).String())
	e.detach(p)
	e.settle()
	for _, l := range must(netlink.LinkList())(t) {
		if strings.HasPrefix(l.Attrs().Name, "ifb") && rates[l.Type()] != 0 && l.Attrs().Name != "ifb0" && l.Attrs().Name != "ifb1" {
			t.Errorf("%s stays", l.Attrs().Name)
		}
	}
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}
