package link

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// BridgeConfig says what a bridge has to be.
type BridgeConfig struct {
	Name          string
	MTU           int // 0: the kernel's default
	Promiscuous   bool
	VLANFiltering bool
	Addrs         []netip.Prefix // the bridge's own addresses: the pods' gateways
	// ForceAddress removes addresses that differ from Addrs in the same subnet
	// instead of refusing.
	ForceAddress bool
}

// Bridge is a bridge that was found or made.
type Bridge struct {
	Name  string
	Index int
	MTU   int
	MAC   net.HardwareAddr
	Made  bool // by this call
	// Up tells whether packets pass; without a port they do not.
	Up    bool
	Addrs []netip.Addr // as configured
}

// EnsureBridge makes the bridge as configured, or brings an existing one up to
// it. On a bridge that is as it has to be it costs one message, and one for
// each address.
func (n *Node) EnsureBridge(c BridgeConfig) (Bridge, error) {
	br, made, err := n.findBridge(c)
	if err != nil {
		return Bridge{}, err
	}
	if c.Promiscuous && br.Promisc == 0 {
		if err := n.h.SetPromiscOn(br); err != nil {
			return Bridge{}, fmt.Errorf("set bridge %s promiscuous: %w", c.Name, err)
		}
	}
	if br.Flags&net.FlagUp == 0 {
		if err := n.h.LinkSetUp(br); err != nil {
			return Bridge{}, fmt.Errorf("set bridge %s up: %w", c.Name, err)
		}
	}
	for _, a := range c.Addrs {
		if err := n.ensureAddr(br, a, c.ForceAddress); err != nil {
			return Bridge{}, err
		}
	}
	var own []netip.Addr
	for _, a := range c.Addrs {
		own = append(own, a.Addr())
	}
	return Bridge{Name: c.Name, Addrs: own, Index: br.Index, MTU: br.MTU, MAC: br.HardwareAddr, Made: made, Up: br.OperState == netlink.OperUp}, nil
}

func (n *Node) findBridge(c BridgeConfig) (br *netlink.Bridge, made bool, err error) {
	l, err := n.h.LinkByName(c.Name)
	if isNotFound(err) {
		if err := n.makeBridge(c); err != nil {
			return nil, false, err
		}
		made = true
		l, err = n.h.LinkByName(c.Name)
	}
	if err != nil {
		return nil, false, fmt.Errorf("look up bridge %s: %w", c.Name, err)
	}
	br, ok := l.(*netlink.Bridge)
	if !ok {
		return nil, false, fmt.Errorf("interface %s exists but is a %s, not a bridge: %w", c.Name, l.Type(), errdefs.ErrFailedPrecondition)
	}
	return br, made, nil
}

func (n *Node) makeBridge(c BridgeConfig) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = c.Name
	attrs.MTU = c.MTU
	// An address of its own keeps the bridge from taking that of its lowest
	// port, which would change as pods come and go.
	attrs.HardwareAddr = randomMAC()
	br := &netlink.Bridge{LinkAttrs: attrs}
	if c.VLANFiltering {
		br.VlanFiltering = &c.VLANFiltering
	}
	if err := n.h.LinkAdd(br); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add bridge %s: %w", c.Name, err)
	}
	// The node routes here and must not learn routes from pods. Nobody else can
	// have the link-local address, and until it is known to be free the node
	// asks for no neighbour: a second or two. Absent where the kernel has no
	// IPv6.
	for _, key := range []string{"accept_ra", "accept_dad"} {
		path := "/proc/sys/net/ipv6/conf/" + c.Name + "/" + key
		if err := os.WriteFile(path, []byte("0"), 0o644); err != nil && !os.IsNotExist(err) {
			n.log.Warn("bridge keeps a default of IPv6", "bridge", c.Name, "sysctl", key, "err", err)
		}
	}
	return nil
}

// RemoveBridge deletes a bridge that has no ports; another one stays, and a
// missing one is fine.
func (n *Node) RemoveBridge(name string) error {
	l, err := n.h.LinkByName(name)
	if isNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look up bridge %s: %w", name, err)
	}
	all, err := n.h.LinkList()
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	for _, other := range all {
		if other.Attrs().MasterIndex == l.Attrs().Index {
			return nil
		}
	}
	if _, ok := l.(*netlink.Bridge); !ok {
		return nil
	}
	return deleteLink(name)
}

// ensureAddr adds first and asks questions only when the address was new: this
// is one message in the common case, however many addresses the node has.
func (n *Node) ensureAddr(br *netlink.Bridge, want netip.Prefix, force bool) error {
	addr := &netlink.Addr{IPNet: ipNet(want)}
	if want.Addr().Is6() {
		addr.Flags = unix.IFA_F_NODAD
		if err := enableIPv6(br.Name); err != nil {
			return fmt.Errorf("enable IPv6 on bridge %s: %w", br.Name, err)
		}
	}
	err := n.h.AddrAdd(br, addr)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("add address %s to bridge %s: %w", want, br.Name, err)
	}
	family := netlink.FAMILY_V4
	if want.Addr().Is6() {
		family = netlink.FAMILY_V6
	}
	have, err := n.h.AddrList(br, family)
	if err != nil {
		return fmt.Errorf("list addresses of bridge %s: %w", br.Name, err)
	}
	replaced := false
	for i := range have {
		p, ok := prefixOf(have[i].IPNet)
		if !ok || p == want {
			continue
		}
		// Several IPv6 addresses live side by side unless their subnets do.
		if family == netlink.FAMILY_V6 && !p.Overlaps(want) {
			continue
		}
		if !force {
			undo := n.h.AddrDel(br, addr)
			return errors.Join(fmt.Errorf("bridge %s already has the address %s, which differs from %s: remove it, or set forceAddress: %w",
				br.Name, p, want, errdefs.ErrFailedPrecondition), undo)
		}
		if err := n.h.AddrDel(br, &have[i]); err != nil {
			return fmt.Errorf("remove address %s from bridge %s: %w", p, br.Name, err)
		}
		replaced = true
	}
	if replaced { // the kernel takes the others of the subnet along with the first
		if err := n.h.AddrAdd(br, addr); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add address %s to bridge %s: %w", want, br.Name, err)
		}
	}
	// A bridge that somebody else made may have no address of its own yet.
	if err := n.h.LinkSetHardwareAddr(br, br.HardwareAddr); err != nil {
		return fmt.Errorf("fix hardware address of bridge %s: %w", br.Name, err)
	}
	return nil
}

func enableIPv6(iface string) error {
	err := ensureSysctl("/proc/sys/net/ipv6/conf/"+iface+"/disable_ipv6", "0")
	if os.IsNotExist(err) {
		return fmt.Errorf("the kernel has no IPv6: %w", errdefs.ErrFailedPrecondition)
	}
	return err
}

func randomMAC() net.HardwareAddr {
	mac := make(net.HardwareAddr, 6)
	_, _ = rand.Read(mac) // never fails since Go 1.24
	mac[0] = mac[0]&^1 | 2
	return mac
}

func ipNet(p netip.Prefix) *net.IPNet {
	a := p.Addr()
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(p.Bits(), a.BitLen())}
}

func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	if !ok {
		return netip.Prefix{}, false
	}
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), ones), true
}
