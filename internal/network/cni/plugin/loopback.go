package plugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"cloister.dev/internal/network/link"
)

// loopback sets lo up.
type loopback struct{ *Set }

func (p loopback) add(_ context.Context, c Call) (types.Result, error) {
	var conf types.PluginConf
	prev, err := parse(c, &conf, &conf)
	if err != nil {
		return nil, err
	}
	ns, err := link.OpenNetNS(c.NetNS)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	if err := p.node.SetUpLoopback(ns); err != nil {
		return nil, err
	}
	if prev != nil {
		return prev, nil
	}
	res := &types100.Result{
		CNIVersion: types100.ImplementedSpecVersion,
		Interfaces: []*types100.Interface{{Name: "lo", Mac: "00:00:00:00:00:00", Sandbox: c.NetNS}},
	}
	for _, a := range []string{"127.0.0.1/8", "::1/128"} {
		res.IPs = append(res.IPs, &types100.IPConfig{Interface: types100.Int(0), Address: ipNet(netip.MustParsePrefix(a))})
	}
	return res, nil
}

// del leaves lo as it is: the namespace ends, and what still runs in it may
// need it until then.
func (p loopback) del(context.Context, Call) error { return nil }

func (p loopback) check(_ context.Context, c Call) error {
	st, err := inspect(c.NetNS, "lo")
	if err != nil {
		return err
	}
	if !st.Up {
		return errors.New("lo is down")
	}
	return nil
}

// inspect looks at an interface inside the namespace.
func inspect(path, name string) (link.State, error) {
	ns, err := link.OpenNetNS(path)
	if err != nil {
		return link.State{}, err
	}
	defer ns.Close()
	st, err := link.Inspect(ns, name)
	if errors.Is(err, fs.ErrNotExist) {
		return st, fmt.Errorf("interface %s is missing in %s: %w", name, path, err)
	}
	return st, err
}
