package plugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"cloister.dev/internal/network/link"
)

// bridge joins the container to a bridge of the node.
type bridge struct{ *Set }

type bridgeConf struct {
	types.PluginConf
	macArgs
	Bridge                    string `json:"bridge"`
	IsGateway                 bool   `json:"isGateway"`
	IsDefaultGateway          bool   `json:"isDefaultGateway"`
	ForceAddress              bool   `json:"forceAddress"`
	IPMasq                    bool   `json:"ipMasq"`
	MTU                       int    `json:"mtu"`
	HairpinMode               bool   `json:"hairpinMode"`
	PromiscMode               bool   `json:"promiscMode"`
	EnableDAD                 bool   `json:"enabledad"`
	DisableContainerInterface bool   `json:"disableContainerInterface"`
	PortIsolation             bool   `json:"portIsolation"`

	// Not built in.
	VLAN        int   `json:"vlan"`
	VLANTrunk   []any `json:"vlanTrunk"`
	MACSpoofChk bool  `json:"macspoofchk"`
}

func (p bridge) conf(c Call) (bridgeConf, error) {
	conf := bridgeConf{Bridge: "cni0"}
	_, err := parse(c, &conf, &conf.PluginConf)
	switch {
	case err != nil:
		return conf, err
	case conf.VLAN != 0 || len(conf.VLANTrunk) > 0:
		return conf, fmt.Errorf("keys vlan and vlanTrunk: %w", ErrNeedsProgram)
	case conf.MACSpoofChk:
		return conf, fmt.Errorf("key macspoofchk: %w", ErrNeedsProgram)
	case conf.HairpinMode && conf.PromiscMode:
		return conf, types.NewError(types.ErrInvalidNetworkConfig, "hairpinMode and promiscMode exclude each other", "")
	case conf.IPAM.Type != "" && conf.DisableContainerInterface:
		return conf, types.NewError(types.ErrInvalidNetworkConfig, "disableContainerInterface excludes ipam", "")
	}
	if conf.IsDefaultGateway {
		conf.IsGateway = true
	}
	return conf, nil
}

func (p bridge) add(ctx context.Context, c Call) (types.Result, error) {
	conf, err := p.conf(c)
	if err != nil {
		return nil, err
	}
	return p.addPair(ctx, c, &conf.PluginConf, conf.IPMasq, func(ns *link.NetNS, res *types100.Result) error {
		return p.connect(ctx, c, ns, &conf, res)
	})
}

// connect makes the bridge and the pair, and completes the result.
func (p bridge) connect(_ context.Context, c Call, ns *link.NetNS, conf *bridgeConf, res *types100.Result) error {
	mac, err := conf.mac(c.Args)
	if err != nil {
		return err
	}
	gateways, err := gatewaysOf(res, conf)
	if err != nil {
		return err
	}
	br, err := p.node.EnsureBridge(link.BridgeConfig{
		Name: conf.Bridge, MTU: conf.MTU, Promiscuous: conf.PromiscMode, Addrs: gateways, ForceAddress: conf.ForceAddress,
	})
	if err != nil {
		return err
	}
	veth := link.VethConfig{
		Host: link.HostName(c.ContainerID, c.IfName), Pod: c.IfName, MTU: conf.MTU, PodMAC: mac,
		Bridge: br, Hairpin: conf.HairpinMode, Isolated: conf.PortIsolation, DAD: conf.EnableDAD,
		PodDown: conf.DisableContainerInterface,
	}
	if err := p.addresses(&veth, res, conf.IsGateway); err != nil {
		return err
	}
	v, err := p.node.AddVeth(ns, veth)
	if err != nil {
		return err
	}
	for _, ip := range res.IPs {
		ip.Interface = types100.Int(2)
	}
	res.CNIVersion = types100.ImplementedSpecVersion
	res.Interfaces = []*types100.Interface{
		{Name: br.Name, Mac: br.MAC.String()},
		{Name: veth.Host, Mac: v.HostMAC.String()},
		{Name: c.IfName, Mac: v.PodMAC.String(), Sandbox: c.NetNS},
	}
	return nil
}

// addresses completes the pair with what the address plugin gave.
func (s *Set) addresses(veth *link.VethConfig, res *types100.Result, forward bool) error {
	var v4, v6 bool
	for _, ip := range res.IPs {
		a, err := prefixOf(ip.Address)
		if err != nil {
			return err
		}
		v4, v6 = v4 || a.Addr().Is4(), v6 || a.Addr().Is6()
		if veth.PodMAC == nil {
			veth.PodMAC = link.MACFor(a.Addr())
		}
		veth.Addrs = append(veth.Addrs, link.Addr{Prefix: a})
	}
	var err error
	if veth.Routes, err = routesOf(res); err != nil {
		return err
	}
	if forward {
		return s.node.Forward(v4, v6)
	}
	return nil
}

