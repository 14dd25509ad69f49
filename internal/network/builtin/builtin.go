// Package builtin is the network that needs no configuration file and no
// plugin: a bridge, an address of each family for every pod, masquerading of
// what leaves the node, and published ports.
//
// It promises that addresses are unique however the daemon ends, that several
// instances with different bridges and state folders live side by side, and
// that the bridge and the packet filter rules are made again when somebody
// removed them.
//
// It knows nothing of CNI but the form of its result.
package builtin

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"cloister.dev/internal/network"
	"cloister.dev/internal/network/link"
	"cloister.dev/internal/network/nat"
	"cloister.dev/internal/osutil"
)

// closeTime bounds the wait for interfaces that are being deleted.
const closeTime = 10 * time.Second

// ifName is the name of the pod's interface.
const ifName = "eth0"

// Options say how an instance differs from others.
type Options struct {
	Bridge string // default "cloister0"
	// Subnets holds at most one subnet of each family; default 10.89.0.0/16,
	// and where the kernel has IPv6 fd63:6c6f:6973::/64.
	Subnets  []netip.Prefix
	MTU      int    // 0: the kernel's default
	StateDir string // holds the leases; must outlive the process
	Log      *slog.Logger
	// HostPorts allows ports of the node to be published.
	HostPorts bool
}

// Attacher implements network.Attacher.
type Attacher struct {
	o      Options
	log    *slog.Logger
	node   *link.Node
	rules  nat.Rules
	leases *leases
	pass   passage
}

var _ network.Attacher = (*Attacher)(nil)

// New opens the instance; the bridge is made with the first pod.
func New(o Options) (_ *Attacher, err error) {
	if o, err = complete(o); err != nil {
		return nil, fmt.Errorf("builtin network: %w", err)
	}
	a := &Attacher{o: o, log: o.Log.With("network", o.Bridge), pass: passage{forward: nat.NewForward(o.Log)}}
	if a.leases, err = openLeases(o.StateDir, o.Subnets); err != nil {
		return nil, fmt.Errorf("builtin network: %w", err)
	}
	if a.node, err = link.Open(a.log); err != nil {
		return nil, fmt.Errorf("builtin network: %w", errors.Join(err, a.leases.close()))
	}
	if a.rules, err = nat.Open(o.Bridge, a.log); err != nil {
		return nil, fmt.Errorf("builtin network: %w", errors.Join(err, a.node.Close(), a.leases.close()))
	}
	a.restore()
	return a, nil
}

func complete(o Options) (Options, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Bridge == "" {
		o.Bridge = "cloister0"
	}
	if len(o.Bridge) > 15 || strings.ContainsAny(o.Bridge, "/: \t\n") || o.Bridge == "." || o.Bridge == ".." {
		return o, fmt.Errorf("bridge name %q: at most 15 characters, no slash, colon or blank: %w", o.Bridge, errdefs.ErrInvalidArgument)
	}
	if o.StateDir == "" || !filepath.IsAbs(o.StateDir) {
		return o, fmt.Errorf("state folder %q must be an absolute path: %w", o.StateDir, errdefs.ErrInvalidArgument)
	}
	if len(o.Subnets) == 0 {
		o.Subnets = []netip.Prefix{netip.MustParsePrefix("10.89.0.0/16")}
		if _, err := os.Stat("/proc/sys/net/ipv6"); err == nil {
			o.Subnets = append(o.Subnets, netip.MustParsePrefix("fd63:6c6f:6973::/64"))
		}
	}
	families := map[bool]bool{}
	masked := make([]netip.Prefix, 0, len(o.Subnets))
	for _, s := range o.Subnets {
		switch {
		case !s.IsValid() || s.Addr().Is4In6():
			return o, fmt.Errorf("subnet %s is not valid: %w", s, errdefs.ErrInvalidArgument)
		case families[s.Addr().Is4()]:
			return o, fmt.Errorf("subnet %s is the second of its family: %w", s, errdefs.ErrInvalidArgument)
		case s.Addr().BitLen()-s.Bits() < 2:
			return o, fmt.Errorf("subnet %s has no room for pods: %w", s, errdefs.ErrInvalidArgument)
		}
		families[s.Addr().Is4()] = true
		masked = append(masked, s.Masked())
	}
	o.Subnets = masked
	return o, nil
}

