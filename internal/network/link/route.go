package link

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Overlap reports a route of the node that would fight with a subnet on the
// interface own: one to part of the subnet, or a directly connected network
// that holds it. A wider route through some gateway is fine, the subnet is
// more particular.
func (n *Node) Overlap(subnet netip.Prefix, own string) error {
	family := netlink.FAMILY_V4
	if subnet.Addr().Is6() {
		family = netlink.FAMILY_V6
	}
	routes, err := n.h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		dst, ok := prefixOf(r.Dst)
		if !ok || dst.Bits() == 0 || !dst.Overlaps(subnet) {
			continue
		}
		connected := r.Gw == nil && len(r.MultiPath) == 0
		if dst.Bits() < subnet.Bits() && !connected {
			continue
		}
		name := fmt.Sprintf("interface %d", r.LinkIndex)
		if l, err := n.h.LinkByIndex(r.LinkIndex); err == nil {
			name = l.Attrs().Name
		}
		if name != own {
			return fmt.Errorf("subnet %s overlaps with %s, which the node reaches over %s: %w", subnet, dst, name, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// InterfaceTo names the interface over which the node reaches an address.
func (n *Node) InterfaceTo(a netip.Addr) (string, error) {
	routes, err := n.h.RouteGet(a.AsSlice())
	if err != nil {
		return "", fmt.Errorf("find route to %s: %w", a, err)
	}
	for _, r := range routes {
		if r.LinkIndex == 0 {
			continue
		}
		l, err := n.h.LinkByIndex(r.LinkIndex)
		if err != nil {
			return "", fmt.Errorf("find interface to %s: %w", a, err)
		}
		return l.Attrs().Name, nil
	}
	return "", fmt.Errorf("no route to %s: %w", a, errdefs.ErrNotFound)
}

// ForgetUDP drops the node's memory of UDP flows to one of its ports: a flow
// keeps the destination that it had when it began, and a client that never
// pauses would never reach a pod that publishes the port now.
func ForgetUDP(port uint16) error {
	var errs []error
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		f := &netlink.ConntrackFilter{}
		if err := errors.Join(f.AddProtocol(unix.IPPROTO_UDP), f.AddPort(netlink.ConntrackOrigDstPort, port)); err != nil {
			return err
		}
		if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, f); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
