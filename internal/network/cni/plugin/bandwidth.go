package plugin

import (
	"context"
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/plugins/pkg/utils"

	"cloister.dev/internal/network/link"
)

// bandwidth limits the traffic of a pair.
type bandwidth struct{ *Set }

type bandwidthConf struct {
	types.PluginConf
	bandwidthLimits
	RuntimeConfig struct {
		Bandwidth *bandwidthLimits `json:"bandwidth"`
	} `json:"runtimeConfig"`
}

// bandwidthLimits are in bits and bits per second.
type bandwidthLimits struct {
	IngressRate  uint64 `json:"ingressRate"`
	IngressBurst uint64 `json:"ingressBurst"`
	EgressRate   uint64 `json:"egressRate"`
	EgressBurst  uint64 `json:"egressBurst"`
}

func (p bandwidth) conf(c Call) (bandwidthConf, bandwidthLimits, *types100.Result, error) {
	var conf bandwidthConf
	prev, err := parse(c, &conf, &conf.PluginConf)
	if err != nil {
		return conf, bandwidthLimits{}, nil, err
	}
	limits := conf.bandwidthLimits // those of the file go before the pod's
	if b := conf.RuntimeConfig.Bandwidth; b != nil && limits == (bandwidthLimits{}) {
		limits = *b
	}
	for _, pair := range [][2]uint64{{limits.IngressRate, limits.IngressBurst}, {limits.EgressRate, limits.EgressBurst}} {
		if (pair[0] == 0) != (pair[1] == 0) {
			return conf, limits, prev, types.NewError(types.ErrInvalidNetworkConfig, "bandwidth: a rate and its burst go together", "")
		}
	}
	return conf, limits, prev, nil
}

// ifb names the intermediate interface as the program does.
func ifbName(network, id string) string {
	const longest = 15
	return utils.MustFormatHashWithPrefix(longest, "bwp", network+id)
}

// hostEnd finds the node's end of the container's interface.
func (p bandwidth) hostEnd(c Call, res *types100.Result) (string, error) {
	st, err := inspect(c.NetNS, c.IfName)
	if err != nil {
		return "", err
	}
	if st.Peer == 0 {
		return "", fmt.Errorf("bandwidth: %s is not one end of a pair", c.IfName)
	}
	name, err := p.node.NameOf(st.Peer)
	if err != nil {
		return "", fmt.Errorf("bandwidth: other end of %s: %w", c.IfName, err)
	}
	for _, i := range res.Interfaces {
		if i.Name == name && i.Sandbox == "" {
			return name, nil
		}
	}
	return "", fmt.Errorf("bandwidth: no earlier plugin says that it made %s", name)
}

func (p bandwidth) add(_ context.Context, c Call) (types.Result, error) {
	conf, limits, prev, err := p.conf(c)
	if err != nil {
		return nil, err
	}
	if prev == nil {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "bandwidth must follow another plugin in the list: there is no prevResult", "")
	}
	if limits == (bandwidthLimits{}) {
		return prev, nil
	}
	host, err := p.hostEnd(c, prev)
	if err != nil {
		return nil, err
	}
	ifb := ifbName(conf.Name, c.ContainerID)
	err = p.node.Limit(host, ifb, link.Rates{
		Ingress: limits.IngressRate, IngressBurst: limits.IngressBurst,
		Egress: limits.EgressRate, EgressBurst: limits.EgressBurst,
	})
	if err != nil {
		return nil, err
	}
	if limits.EgressRate > 0 {
		mac, err := p.node.MACOf(ifb)
		if err != nil {
			_, gone := p.node.Remove(ifb)
			return nil, errors.Join(err, gone)
		}
		prev.Interfaces = append(prev.Interfaces, &types100.Interface{Name: ifb, Mac: mac.String()})
	}
	return prev, nil
}

func (p bandwidth) del(_ context.Context, c Call) error {
	conf, _, _, err := p.conf(c)
	if err != nil {
		return err
	}
	_, err = p.node.Remove(ifbName(conf.Name, c.ContainerID))
	return err
}

func (p bandwidth) check(_ context.Context, c Call) error {
	conf, limits, prev, err := p.conf(c)
	if err != nil || prev == nil {
		return err
	}
	host, err := p.hostEnd(c, prev)
	if err != nil {
		return err
	}
	for _, l := range []struct {
		iface       string
		rate, burst uint64
	}{{host, limits.IngressRate, limits.IngressBurst}, {ifbName(conf.Name, c.ContainerID), limits.EgressRate, limits.EgressBurst}} {
		if l.rate == 0 {
			continue
		}
		want, err := link.Bucket(l.rate, l.burst)
		if err != nil {
			return err
		}
		have, err := p.node.Buckets(l.iface)
		if err != nil {
			return fmt.Errorf("bandwidth: %w", err)
		}
		if have.Rate != want.Rate {
			return fmt.Errorf("bandwidth: %s is limited to %d byte/s, not %d", l.iface, have.Rate, want.Rate)
		}
	}
	return nil
}
