package link

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// State is what an interface inside a namespace is like.
type State struct {
	Index       int
	Peer        int // index of the other end of a pair, on the node
	Up          bool
	MAC         net.HardwareAddr
	MTU         int
	TxQLen      int
	Promiscuous bool
	AllMulti    bool
	Addrs       []netip.Prefix
	Routes      []Route // of all interfaces
}

// Inspect looks at an interface; fs.ErrNotExist if there is none of the name.
func Inspect(ns *NetNS, name string) (State, error) {
	var st State
	err := ns.inside(func(h *netlink.Handle) error {
		l, err := h.LinkByName(name)
		if isNotFound(err) {
			return fmt.Errorf("interface %s: %w", name, fs.ErrNotExist)
		}
		if err != nil {
			return err
		}
		a := l.Attrs()
		st = State{
			Index: a.Index, Peer: a.ParentIndex, Up: a.Flags&net.FlagUp != 0, MAC: a.HardwareAddr, MTU: a.MTU, TxQLen: a.TxQLen,
			Promiscuous: a.Promisc != 0, AllMulti: a.RawFlags&unix.IFF_ALLMULTI != 0,
		}
		addrs, err := h.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return fmt.Errorf("list addresses of %s: %w", name, err)
		}
		for _, a := range addrs {
			if p, ok := prefixOf(a.IPNet); ok {
				st.Addrs = append(st.Addrs, p)
			}
		}
		routes, err := h.RouteList(nil, netlink.FAMILY_ALL)
		if err != nil {
			return fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			if dst, ok := prefixOf(r.Dst); ok {
				gw, _ := netip.AddrFromSlice(r.Gw)
				st.Routes = append(st.Routes, Route{Dst: dst, GW: gw.Unmap(), Priority: r.Priority})
			}
		}
		return nil
	})
	return st, err
}

// HasAddr tells whether the interface has the address.
func (s State) HasAddr(p netip.Prefix) bool { return slices.Contains(s.Addrs, p) }

// HasRoute tells whether a route to the destination goes over the gateway.
func (s State) HasRoute(want Route) bool {
	return slices.ContainsFunc(s.Routes, func(r Route) bool { return r.Dst == want.Dst && r.GW == want.GW })
}

// inside runs fn with a netlink handle of the namespace, on a thread in it.
func (n *NetNS) inside(fn func(*netlink.Handle) error) error {
	return n.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open rtnetlink: %w", err)
		}
		defer h.Close()
		if err := h.SetSocketTimeout(socketTime); err != nil {
			return fmt.Errorf("set rtnetlink time-out: %w", err)
		}
		return fn(h)
	})
}

// RemoveInside deletes an interface by its name in the namespace;
// fs.ErrNotExist if there is none.
func (n *Node) RemoveInside(ns *NetNS, name string) error {
	if n.Own(ns) {
		return fmt.Errorf("%s is the node's own network namespace: %w", ns.Path(), errdefs.ErrInvalidArgument)
	}
	return ns.inside(func(h *netlink.Handle) error {
		l, err := h.LinkByName(name)
		if isNotFound(err) {
			return fmt.Errorf("interface %s: %w", name, fs.ErrNotExist)
		}
		if err != nil {
			return fmt.Errorf("look up %s: %w", name, err)
		}
		if err := h.LinkDel(l); err != nil && !isNotFound(err) {
			return fmt.Errorf("delete %s: %w", name, err)
		}
		return nil
	})
}

// RouteToPod gives the node's end of a pair host addresses and routes to the
// pod's addresses over it.
func (n *Node) RouteToPod(host string, index int, own, pod []netip.Addr) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.Index = host, index
	l := &netlink.Device{LinkAttrs: attrs}
	for _, a := range own {
		addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, a.BitLen()))}
		if a.Is6() {
			addr.Flags = unix.IFA_F_NODAD
			if err := enableIPv6(host); err != nil {
				return fmt.Errorf("enable IPv6 on %s: %w", host, err)
			}
		}
		if err := n.h.AddrAdd(l, addr); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add address %s to %s: %w", a, host, err)
		}
	}
	for _, a := range pod {
		r := &netlink.Route{LinkIndex: index, Scope: netlink.SCOPE_LINK, Dst: ipNet(netip.PrefixFrom(a, a.BitLen()))}
		if err := n.h.RouteAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add route to %s over %s: %w", a, host, err)
		}
	}
	awaitHeard(host, own...)
	return nil
}

