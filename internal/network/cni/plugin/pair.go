package plugin

import (
	"context"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"cloister.dev/internal/network/link"
	"cloister.dev/internal/osutil"
)

// addPair is what all plugins do that give a pod one end of a pair: addresses,
// where there is an ipam, the pair itself, masquerading. connect makes the
// pair and completes the result.
func (s *Set) addPair(ctx context.Context, c Call, conf *types.PluginConf, masq bool, connect func(*link.NetNS, *types100.Result) error) (_ types.Result, err error) {
	ns, err := link.OpenNetNS(c.NetNS)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	var undo osutil.Undo
	defer undo.Run(ctx, &err)
	res := &types100.Result{}
	if conf.IPAM.Type != "" {
		undo.Add("release addresses", func(ctx context.Context) error { return s.ipamDo(ctx, "DEL", conf.IPAM.Type, c) })
		if res, err = s.ipamAdd(ctx, conf.IPAM.Type, c); err != nil {
			return nil, err
		}
		if len(res.IPs) == 0 {
			return nil, fmt.Errorf("address plugin %s gave no address", conf.IPAM.Type)
		}
	}
	if err := connect(ns, res); err != nil {
		return nil, err
	}
	undo.Add("remove interfaces", func(context.Context) error { return s.node.RemoveNow(link.HostName(c.ContainerID, c.IfName)) })
	if masq {
		undo.Add("remove masquerading", func(ctx context.Context) error { return s.rules.Remove(ctx, c.owner("masq")) })
		if err := s.masquerade(ctx, c, res); err != nil {
			return nil, err
		}
	}
	if !conf.DNS.IsEmpty() {
		res.DNS = conf.DNS
	}
	undo.Release()
	return res, nil
}
