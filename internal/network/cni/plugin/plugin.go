// Package plugin runs the standard CNI plugins inside the process: the same
// configuration, the same results, and for host-local the same files and lock
// as the programs of that name, without starting a program.
//
// It promises that DEL works without the namespace and as often as it is
// asked, that a failed ADD took back what it did, and that a configuration it
// cannot honour is refused with ErrNeedsProgram instead of being half obeyed.
//
// It knows CNI and nothing of pods.
package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"cloister.dev/internal/network/link"
	"cloister.dev/internal/network/nat"
)

// ErrNeedsProgram says that the configuration uses a key that only the plugin's
// own program understands.
var ErrNeedsProgram = errors.New("needs the plugin's program")

// Call is one invocation, as the environment and the standard input of a
// program would be.
type Call struct {
	Command     string
	ContainerID string
	NetNS       string
	IfName      string
	Args        string
	Path        []string
	Stdin       []byte
	// Exec finds and runs plugins that this one delegates to.
	Exec invoke.Exec
}

// kind is one plugin type.
type kind interface {
	add(context.Context, Call) (types.Result, error)
	del(context.Context, Call) error
	check(context.Context, Call) error
}

// Optional abilities, of version 1.1.0 of the specification.
type (
	statuser interface {
		status(context.Context, Call) error
	}
	collector interface {
		gc(context.Context, Call, []types.GCAttachment) error
	}
)

// Set is the plugins that this process has.
type Set struct {
	node    *link.Node
	rules   nat.Rules
	forward *nat.Forward
	log     *slog.Logger
	stores  *stores
	kinds   map[string]kind
}

// New makes the plugins work on the node.
func New(node *link.Node, rules nat.Rules, log *slog.Logger) *Set {
	s := &Set{node: node, rules: rules, forward: nat.NewForward(log), log: log, stores: newStores()}
	s.kinds = map[string]kind{
		"loopback":   loopback{s},
		"bridge":     bridge{s},
		"ptp":        ptp{s},
		"host-local": hostLocal{s},
		"portmap":    portmap{s},
		"firewall":   firewall{s},
		"tuning":     tuning{s},
		"bandwidth":  bandwidth{s},
	}
	return s
}

// Has tells whether the type is one of them.
func (s *Set) Has(typ string) bool {
	_, ok := s.kinds[typ]
	return ok
}

// Run does what the program would, and returns what it would print.
func (s *Set) Run(ctx context.Context, typ string, c Call) ([]byte, error) {
	k, ok := s.kinds[typ]
	if !ok {
		return nil, fmt.Errorf("plugin type %q is not built in", typ)
	}
	if c.Command == "VERSION" {
		var b bytes.Buffer
		err := version.All.Encode(&b)
		return b.Bytes(), err
	}
	v, err := (&version.ConfigDecoder{}).Decode(c.Stdin)
	if err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "network configuration", err.Error())
	}
	if e := (&version.Reconciler{}).Check(v, version.All); e != nil {
		return nil, types.NewError(types.ErrIncompatibleCNIVersion, "incompatible CNI versions", e.Details())
	}
	switch c.Command {
	case "ADD":
		res, err := k.add(ctx, c)
		if err != nil {
			return nil, err
		}
		return printed(res, v)
	case "DEL":
		return nil, k.del(ctx, c)
	case "CHECK":
		return nil, k.check(ctx, c)
	case "STATUS":
		if st, ok := k.(statuser); ok {
			return nil, st.status(ctx, c)
		}
		return nil, nil
	case "GC":
		gc, ok := k.(collector)
		if !ok {
			return nil, nil
		}
		var conf types.PluginConf
		if err := json.Unmarshal(c.Stdin, &conf); err != nil {
			return nil, fmt.Errorf("parse network configuration: %w", err)
		}
		return nil, gc.gc(ctx, c, conf.ValidAttachments)
	}
	return nil, types.NewError(types.ErrInvalidEnvironmentVariables, "unknown CNI_COMMAND: "+c.Command, "")
}

func printed(res types.Result, v string) ([]byte, error) {
	out, err := res.GetAsVersion(v)
	if err != nil {
		return nil, fmt.Errorf("convert result to CNI version %s: %w", v, err)
	}
	return json.Marshal(out)
}

// parse reads a configuration and its prevResult, which is nil if there is
// none.
func parse(c Call, conf any, base *types.PluginConf) (*types100.Result, error) {
	if err := json.Unmarshal(c.Stdin, conf); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "parse network configuration", err.Error())
	}
	if base.RawPrevResult == nil {
		return nil, nil
	}
	if err := version.ParsePrevResult(base); err != nil {
		return nil, fmt.Errorf("parse prevResult: %w", err)
	}
	res, err := types100.NewResultFromResult(base.PrevResult)
	if err != nil {
		return nil, fmt.Errorf("convert prevResult: %w", err)
	}
	return res, nil
}

// chained is parse for plugins that only make sense after another one.
func chained(c Call, conf any, base *types.PluginConf) (*types100.Result, error) {
	res, err := parse(c, conf, base)
	if err == nil && res == nil {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "plugin "+base.Type+" must follow another one in the list: there is no prevResult", "")
	}
	return res, err
}