// slotsOf is the number of addresses of the smallest subnet, without the last
// one, which is IPv4's broadcast address.
func slotsOf(subnets []netip.Prefix) uint32 {
	n := uint64(maxSlots)
	for _, s := range subnets {
		if b := s.Addr().BitLen() - s.Bits(); b < 32 {
			n = min(n, 1<<b-1)
		}
	}
	return uint32(n)
}

// at is the address of a slot, with the subnet's length.
func at(subnet netip.Prefix, slot uint32) netip.Prefix {
	b := subnet.Addr().AsSlice()
	tail := b[len(b)-4:]
	binary.BigEndian.PutUint32(tail, binary.BigEndian.Uint32(tail)+slot)
	addr, _ := netip.AddrFromSlice(b)
	return netip.PrefixFrom(addr, subnet.Bits())
}

// restore gives back to pods that run what a former process gave them, in case
// the rules were lost while none was there.
func (a *Attacher) restore() {
	for _, l := range a.leases.all() {
		if l.Boot != a.leases.boot {
			continue
		}
		g, err := a.grant(l)
		if err == nil {
			err = a.rules.Add(context.Background(), l.ID, g, true)
		}
		if err != nil {
			a.log.Error("packet filter rules of a sandbox not restored", "sandbox", l.ID, "err", err)
		}
	}
}

// Attach implements network.Attacher.
func (a *Attacher) Attach(ctx context.Context, r network.Request) (_ *network.Result, err error) {
	if err := a.check(r); err != nil {
		return nil, fmt.Errorf("attach sandbox %s: %w", r.ID, err)
	}
	ns, err := link.OpenNetNS(r.NetNS)
	if err != nil {
		return nil, fmt.Errorf("attach sandbox %s: %w", r.ID, err)
	}
	defer ns.Close()
	var undo osutil.Undo
	defer undo.Run(ctx, &err)
	l, err := a.leases.take(r.ID, r.Ports)
	if err != nil {
		return nil, fmt.Errorf("attach: %w", err)
	}
	undo.Add("release addresses", func(context.Context) error { return a.leases.give(r.ID) })
	br, veth, err := a.connect(ns, l)
	if err != nil {
		return nil, fmt.Errorf("attach sandbox %s: %w", r.ID, err)
	}
	host := link.HostName(r.ID, ifName)
	undo.Add("remove interfaces", func(context.Context) error { return a.removeLinks(r.ID) })
	g, err := a.grant(l)
	if err != nil {
		return nil, fmt.Errorf("attach sandbox %s: %w", r.ID, err)
	}
	undo.Add("remove packet filter rules", func(ctx context.Context) error { return a.rules.Remove(ctx, r.ID) })
	if err := a.rules.Add(ctx, r.ID, g, false); err != nil {
		return nil, fmt.Errorf("attach sandbox %s: %w", r.ID, err)
	}
	if err := a.publish(r); err != nil {
		return nil, fmt.Errorf("attach sandbox %s: %w", r.ID, err)
	}
	if b := r.Bandwidth; b != nil {
		if err := a.node.Limit(host, link.IFBName(r.ID, ifName), link.Rates{Ingress: b.IngressRate, Egress: b.EgressRate}); err != nil {
			return nil, fmt.Errorf("attach sandbox %s: %w", r.ID, err)
		}
	}
	res, err := a.result(r, l, br, host, veth)
	if err != nil {
		return nil, fmt.Errorf("attach sandbox %s: %w", r.ID, err)
	}
	undo.Release()
	return res, nil
}

