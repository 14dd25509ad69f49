package plugin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"cloister.dev/internal/network/link"
	"cloister.dev/internal/osutil"
)

// ptp makes a pair without a bridge: the node routes to each container.
type ptp struct{ *Set }

type ptpConf struct {
	types.PluginConf
	IPMasq bool `json:"ipMasq"`
	MTU    int  `json:"mtu"`
}

func (p ptp) add(ctx context.Context, c Call) (_ types.Result, err error) {
	var conf ptpConf
	if _, err := parse(c, &conf, &conf.PluginConf); err != nil {
		return nil, err
	}
	ns, err := link.OpenNetNS(c.NetNS)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	var undo osutil.Undo
	defer undo.Run(ctx, &err)
	undo.Add("release addresses", func(ctx context.Context) error { return p.ipamDo(ctx, "DEL", conf.IPAM.Type, c) })
	res, err := p.ipamAdd(ctx, conf.IPAM.Type, c)
	if err != nil {
		return nil, err
	}
	if len(res.IPs) == 0 {
		return nil, fmt.Errorf("address plugin %s gave no address", conf.IPAM.Type)
	}
	host := link.HostName(c.ContainerID, c.IfName)
	if err := p.connect(ns, c, conf.MTU, host, res); err != nil {
		return nil, err
	}
	undo.Add("remove interfaces", func(context.Context) error { return p.node.RemoveNow(host) })
	if conf.IPMasq {
		undo.Add("remove masquerading", func(ctx context.Context) error { return p.rules.Remove(ctx, c.owner("masq")) })
		if err := p.masquerade(ctx, c, res); err != nil {
			return nil, err
		}
	}
	if !conf.DNS.IsEmpty() {
		res.DNS = conf.DNS
	}
	undo.Release()
	return res, nil
}

func (p ptp) connect(ns *link.NetNS, c Call, mtu int, host string, res *types100.Result) error {
	veth := link.VethConfig{Host: host, Pod: c.IfName, MTU: mtu}
	if err := p.addresses(&veth, res, true); err != nil {
		return err
	}
	var hostAddrs, hostRoutes []netip.Addr
	for i, ip := range res.IPs {
		gw := addrOf(ip.Gateway)
		if !gw.IsValid() {
			return types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("address %s has no gateway, which ptp needs", ip.Address.String()), "")
		}
		veth.Addrs[i].Peer = gw
		hostAddrs = append(hostAddrs, gw)
		hostRoutes = append(hostRoutes, veth.Addrs[i].Prefix.Addr())
		ip.Interface = types100.Int(1)
	}
	v, err := p.node.AddVeth(ns, veth)
	if err != nil {
		return err
	}
	if err := p.node.RouteToPod(host, v.HostIndex, hostAddrs, hostRoutes); err != nil {
		return errors.Join(err, p.node.RemoveNow(host))
	}
	res.CNIVersion = types100.ImplementedSpecVersion
	res.Interfaces = []*types100.Interface{
		{Name: host, Mac: v.HostMAC.String()},
		{Name: c.IfName, Mac: v.PodMAC.String(), Sandbox: c.NetNS},
	}
	return nil
}

func (p ptp) del(ctx context.Context, c Call) error {
	var conf ptpConf
	if _, err := parse(c, &conf, &conf.PluginConf); err != nil {
		return err
	}
	if err := p.removePair(ctx, c); err != nil {
		return err
	}
	return p.ipamDo(ctx, "DEL", conf.IPAM.Type, c)
}

func (p ptp) check(ctx context.Context, c Call) error {
	var conf ptpConf
	prev, err := chained(c, &conf, &conf.PluginConf)
	if err != nil {
		return err
	}
	if err := p.ipamDo(ctx, "CHECK", conf.IPAM.Type, c); err != nil {
		return err
	}
	return checkInside(c, prev)
}

func (p ptp) status(ctx context.Context, c Call) error {
	var conf ptpConf
	if _, err := parse(c, &conf, &conf.PluginConf); err != nil {
		return err
	}
	return p.ipamDo(ctx, "STATUS", conf.IPAM.Type, c)
}
