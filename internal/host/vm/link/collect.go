package link

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Inspect collects what a guest is told, and changes nothing.
func Inspect(path string) (n Network, err error) {
	err = inside(path, func(h *netlink.Handle) error {
		links, err := interfaces(h)
		if err != nil {
			return err
		}
		n, err = collect(h, links)
		return err
	})
	return n, err
}

func collect(h *netlink.Handle, links []netlink.Link) (n Network, err error) {
	for _, l := range links {
		a := l.Attrs()
		i := Interface{Name: a.Name, MAC: a.HardwareAddr.String(), MTU: a.MTU}
		if i.Addrs, err = addresses(h, l); err != nil {
			return n, fmt.Errorf("list the addresses of %s: %w", a.Name, err)
		}
		n.Interfaces = append(n.Interfaces, i)
		routes, err := routes(h, l)
		if err != nil {
			return n, fmt.Errorf("list the routes over %s: %w", a.Name, err)
		}
		n.Routes = append(n.Routes, routes...)
		if n.Neighbours, err = neighbours(h, l, n.Neighbours); err != nil {
			return n, fmt.Errorf("list the neighbours on %s: %w", a.Name, err)
		}
	}
	// A gateway has to be reachable before a route over it can be added.
	slices.SortStableFunc(n.Routes, func(a, b Route) int { return rank(a) - rank(b) })
	return n, nil
}

func rank(r Route) int {
	if r.Gateway.IsValid() {
		return 1
	}
	return 0
}

// addresses leaves out those that every interface gives itself.
func addresses(h *netlink.Handle, l netlink.Link) ([]netip.Prefix, error) {
	list, err := h.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return nil, err
	}
	var all []netip.Prefix
	for _, a := range list {
		p, ok := prefix(a.IPNet)
		if ok && !(p.Addr().Is6() && p.Addr().IsLinkLocalUnicast()) {
			all = append(all, p)
		}
	}
	return all, nil
}

func routes(h *netlink.Handle, l netlink.Link) ([]Route, error) {
	filter := &netlink.Route{LinkIndex: l.Attrs().Index, Table: unix.RT_TABLE_MAIN}
	list, err := h.RouteListFiltered(netlink.FAMILY_ALL, filter, netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, err
	}
	var all []Route
	for _, r := range list {
		dst, ok := destination(r)
		if !ok || r.Type != unix.RTN_UNICAST || dst.Addr().IsMulticast() || dst.Addr().Is6() && dst.Addr().IsLinkLocalUnicast() {
			continue
		}
		route := Route{Interface: l.Attrs().Name, Dst: dst, Scope: uint8(r.Scope), Metric: r.Priority, MTU: r.MTU, OnLink: r.Flags&int(netlink.FLAG_ONLINK) != 0}
		route.Gateway, _ = address(r.Gw)
		route.Source, _ = address(r.Src)
		all = append(all, route)
	}
	return all, nil
}

// destination is where a route goes; none is everywhere, and the family then
// shows in the gateway.
func destination(r netlink.Route) (netip.Prefix, bool) {
	if r.Dst != nil {
		return prefix(r.Dst)
	}
	if r.Family == netlink.FAMILY_V6 || r.Family != netlink.FAMILY_V4 && len(r.Gw) == net.IPv6len && r.Gw.To4() == nil {
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0), true
	}
	return netip.PrefixFrom(netip.IPv4Unspecified(), 0), true
}

// neighbours adds the entries that somebody made on purpose.
func neighbours(h *netlink.Handle, l netlink.Link, all []Neighbour) ([]Neighbour, error) {
	list, err := h.NeighList(l.Attrs().Index, netlink.FAMILY_ALL)
	if err != nil {
		return all, err
	}
	for _, n := range list {
		addr, ok := address(n.IP)
		if ok && n.State&netlink.NUD_PERMANENT != 0 && len(n.HardwareAddr) == 6 && !addr.IsMulticast() {
			all = append(all, Neighbour{Interface: l.Attrs().Name, Addr: addr, MAC: n.HardwareAddr.String()})
		}
	}
	return all, nil
}

func address(ip net.IP) (netip.Addr, bool) {
	a, ok := netip.AddrFromSlice(ip)
	return a.Unmap(), ok
}

func prefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := address(n.IP)
	ones, bits := n.Mask.Size()
	return netip.PrefixFrom(a, ones), ok && bits == a.BitLen()
}