// ipam runs the address plugin of the configuration.
func (s *Set) ipamAdd(ctx context.Context, typ string, c Call) (*types100.Result, error) {
	var res types.Result
	var err error
	if k, ok := s.kinds[typ]; ok {
		res, err = k.add(ctx, c)
	} else {
		var path string
		if path, err = c.Exec.FindInPath(typ, c.Path); err == nil {
			res, err = invoke.ExecPluginWithResult(ctx, path, c.Stdin, c.env("ADD"), c.Exec)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("address plugin %s: %w", typ, err)
	}
	out, err := types100.NewResultFromResult(res)
	if err != nil {
		return nil, fmt.Errorf("convert result of address plugin %s: %w", typ, err)
	}
	return out, nil
}

// ipamDo is ipamAdd for commands without a result.
func (s *Set) ipamDo(ctx context.Context, command, typ string, c Call) error {
	var err error
	c.Command = command
	if s.Has(typ) {
		_, err = s.Run(ctx, typ, c)
	} else {
		var path string
		if path, err = c.Exec.FindInPath(typ, c.Path); err == nil {
			err = invoke.ExecPluginWithoutResult(ctx, path, c.Stdin, c.env(command), c.Exec)
		}
	}
	if err != nil {
		return fmt.Errorf("address plugin %s: %w", typ, err)
	}
	return nil
}

func (c Call) env(command string) *invoke.Args {
	return &invoke.Args{
		Command: command, ContainerID: c.ContainerID, NetNS: c.NetNS, IfName: c.IfName,
		PluginArgsStr: c.Args, Path: strings.Join(c.Path, ":"),
	}
}

// owner names what one plugin has for one interface of a container.
func (c Call) owner(typ string) string { return c.ContainerID + " " + c.IfName + " " + typ }

// OwnerID is the container of an owner name.
func OwnerID(owner string) string {
	id, _, _ := strings.Cut(owner, " ")
	return id
}

// macArgs is where a hardware address may be asked for.
type macArgs struct {
	Args struct {
		CNI struct {
			Mac string `json:"mac"`
		} `json:"cni"`
	} `json:"args"`
	RuntimeConfig struct {
		Mac string `json:"mac"`
	} `json:"runtimeConfig"`
}

// mac follows the conventions' order: the runtime's word, the configuration's
// args, CNI_ARGS.
func (m macArgs) mac(args string) (net.HardwareAddr, error) {
	s := m.RuntimeConfig.Mac
	if s == "" {
		s = m.Args.CNI.Mac
	}
	if s == "" {
		var e struct {
			types.CommonArgs
			MAC types.UnmarshallableString
		}
		if err := types.LoadArgs(args, &e); err != nil {
			return nil, fmt.Errorf("read CNI_ARGS: %w", err)
		}
		s = string(e.MAC)
	}
	if s == "" {
		return nil, nil
	}
	mac, err := net.ParseMAC(s)
	if err != nil {
		return nil, fmt.Errorf("hardware address %q: %w", s, err)
	}
	return mac, nil
}

func prefixOf(n net.IPNet) (netip.Prefix, error) {
	a, ok := netip.AddrFromSlice(n.IP)
	ones, size := n.Mask.Size()
	if !ok || size == 0 {
		return netip.Prefix{}, fmt.Errorf("address %s is not valid", n.String())
	}
	if a = a.Unmap(); a.BitLen() != size {
		ones -= size - a.BitLen()
	}
	p := netip.PrefixFrom(a, ones)
	if !p.IsValid() {
		return netip.Prefix{}, fmt.Errorf("address %s is not valid", n.String())
	}
	return p, nil
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

func ipNet(p netip.Prefix) net.IPNet {
	return net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// routesOf translates routes; one without a gateway takes that of its family.
func routesOf(res *types100.Result) ([]link.Route, error) {
	var out []link.Route
	for _, r := range res.Routes {
		dst, err := prefixOf(r.Dst)
		if err != nil {
			return nil, fmt.Errorf("route: %w", err)
		}
		lr := link.Route{Dst: dst.Masked(), GW: addrOf(r.GW), MTU: r.MTU, AdvMSS: r.AdvMSS, Priority: r.Priority}
		if !lr.GW.IsValid() {
			for _, ip := range res.IPs {
				if gw := addrOf(ip.Gateway); gw.IsValid() && gw.Is4() == dst.Addr().Is4() {
					lr.GW = gw
					break
				}
			}
		}
		if r.Table != nil {
			lr.Table = *r.Table
		}
		if r.Scope != nil {
			lr.Scope = *r.Scope
		}
		out = append(out, lr)
	}
	return out, nil
}

// masquerade grants the addresses of a result.
func (s *Set) masquerade(ctx context.Context, c Call, res *types100.Result) error {
	var g nat.Grant
	for _, ip := range res.IPs {
		p, err := prefixOf(ip.Address)
		if err != nil {
			return err
		}
		g.Masquerade = append(g.Masquerade, p)
	}
	return s.rules.Add(ctx, c.owner("masq"), g, true)
}

// Forget takes away what the plugins may have made for a container when nobody
// knows any more how it was configured.
func (s *Set) Forget(ctx context.Context, id, ifName string) error {
	c := Call{ContainerID: id, IfName: ifName}
	errs := []error{
		s.removePair(ctx, c),
		s.rules.Remove(ctx, c.owner("portmap")),
		s.forward.Revoke(ctx, c.owner("firewall")),
	}
	return errors.Join(append(errs, s.stores.releaseEverywhere(ctx, id))...)
}