// gatewaysOf fills in gateways and default routes as asked, and returns the
// addresses that the bridge must have.
func gatewaysOf(res *types100.Result, conf *bridgeConf) ([]netip.Prefix, error) {
	var out []netip.Prefix
	hasDefault := map[bool]bool{}
	for _, r := range res.Routes {
		if ones, _ := r.Dst.Mask.Size(); ones == 0 && r.GW != nil {
			hasDefault[r.Dst.IP.To4() != nil] = true
		}
	}
	for _, ip := range res.IPs {
		a, err := prefixOf(ip.Address)
		if err != nil {
			return nil, err
		}
		if ip.Gateway == nil && conf.IsGateway {
			ip.Gateway = a.Masked().Addr().Next().AsSlice()
		}
		is4 := a.Addr().Is4()
		if conf.IsDefaultGateway && !hasDefault[is4] {
			any := net.IPNet{IP: make(net.IP, a.Addr().BitLen()/8), Mask: net.CIDRMask(0, a.Addr().BitLen())}
			res.Routes = append(res.Routes, &types.Route{Dst: any, GW: ip.Gateway})
			hasDefault[is4] = true
		}
		if conf.IsGateway {
			out = append(out, netip.PrefixFrom(addrOf(ip.Gateway), a.Bits()))
		}
	}
	return out, nil
}

func (p bridge) del(ctx context.Context, c Call) error {
	conf, err := p.conf(c)
	if err != nil {
		return err
	}
	if err := p.removePair(ctx, c); err != nil {
		return err
	}
	if conf.IPAM.Type == "" {
		return nil
	}
	return p.ipamDo(ctx, "DEL", conf.IPAM.Type, c)
}

// removePair takes the pair and its masquerading away. A pair that a plugin's
// program made has another name on the node, and is found inside.
func (s *Set) removePair(ctx context.Context, c Call) error {
	if err := s.rules.Remove(ctx, c.owner("masq")); err != nil {
		return err
	}
	found, err := s.node.Remove(link.HostName(c.ContainerID, c.IfName))
	if err != nil || found {
		return err
	}
	ns, err := link.OpenNetNS(c.NetNS)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := s.node.RemoveInside(ns, c.IfName); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (p bridge) check(ctx context.Context, c Call) error {
	conf, err := p.conf(c)
	if err != nil {
		return err
	}
	var base types.PluginConf
	prev, err := chained(c, &base, &base)
	if err != nil {
		return err
	}
	if conf.IPAM.Type != "" {
		if err := p.ipamDo(ctx, "CHECK", conf.IPAM.Type, c); err != nil {
			return err
		}
	}
	if ok, err := p.node.Exists(conf.Bridge); err != nil || !ok {
		return errors.Join(fmt.Errorf("bridge %s is missing", conf.Bridge), err)
	}
	return checkInside(c, prev)
}

// checkInside compares the container's end with what the result says.
func checkInside(c Call, res *types100.Result) error {
	st, err := inspect(c.NetNS, c.IfName)
	if err != nil {
		return err
	}
	for _, i := range res.Interfaces {
		if i.Name == c.IfName && i.Sandbox == c.NetNS && i.Mac != "" && i.Mac != st.MAC.String() {
			return fmt.Errorf("interface %s has the hardware address %s, not %s", c.IfName, st.MAC, i.Mac)
		}
	}
	for _, ip := range res.IPs {
		if ip.Interface != nil && *ip.Interface < len(res.Interfaces) && *ip.Interface >= 0 && res.Interfaces[*ip.Interface].Name != c.IfName {
			continue
		}
		want, err := prefixOf(ip.Address)
		if err != nil {
			return err
		}
		if !st.HasAddr(want) {
			return fmt.Errorf("interface %s lacks the address %s", c.IfName, want)
		}
	}
	routes, err := routesOf(res)
	if err != nil {
		return err
	}
	for _, r := range routes {
		if !st.HasRoute(r) {
			return fmt.Errorf("route to %s via %s is missing in %s", r.Dst, r.GW, c.NetNS)
		}
	}
	return nil
}

func (p bridge) status(ctx context.Context, c Call) error {
	conf, err := p.conf(c)
	if err != nil || conf.IPAM.Type == "" {
		return err
	}
	return p.ipamDo(ctx, "STATUS", conf.IPAM.Type, c)
}