func (a *Attacher) check(r network.Request) error {
	if r.ID == "" || strings.ContainsAny(r.ID, "/\n\x00") || len(r.ID) > 128 {
		return fmt.Errorf("sandbox id %.40q is not usable: %w", r.ID, errdefs.ErrInvalidArgument)
	}
	if len(r.Ports) > 0 && !a.o.HostPorts {
		return fmt.Errorf("it publishes ports of the node, which the configuration of the builtin network does not allow: %w", errdefs.ErrFailedPrecondition)
	}
	return nil
}

// connect joins the namespace to the bridge, which it makes where needed.
func (a *Attacher) connect(ns *link.NetNS, l lease) (link.Bridge, link.Veth, error) {
	br, err := a.ensureBridge()
	if err != nil {
		return link.Bridge{}, link.Veth{}, err
	}
	c := link.VethConfig{
		Host:    link.HostName(l.ID, ifName),
		Pod:     ifName,
		MTU:     a.o.MTU,
		Bridge:  br,
		Hairpin: true,
	}
	for i, s := range a.o.Subnets {
		p := l.Addrs[i]
		if c.PodMAC == nil {
			c.PodMAC = link.MACFor(p.Addr())
		}
		any := netip.IPv6Unspecified()
		if s.Addr().Is4() {
			any = netip.IPv4Unspecified()
		}
		c.Addrs = append(c.Addrs, link.Addr{Prefix: p})
		c.Routes = append(c.Routes, link.Route{Dst: netip.PrefixFrom(any, 0), GW: at(s, 1).Addr()})
	}
	veth, err := a.node.AddVeth(ns, c)
	return br, veth, err
}

func (a *Attacher) ensureBridge() (link.Bridge, error) {
	c := link.BridgeConfig{Name: a.o.Bridge, MTU: a.o.MTU, ForceAddress: true}
	var v4, v6 bool
	for _, s := range a.o.Subnets {
		c.Addrs = append(c.Addrs, at(s, 1))
		v4, v6 = v4 || s.Addr().Is4(), v6 || s.Addr().Is6()
	}
	exists, err := a.node.Exists(a.o.Bridge)
	if err != nil {
		return link.Bridge{}, err
	}
	if !exists {
		if err := a.overlap(); err != nil {
			return link.Bridge{}, err
		}
	}
	br, err := a.node.EnsureBridge(c)
	if err != nil {
		return link.Bridge{}, err
	}
	return br, errors.Join(a.node.Forward(v4, v6), a.pass.ensure(a))
}

func (a *Attacher) overlap() error {
	for _, s := range a.o.Subnets {
		if err := a.node.Overlap(s, a.o.Bridge); err != nil {
			return fmt.Errorf("builtin network: %w; choose another subnet in the configuration", err)
		}
	}
	return nil
}

// publish does what published ports need beside rules.
func (a *Attacher) publish(r network.Request) error {
	if len(r.Ports) == 0 {
		return nil
	}
	for _, s := range a.o.Subnets {
		if s.Addr().Is4() {
			if err := a.node.RouteLocalnet(a.o.Bridge); err != nil {
				return err
			}
		}
	}
	for _, p := range r.Ports {
		if p.Protocol != "udp" {
			continue
		}
		if err := link.ForgetUDP(p.HostPort); err != nil {
			a.log.Warn("old UDP flows to a published port stay", "sandbox", r.ID, "port", p.HostPort, "err", err)
		}
	}
	return nil
}

// grant is what the rules have to let the holder of a lease do.
func (a *Attacher) grant(l lease) (nat.Grant, error) {
	var g nat.Grant
	for _, target := range l.Addrs {
		g.Masquerade = append(g.Masquerade, target)
		for _, p := range l.Ports {
			proto, err := nat.Protocol(p.Protocol)
			if err != nil {
				return nat.Grant{}, err
			}
			if p.HostPort == 0 || p.ContainerPort == 0 {
				return nat.Grant{}, fmt.Errorf("port mapping %d→%d: a port is 0: %w", p.HostPort, p.ContainerPort, errdefs.ErrInvalidArgument)
			}
			g.Ports = append(g.Ports, nat.Port{Protocol: proto, HostIP: p.HostIP.Unmap(), HostPort: p.HostPort, Target: target, Port: p.ContainerPort})
		}
	}
	return g, nil
}

