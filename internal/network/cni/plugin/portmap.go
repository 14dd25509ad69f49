package plugin

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"cloister.dev/internal/network/link"
	"cloister.dev/internal/network/nat"
)

// portmap publishes ports. The program's choice of a packet filter (backend)
// and of a mark (markMasqBit, externalSetMarkChain) have no meaning here: the
// rules are nftables' and need no mark.
type portmap struct{ *Set }

type portmapConf struct {
	types.PluginConf
	SNAT          *bool     `json:"snat"`
	MasqAll       bool      `json:"masqAll"`
	ConditionsV4  *[]string `json:"conditionsV4"`
	ConditionsV6  *[]string `json:"conditionsV6"`
	RuntimeConfig struct {
		PortMappings []struct {
			HostPort      int    `json:"hostPort"`
			ContainerPort int    `json:"containerPort"`
			Protocol      string `json:"protocol"`
			HostIP        string `json:"hostIP"`
		} `json:"portMappings"`
	} `json:"runtimeConfig"`
}

func (p portmap) conf(c Call) (portmapConf, *types100.Result, error) {
	var conf portmapConf
	prev, err := parse(c, &conf, &conf.PluginConf)
	if err != nil {
		return conf, nil, err
	}
	for _, cond := range []*[]string{conf.ConditionsV4, conf.ConditionsV6} {
		if cond != nil && len(*cond) > 0 {
			return conf, nil, fmt.Errorf("keys conditionsV4 and conditionsV6: %w", ErrNeedsProgram)
		}
	}
	return conf, prev, nil
}

// grant translates the mappings for the first address of either family.
func (p portmap) grant(c Call, conf portmapConf, prev *types100.Result) (nat.Grant, error) {
	var g nat.Grant
	targets, err := targetsOf(c, prev)
	if err != nil {
		return g, err
	}
	for _, m := range conf.RuntimeConfig.PortMappings {
		if m.HostPort <= 0 || m.HostPort > 65535 || m.ContainerPort <= 0 || m.ContainerPort > 65535 {
			return g, fmt.Errorf("port mapping %d→%d is not valid", m.HostPort, m.ContainerPort)
		}
		proto, err := nat.Protocol(strings.ToLower(m.Protocol))
		if err != nil {
			return g, err
		}
		var host netip.Addr
		if m.HostIP != "" {
			if host, err = netip.ParseAddr(m.HostIP); err != nil {
				return g, fmt.Errorf("port mapping: host address: %w", err)
			}
		}
		for _, t := range targets {
			g.Ports = append(g.Ports, nat.Port{
				Protocol: proto, HostIP: host.Unmap(), HostPort: uint16(m.HostPort), Target: t, Port: uint16(m.ContainerPort),
				NoSNAT: conf.SNAT != nil && !*conf.SNAT, MasqueradeAll: conf.MasqAll,
			})
		}
	}
	return g, nil
}

func targetsOf(c Call, prev *types100.Result) ([]netip.Prefix, error) {
	var out []netip.Prefix
	have := map[bool]bool{}
	for _, ip := range prev.IPs {
		if i := ip.Interface; i != nil && *i >= 0 && *i < len(prev.Interfaces) {
			if in := prev.Interfaces[*i]; in.Name != c.IfName || in.Sandbox == "" {
				continue
			}
		}
		a, err := prefixOf(ip.Address)
		if err != nil {
			return nil, err
		}
		if !have[a.Addr().Is4()] {
			have[a.Addr().Is4()] = true
			out = append(out, a)
		}
	}
	return out, nil
}

func (p portmap) add(ctx context.Context, c Call) (types.Result, error) {
	conf, prev, err := p.conf(c)
	if err != nil {
		return nil, err
	}
	if prev == nil {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "portmap must follow another plugin in the list: there is no prevResult", "")
	}
	if len(conf.RuntimeConfig.PortMappings) == 0 {
		return prev, nil
	}
	g, err := p.grant(c, conf, prev)
	if err != nil {
		return nil, err
	}
	// Whoever maps a port last has it, as with the program.
	if err := p.rules.Add(ctx, c.owner("portmap"), g, true); err != nil {
		return nil, err
	}
	for _, i := range prev.Interfaces {
		if i.Sandbox == "" && (conf.SNAT == nil || *conf.SNAT) {
			if err := p.node.Hairpin(i.Name); err != nil {
				return nil, err
			}
		}
	}
	for _, port := range g.Ports {
		if !port.NoSNAT && port.Target.Addr().Is4() {
			iface, err := p.node.InterfaceTo(port.Target.Addr())
			if err == nil {
				err = p.node.RouteLocalnet(iface)
			}
			if err != nil {
				return nil, err
			}
		}
	}
	for _, m := range conf.RuntimeConfig.PortMappings {
		if strings.EqualFold(m.Protocol, "udp") {
			if err := link.ForgetUDP(uint16(m.HostPort)); err != nil {
				p.log.Warn("old UDP flows to a published port stay", "sandbox", c.ContainerID, "port", m.HostPort, "err", err)
			}
		}
	}
	return prev, nil
}

func (p portmap) del(ctx context.Context, c Call) error {
	if _, _, err := p.conf(c); err != nil {
		return err
	}
	return p.rules.Remove(ctx, c.owner("portmap"))
}

func (p portmap) check(ctx context.Context, c Call) error {
	conf, prev, err := p.conf(c)
	if err != nil || prev == nil {
		return err
	}
	g, err := p.grant(c, conf, prev)
	if err != nil {
		return err
	}
	return p.rules.Check(ctx, c.owner("portmap"), g)
}
