package guest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"cloister.dev/internal/host/vm/link"
)

// applyNetwork makes the machine's interfaces those that the pod's namespace
// had outside.
func applyNetwork(n link.Network) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE) // one socket for everything
	if err != nil {
		return fmt.Errorf("talk to the kernel about the network: %w", err)
	}
	defer h.Close()
	if err := h.LinkSetUp(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: loopback}}); err != nil {
		return fmt.Errorf("bring the loopback interface up: %w", err)
	}
	byMAC, err := interfaces()
	if err != nil {
		return fmt.Errorf("list the interfaces: %w", err)
	}
	index := map[string]int{}
	for _, i := range n.Interfaces {
		l, ok := byMAC[strings.ToLower(i.MAC)]
		if !ok {
			return fmt.Errorf("the machine has no interface with the address %s (%s): %w", i.MAC, i.Name, errdefs.ErrNotFound)
		}
		if err := applyInterface(h, l, i); err != nil {
			return fmt.Errorf("set interface %s up: %w", i.Name, err)
		}
		index[i.Name] = l.Attrs().Index
	}
	for _, r := range n.Routes {
		if err := applyRoute(h, r, index[r.Interface]); err != nil {
			return fmt.Errorf("add the route to %s by %s: %w", r.Dst, r.Interface, err)
		}
	}
	for _, nb := range n.Neighbours {
		mac, err := net.ParseMAC(nb.MAC)
		if err != nil {
			return fmt.Errorf("neighbour %s: %w", nb.Addr, err)
		}
		if err := h.NeighSet(&netlink.Neigh{LinkIndex: index[nb.Interface], IP: nb.Addr.AsSlice(), HardwareAddr: mac,
			State: netlink.NUD_PERMANENT}); err != nil {
			return fmt.Errorf("add neighbour %s: %w", nb.Addr, err)
		}
	}
	return nil
}

// loopback is the number of every namespace's loopback interface.
const loopback = 1

// interfacesDir has a folder for each interface.
const interfacesDir = "/sys/class/net"

// interfaces gives the machine's interfaces by their hardware addresses, with
// name, number and MTU. The kernel's answer to netlink's question has all of
// them with dozens of attributes, which an emulated machine decodes for 10 ms.
func interfaces() (map[string]*netlink.Device, error) {
	entries, err := os.ReadDir(interfacesDir)
	if err != nil {
		return nil, err
	}
	all := map[string]*netlink.Device{}
	for _, e := range entries {
		dir := filepath.Join(interfacesDir, e.Name())
		mac, err := os.ReadFile(filepath.Join(dir, "address"))
		if err != nil {
			continue // not an interface
		}
		d := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: e.Name()}}
		for file, n := range map[string]*int{"ifindex": &d.Index, "mtu": &d.MTU} {
			b, err := os.ReadFile(filepath.Join(dir, file))
			if err != nil {
				return nil, err
			}
			if *n, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
				return nil, fmt.Errorf("%s of %s: %w", file, e.Name(), err)
			}
		}
		all[strings.TrimSpace(string(mac))] = d
	}
	return all, nil
}

func applyInterface(h *netlink.Handle, l netlink.Link, i link.Interface) error {
	if l.Attrs().Name != i.Name {
		if err := h.LinkSetName(l, i.Name); err != nil {
			return err
		}
	}
	if i.MTU > 0 && i.MTU != l.Attrs().MTU {
		if err := h.LinkSetMTU(l, i.MTU); err != nil {
			return err
		}
	}
	// Before the interface comes up: the addresses were checked outside.
	dad := fmt.Sprintf("/proc/sys/net/ipv6/conf/%s/accept_dad", i.Name)
	if err := os.WriteFile(dad, []byte("0"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := h.LinkSetUp(l); err != nil {
		return err
	}
	for _, a := range i.Addrs {
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())}}
		if a.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := h.AddrReplace(l, addr); err != nil {
			return fmt.Errorf("address %s: %w", a, err)
		}
	}
	return nil
}

func applyRoute(h *netlink.Handle, r link.Route, index int) error {
	route := &netlink.Route{LinkIndex: index, Scope: netlink.Scope(r.Scope), Priority: r.Metric, MTU: r.MTU,
		Dst: &net.IPNet{IP: r.Dst.Addr().AsSlice(), Mask: net.CIDRMask(r.Dst.Bits(), r.Dst.Addr().BitLen())}}
	if r.Gateway.IsValid() {
		route.Gw = r.Gateway.AsSlice()
	}
	if r.Source.IsValid() {
		route.Src = r.Source.AsSlice()
	}
	if r.OnLink {
		route.Flags = int(netlink.FLAG_ONLINK)
	}
	return h.RouteReplace(route)
}
