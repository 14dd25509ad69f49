package plugin

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"cloister.dev/internal/network/nat"
)

// firewall lets the container's packets pass a FORWARD chain that would drop
// them. Its backend firewalld and its ingress policies need the program.
type firewall struct{ *Set }

type firewallConf struct {
	types.PluginConf
	Backend       string `json:"backend"`
	AdminChain    string `json:"iptablesAdminChainName"`
	IngressPolicy string `json:"ingressPolicy"`
}

func (p firewall) conf(c Call) (firewallConf, *types100.Result, error) {
	conf := firewallConf{AdminChain: nat.AdminChain}
	prev, err := parse(c, &conf, &conf.PluginConf)
	switch {
	case err != nil:
		return conf, nil, err
	case conf.Backend == "firewalld":
		return conf, nil, fmt.Errorf("backend firewalld: %w", ErrNeedsProgram)
	case conf.IngressPolicy != "" && conf.IngressPolicy != "open":
		return conf, nil, fmt.Errorf("ingressPolicy %s: %w", conf.IngressPolicy, ErrNeedsProgram)
	}
	return conf, prev, nil
}

func hostsOf(res *types100.Result) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, ip := range res.IPs {
		p, err := prefixOf(ip.Address)
		if err != nil {
			return nil, err
		}
		out = append(out, netip.PrefixFrom(p.Addr(), p.Addr().BitLen()))
	}
	return out, nil
}

func (p firewall) add(ctx context.Context, c Call) (types.Result, error) {
	conf, prev, err := p.conf(c)
	if err != nil {
		return nil, err
	}
	if prev == nil {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "firewall must follow another plugin in the list: there is no prevResult", "")
	}
	hosts, err := hostsOf(prev)
	if err != nil {
		return nil, err
	}
	return prev, p.forward.Allow(ctx, c.owner("firewall"), hosts, conf.AdminChain)
}

func (p firewall) del(ctx context.Context, c Call) error {
	if _, _, err := p.conf(c); err != nil {
		return err
	}
	return p.forward.Revoke(ctx, c.owner("firewall"))
}

func (p firewall) check(ctx context.Context, c Call) error {
	_, prev, err := p.conf(c)
	if err != nil || prev == nil {
		return err
	}
	hosts, err := hostsOf(prev)
	if err != nil {
		return err
	}
	ok, err := p.forward.Allowed(ctx, c.owner("firewall"), hosts)
	if err == nil && !ok {
		err = fmt.Errorf("firewall: rules of %s are missing", c.ContainerID)
	}
	return err
}