// Hairpin lets packets leave by the bridge port that they came in by, where
// that is how a pod reaches a port that it publishes itself: the node filters
// bridged packets (br_netfilter), and so rewrites them on the bridge. Anything
// but a bridge port is left alone.
func (n *Node) Hairpin(name string) error {
	on := false
	for _, key := range []string{"bridge-nf-call-iptables", "bridge-nf-call-ip6tables"} {
		b, err := os.ReadFile("/proc/sys/net/bridge/" + key)
		on = on || err == nil && len(b) > 0 && b[0] == '1'
	}
	if !on {
		return nil
	}
	l, err := n.h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("look up interface %s: %w", name, err)
	}
	if l.Attrs().MasterIndex == 0 {
		return nil
	}
	master, err := n.h.LinkByIndex(l.Attrs().MasterIndex)
	if err != nil {
		return fmt.Errorf("look up master of %s: %w", name, err)
	}
	if _, ok := master.(*netlink.Bridge); !ok {
		return nil
	}
	if err := n.h.LinkSetHairpin(l, true); err != nil {
		return fmt.Errorf("set hairpin on %s: %w", name, err)
	}
	return nil
}

// NameOf is the name of the node's interface of an index.
func (n *Node) NameOf(index int) (string, error) {
	l, err := n.h.LinkByIndex(index)
	if err != nil {
		return "", fmt.Errorf("look up interface %d: %w", index, err)
	}
	return l.Attrs().Name, nil
}

// MACOf is the hardware address of an interface of the node.
func (n *Node) MACOf(name string) (net.HardwareAddr, error) {
	l, err := n.h.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("look up interface %s: %w", name, err)
	}
	return l.Attrs().HardwareAddr, nil
}

// Buckets is the token bucket on an interface of the node, if any.
func (n *Node) Buckets(name string) (*netlink.Tbf, error) {
	l, err := n.h.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("look up interface %s: %w", name, err)
	}
	qs, err := n.h.QdiscList(l)
	if err != nil {
		return nil, fmt.Errorf("list queues of %s: %w", name, err)
	}
	for _, q := range qs {
		if tbf, ok := q.(*netlink.Tbf); ok {
			return tbf, nil
		}
	}
	return nil, fmt.Errorf("token bucket of %s: %w", name, fs.ErrNotExist)
}

// Tune changes attributes of an interface inside a namespace; nil and zero
// leave as it is.
type Tune struct {
	MAC         net.HardwareAddr
	MTU         int
	Promiscuous *bool
	AllMulti    *bool
	TxQLen      *int
	// Sysctls are files below /proc/sys/net with what to write.
	Sysctls map[string]string
}

// Apply changes the interface.
func (t Tune) Apply(ns *NetNS, name string) error {
	return ns.inside(func(h *netlink.Handle) error {
		for path, value := range t.Sysctls {
			if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
				return fmt.Errorf("set sysctl: %w", err)
			}
		}
		l, err := h.LinkByName(name)
		if isNotFound(err) {
			return fmt.Errorf("interface %s: %w", name, fs.ErrNotExist)
		}
		if err != nil {
			return fmt.Errorf("look up %s: %w", name, err)
		}
		var errs []error
		if t.MAC != nil {
			errs = append(errs, h.LinkSetHardwareAddr(l, t.MAC))
		}
		if t.MTU != 0 {
			errs = append(errs, h.LinkSetMTU(l, t.MTU))
		}
		if t.TxQLen != nil {
			errs = append(errs, h.LinkSetTxQLen(l, *t.TxQLen))
		}
		errs = append(errs,
			toggle(t.Promiscuous, l, h.SetPromiscOn, h.SetPromiscOff),
			toggle(t.AllMulti, l, h.LinkSetAllmulticastOn, h.LinkSetAllmulticastOff))
		if err := errors.Join(errs...); err != nil {
			return fmt.Errorf("tune %s: %w", name, err)
		}
		return nil
	})
}

func toggle(want *bool, l netlink.Link, on, off func(netlink.Link) error) error {
	switch {
	case want == nil:
		return nil
	case *want:
		return on(l)
	}
	return off(l)
}

// ReadSysctls reads files below /proc/sys/net as they are in the namespace.
func ReadSysctls(ns *NetNS, paths []string) (map[string]string, error) {
	out := map[string]string{}
	err := ns.Do(func() error {
		for _, p := range paths {
			b, err := os.ReadFile(p)
			if err != nil {
				return fmt.Errorf("read sysctl: %w", err)
			}
			out[p] = string(b)
		}
		return nil
	})
	return out, err
}