func (a *Attacher) result(r network.Request, l lease, br link.Bridge, host string, v link.Veth) (*network.Result, error) {
	res := &network.Result{Interface: ifName}
	raw := types100.Result{
		CNIVersion: "1.0.0",
		Interfaces: []*types100.Interface{
			{Name: br.Name, Mac: br.MAC.String()},
			{Name: host, Mac: v.HostMAC.String()},
			{Name: ifName, Mac: v.PodMAC.String(), Sandbox: r.NetNS},
		},
	}
	for i, s := range a.o.Subnets {
		addr, gw := l.Addrs[i], at(s, 1).Addr()
		res.IPs = append(res.IPs, addr.Addr())
		raw.IPs = append(raw.IPs, &types100.IPConfig{
			Interface: types100.Int(2),
			Address:   net.IPNet{IP: addr.Addr().AsSlice(), Mask: net.CIDRMask(addr.Bits(), addr.Addr().BitLen())},
			Gateway:   gw.AsSlice(),
		})
		raw.Routes = append(raw.Routes, &types.Route{
			Dst: net.IPNet{IP: make(net.IP, addr.Addr().BitLen()/8), Mask: net.CIDRMask(0, addr.Addr().BitLen())},
			GW:  gw.AsSlice(),
		})
	}
	var err error
	if res.Raw, err = json.Marshal(&raw); err != nil {
		return nil, fmt.Errorf("encode result: %w", err)
	}
	return res, nil
}

// Detach implements network.Attacher. It never looks into the namespace: the
// node's end of the pair takes the other one along.
func (a *Attacher) Detach(ctx context.Context, r network.Request) error {
	err := errors.Join(a.removeLinks(r.ID), a.rules.Remove(ctx, r.ID))
	if err == nil {
		err = a.leases.give(r.ID)
	}
	if err != nil {
		return fmt.Errorf("detach sandbox %s: %w", r.ID, err)
	}
	return nil
}

func (a *Attacher) removeLinks(id string) error {
	_, err := a.node.Remove(link.HostName(id, ifName))
	_, err2 := a.node.Remove(link.IFBName(id, ifName))
	return errors.Join(err, err2)
}

// Ready implements network.Attacher.
func (a *Attacher) Ready() error {
	if err := a.overlap(); err != nil {
		return err
	}
	return a.pass.ensure(a)
}

// Allocations implements network.Attacher.
func (a *Attacher) Allocations(ctx context.Context) ([]string, error) {
	ids := map[string]bool{}
	for _, l := range a.leases.all() {
		ids[l.ID] = true
	}
	owners, err := a.rules.Owners(ctx)
	if err != nil {
		return nil, fmt.Errorf("list allocations: %w", err)
	}
	for _, o := range owners {
		ids[o] = true
	}
	return slices.Sorted(maps.Keys(ids)), nil
}

// Settle waits until the interfaces of detached sandboxes are gone from the
// node; Detach only cuts them off.
func (a *Attacher) Settle(ctx context.Context) error { return a.node.Settle(ctx) }

// Close implements network.Attacher. When no sandbox is attached, the bridge
// goes, too; the next one makes it again.
func (a *Attacher) Close() error {
	var errs []error
	if len(a.leases.all()) == 0 {
		ctx, cancel := context.WithTimeout(context.Background(), closeTime)
		defer cancel()
		errs = append(errs, a.node.Settle(ctx), a.node.RemoveBridge(a.o.Bridge), a.pass.revoke(ctx))
	}
	return errors.Join(append(errs, a.node.Close(), a.rules.Close(), a.leases.close())...)
}
