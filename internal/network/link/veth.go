package link

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// VethConfig is a pair: one end in a pod's namespace, one on the node.
type VethConfig struct {
	Host   string // name on the node, see HostName
	Pod    string // name in the namespace
	MTU    int    // 0: the kernel's default
	PodMAC net.HardwareAddr
	// Bridge is what the node's end joins; the zero value is none.
	Bridge   Bridge
	Hairpin  bool
	Isolated bool
	// PodDown leaves the pod's end down: no address will follow.
	PodDown bool

	Addrs  []Addr
	Routes []Route
	DAD    bool // duplicate address detection of IPv6, a second or two
}

// Addr is an address of the pod's end.
type Addr struct {
	Prefix netip.Prefix
	// Peer makes it a host address whose subnet is reached through this
	// gateway only, as point-to-point set-ups want.
	Peer netip.Addr
}

// Route is a route in the pod's namespace over the pair.
type Route struct {
	Dst                   netip.Prefix
	GW                    netip.Addr // invalid: on link
	MTU, AdvMSS, Priority int
	Table, Scope          int // 0: the default
}

// Veth is a pair that was made.
type Veth struct {
	HostIndex, PodIndex int
	HostMAC, PodMAC     net.HardwareAddr
	MTU                 int
}

// MACFor derives a hardware address from an IP address, so that neighbours
// that still remember who had the IP before are right again.
func MACFor(a netip.Addr) net.HardwareAddr {
	if a = a.Unmap(); a.Is4() {
		b := a.As4()
		return net.HardwareAddr{0x0a, 0x58, b[0], b[1], b[2], b[3]}
	}
	sum := sha256.Sum256(a.AsSlice())
	return net.HardwareAddr{0x0a, 0x59, sum[0], sum[1], sum[2], sum[3]}
}

// AddVeth makes the pair and sets up the pod's end, and its loopback. On error
// nothing stays.
func (n *Node) AddVeth(ns *NetNS, c VethConfig) (v Veth, err error) {
	if n.Own(ns) {
		return Veth{}, fmt.Errorf("%s is the node's own network namespace: %w", ns.Path(), errdefs.ErrInvalidArgument)
	}
	if err := n.newVeth(ns, c); err != nil {
		return Veth{}, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.RemoveNow(c.Host))
		}
	}()
	host, err := n.h.LinkByName(c.Host)
	if err != nil {
		return Veth{}, fmt.Errorf("look up interface %s: %w", c.Host, err)
	}
	a := host.Attrs()
	v = Veth{HostIndex: a.Index, PodIndex: a.ParentIndex, HostMAC: a.HardwareAddr, PodMAC: c.PodMAC, MTU: a.MTU}
	if c.Bridge.Index == 0 {
		// The node talks over this end itself: its link-local address must be
		// good at once, so detection is off before the interface is up.
		if err := ensureSysctl("/proc/sys/net/ipv6/conf/"+c.Host+"/accept_dad", "0"); err != nil && !os.IsNotExist(err) {
			return Veth{}, fmt.Errorf("turn off address detection on %s: %w", c.Host, err)
		}
		if err := n.h.LinkSetUp(host); err != nil {
			return Veth{}, fmt.Errorf("set %s up: %w", c.Host, err)
		}
	}
	if c.Hairpin {
		if err := n.h.LinkSetHairpin(host, true); err != nil {
			return Veth{}, fmt.Errorf("set hairpin on %s: %w", c.Host, err)
		}
	}
	if c.Isolated {
		if err := n.h.LinkSetIsolated(host, true); err != nil {
			return Veth{}, fmt.Errorf("isolate bridge port %s: %w", c.Host, err)
		}
	}
	if err := ns.Do(func() error { return setUpPod(&v, c) }); err != nil {
		return Veth{}, fmt.Errorf("set up %s in %s: %w", c.Pod, ns.Path(), err)
	}
	if !c.PodDown {
		awaitUp(n.h, v.HostIndex)
		if c.Bridge.Index > 0 && !c.Bridge.Up {
			awaitUp(n.h, c.Bridge.Index) // this is its first port
			awaitHeard(c.Bridge.Name, c.Bridge.Addrs...)
		}
	}
	return v, nil
}

// The kernel makes an interface pass packets a moment after it is up, and
// drops what is sent in that moment; its sender repeats it a second later.
const (
	upPatience = 50 * time.Millisecond
	upPoll     = 200 * time.Microsecond
)

