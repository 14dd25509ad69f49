package plugin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"cloister.dev/internal/network/link"
)

// ptp makes a pair without a bridge: the node routes to each container.
type ptp struct{ *Set }

type ptpConf struct {
	types.PluginConf
	IPMasq bool `json:"ipMasq"`
	MTU    int  `json:"mtu"`
}

func (p ptp) add(ctx context.Context, c Call) (types.Result, error) {
	var conf ptpConf
	if _, err := parse(c, &conf, &conf.PluginConf); err != nil {
		return nil, err
	}
	if conf.IPAM.Type == "" {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "ptp needs ipam", "")
	}
	return p.addPair(ctx, c, &conf.PluginConf, conf.IPMasq, func(ns *link.NetNS, res *types100.Result) error {
		return p.connect(ns, c, conf.MTU, link.HostName(c.ContainerID, c.IfName), res)
	})
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