// awaitUp waits for that moment to pass, which usually is over already. It
// gives up silently: the pair is made, only perhaps a little early.
func awaitUp(h *netlink.Handle, index int) {
	for end := time.Now().Add(upPatience); time.Now().Before(end); time.Sleep(upPoll) { //nolint:forbidigo // a subscription would take longer than most of these waits
		if l, err := h.LinkByIndex(index); err != nil || l.Attrs().OperState == netlink.OperUp {
			return
		}
	}
}

// newVeth makes both ends where they belong, in one message. A left-over of
// the same owner makes way.
func (n *Node) newVeth(ns *NetNS, c VethConfig) error {
	err := n.sendNewVeth(ns, c)
	if errors.Is(err, unix.EEXIST) {
		// When it is not there any more, the reaper was quicker.
		if old, lookErr := n.Exists(c.Host); lookErr == nil {
			if old {
				err = n.RemoveNow(c.Host)
			}
			if !old || err == nil {
				err = n.sendNewVeth(ns, c)
			}
		}
	}
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("interface %s exists already in %s: %w", c.Pod, ns.Path(), errdefs.ErrAlreadyExists)
	}
	if err != nil {
		return fmt.Errorf("add veth %s with peer %s in %s: %w", c.Host, c.Pod, ns.Path(), err)
	}
	return nil
}

func (n *Node) sendNewVeth(ns *NetNS, c VethConfig) error {
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	if c.Bridge.Index > 0 {
		msg.Change, msg.Flags = unix.IFF_UP, unix.IFF_UP
	}
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(c.Host)))
	if c.MTU > 0 {
		req.AddData(nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(c.MTU))))
	}
	if c.Bridge.Index > 0 {
		req.AddData(nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(c.Bridge.Index))))
	}
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("veth"))
	peer := info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(nl.VETH_INFO_PEER, nil)
	nl.NewIfInfomsgChild(peer, unix.AF_UNSPEC)
	peer.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(c.Pod))
	peer.AddRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(ns.FD())))
	if c.MTU > 0 {
		peer.AddRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(c.MTU)))
	}
	if c.PodMAC != nil {
		peer.AddRtAttr(unix.IFLA_ADDRESS, c.PodMAC)
	}
	req.AddData(info)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// loopbackIndex is that of lo in every network namespace.
const loopbackIndex = 1

// setUpPod runs inside the namespace.
func setUpPod(v *Veth, c VethConfig) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open rtnetlink: %w", err)
	}
	defer h.Close()
	if err := h.SetSocketTimeout(socketTime); err != nil {
		return fmt.Errorf("set rtnetlink time-out: %w", err)
	}
	if err := upByIndex(h, loopbackIndex); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	if v.PodMAC == nil || v.PodIndex == 0 {
		l, err := h.LinkByName(c.Pod)
		if err != nil {
			return fmt.Errorf("look up: %w", err)
		}
		v.PodIndex, v.PodMAC = l.Attrs().Index, l.Attrs().HardwareAddr
	}
	if err := podSysctls(c); err != nil {
		return err
	}
	for _, a := range c.Addrs {
		if err := addPodAddr(h, v.PodIndex, a, c.DAD); err != nil {
			return err
		}
	}
	if c.PodDown {
		return nil
	}
	if err := upByIndex(h, v.PodIndex); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	for _, a := range c.Addrs {
		if a.Peer.IsValid() {
			if err := addPeerRoutes(h, v.PodIndex, a); err != nil {
				return err
			}
		}
	}
	for _, r := range c.Routes {
		if err := addRoute(h, v.PodIndex, r); err != nil {
			return err
		}
	}
	awaitUp(h, v.PodIndex)
	own := make([]netip.Addr, 0, len(c.Addrs))
	for _, a := range c.Addrs {
		own = append(own, a.Prefix.Addr())
	}
	awaitHeard(c.Pod, own...)
	return nil
}

// awaitHeard waits until an interface in the namespace of the thread listens to
// neighbours that look for its IPv6 addresses, which the kernel arranges in the
// background, and gives up silently as awaitUp does.
func awaitHeard(iface string, addrs ...netip.Addr) {
	groups := map[string]bool{}
	for _, a := range addrs {
		if a.Is6() {
			b := a.As16()
			groups[fmt.Sprintf("ff0200000000000000000001ff%x", b[13:])] = true
		}
	}
	for end := time.Now().Add(upPatience); len(groups) > 0 && time.Now().Before(end); time.Sleep(upPoll) { //nolint:forbidigo // a subscription would take longer than most of these waits
		have, err := os.ReadFile("/proc/thread-self/net/igmp6")
		if err != nil {
			return
		}
		for line := range strings.Lines(string(have)) {
			if f := strings.Fields(line); len(f) > 2 && f[1] == iface {
				delete(groups, f[2])
			}
		}
		if len(groups) == 0 {
			return
		}
	}
}

// podSysctls must run before the interface is up: then the link-local address
// is usable at once, and neighbours hear of the pod without asking.
func podSysctls(c VethConfig) error {
	set := func(path, value string) error {
		if err := os.WriteFile(path, []byte(value), 0o644); err != nil && !os.IsNotExist(err) {
			return fmt.Errorf("set %s: %w", path, err)
		}
		return nil
	}
	v6 := "/proc/sys/net/ipv6/conf/" + c.Pod
	dad := "0"
	if c.DAD {
		dad = "1"
		if err := set(v6+"/enhanced_dad", "1"); err != nil {
			return err
		}
	}
	if err := set(v6+"/accept_dad", dad); err != nil {
		return err
	}
	if err := set("/proc/sys/net/ipv4/conf/"+c.Pod+"/arp_notify", "1"); err != nil {
		return err
	}
	for _, a := range c.Addrs {
		if a.Prefix.Addr().Is4() {
			continue
		}
		for _, iface := range []string{"lo", c.Pod} {
			if err := enableIPv6(iface); err != nil {
				return fmt.Errorf("enable IPv6 on %s: %w", iface, err)
			}
		}
		return set(v6+"/keep_addr_on_down", "1")
	}
	return nil
}

func upByIndex(h *netlink.Handle, index int) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Index = index
	return h.LinkSetUp(&netlink.Device{LinkAttrs: attrs})
}

func addPodAddr(h *netlink.Handle, index int, a Addr, dad bool) error {
	addr := &netlink.Addr{IPNet: ipNet(a.Prefix), LinkIndex: index}
	if a.Prefix.Addr().Is6() && !dad {
		addr.Flags = unix.IFA_F_NODAD
	}
	if a.Peer.IsValid() {
		addr.Flags |= unix.IFA_F_NOPREFIXROUTE
	}
	if err := h.AddrAdd(nil, addr); err != nil {
		return fmt.Errorf("add address %s: %w", a.Prefix, err)
	}
	return nil
}

// addPeerRoutes sends all traffic of the subnet through the gateway, which
// alone is on the link.
func addPeerRoutes(h *netlink.Handle, index int, a Addr) error {
	src := net.IP(a.Prefix.Addr().AsSlice())
	gw := net.IP(a.Peer.AsSlice())
	for _, r := range []netlink.Route{
		{LinkIndex: index, Dst: ipNet(netip.PrefixFrom(a.Peer, a.Peer.BitLen())), Scope: netlink.SCOPE_LINK, Src: src},
		{LinkIndex: index, Dst: ipNet(a.Prefix.Masked()), Gw: gw, Src: src},
	} {
		if err := h.RouteAdd(&r); err != nil {
			return fmt.Errorf("add route %s: %w", r, err)
		}
	}
	return nil
}

func addRoute(h *netlink.Handle, index int, r Route) error {
	nr := netlink.Route{
		LinkIndex: index,
		Dst:       ipNet(r.Dst),
		MTU:       r.MTU,
		AdvMSS:    r.AdvMSS,
		Priority:  r.Priority,
		Table:     r.Table,
		Scope:     netlink.Scope(r.Scope),
	}
	if r.GW.IsValid() {
		nr.Gw = r.GW.AsSlice()
	}
	if err := h.RouteAppend(&nr); err != nil {
		return fmt.Errorf("add route to %s via %s: %w", r.Dst, r.GW, err)
	}
	return nil
}

// SetUpLoopback sets lo up.
func (n *Node) SetUpLoopback(ns *NetNS) error {
	return ns.inside(func(h *netlink.Handle) error {
		if err := upByIndex(h, loopbackIndex); err != nil {
			return fmt.Errorf("set lo up: %w", err)
		}
		return nil
	})
}
