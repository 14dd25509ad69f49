package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/utils"

	"cloister.dev/internal/network"
	"cloister.dev/internal/network/link"
	"cloister.dev/internal/osutil"
)

const (
	// mainInterface is the pod's interface in the first network.
	mainInterface = "eth0"
	// resultVersion is that of Result.Raw.
	resultVersion = "1.0.0"
)

// Attach implements network.Attacher.
func (a *Attacher) Attach(ctx context.Context, r network.Request) (*network.Result, error) {
	if err := checkRequest(r); err != nil {
		return nil, fmt.Errorf("attach sandbox %.80s: %w", r.ID, err)
	}
	networks, err := a.now.Load().folderOf(r.Handler).inForce()
	if err != nil {
		return nil, fmt.Errorf("attach sandbox %s: %w", r.ID, err)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("attach sandbox %s: %w", r.ID, err)
	}
	if err := a.loopback(r.NetNS); err != nil {
		return nil, fmt.Errorf("attach sandbox %s: %w", r.ID, err)
	}
	rec := record{ID: r.ID, Args: argsOf(r), Capabilities: capabilitiesOf(r)}
	for _, n := range networks {
		rec.Networks = append(rec.Networks, recordNetwork{File: n.file, IfName: n.ifName, List: n.raw})
	}
	if err := a.records.create(rec); err != nil {
		if errors.Is(err, fs.ErrExist) {
			err = fmt.Errorf("it is attached already: %w", errdefs.ErrAlreadyExists)
		}
		return nil, fmt.Errorf("attach sandbox %s: %w", r.ID, err)
	}
	results, err := a.addAll(ctx, r, rec, networks)
	var res *network.Result
	if err == nil {
		res, err = a.result(networks, results)
	}
	if err != nil {
		undo, cancel := osutil.UndoContext(ctx)
		defer cancel()
		if e := a.delAll(undo, r, rec, networks); e != nil {
			err = errors.Join(err, fmt.Errorf("undo: %w", e)) // a later Detach finishes
		}
		return nil, fmt.Errorf("attach sandbox %s: %w", r.ID, err)
	}
	return res, nil
}

// checkID keeps ids out of paths and variables that would be read as something
// else.
func checkID(r network.Request) error {
	if err := utils.ValidateContainerID(r.ID); err != nil || len(r.ID) > 200 {
		return fmt.Errorf("sandbox id is not usable: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// passable tells whether a value can stand in CNI_ARGS.
func passable(value string) bool { return !strings.ContainsAny(value, ";=\x00\n") }

// checkRequest keeps values out of CNI_ARGS that would be read as several.
func checkRequest(r network.Request) error {
	for _, v := range []string{r.Namespace, r.Name, r.UID} {
		if !passable(v) {
			return fmt.Errorf("%.80q cannot be passed to plugins: %w", v, errdefs.ErrInvalidArgument)
		}
	}
	return checkID(r)
}

func (a *Attacher) loopback(path string) error {
	ns, err := link.OpenNetNS(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	if a.node.Own(ns) {
		return fmt.Errorf("%s is the node's own network namespace: %w", path, errdefs.ErrInvalidArgument)
	}
	return a.node.SetUpLoopback(ns)
}

// addAll runs ADD for every network, side by side unless told otherwise.
func (a *Attacher) addAll(ctx context.Context, r network.Request, rec record, networks []confNetwork) ([]types.Result, error) {
	results, errs := make([]types.Result, len(networks)), make([]error, len(networks))
	add := func(i int) {
		n := networks[i]
		res, err := a.now.Load().lib.AddNetworkList(ctx, n.list, runtimeConf(r.NetNS, rec, n))
		if err != nil {
			errs[i] = fmt.Errorf("cni network %s (%s): %w", n.list.Name, n.file, typed(err))
			return
		}
		results[i] = res
	}
	if a.now.Load().o.SetupSerially || len(networks) == 1 {
		for i := range networks {
			if add(i); errs[i] != nil {
				return nil, errs[i]
			}
		}
		return results, nil
	}
	var wg sync.WaitGroup
	for i := range networks {
		wg.Go(func() { add(i) })
	}
	wg.Wait()
	return results, errors.Join(errs...)
}

// typed gives well known errors of plugins a meaning for the caller.
func typed(err error) error {
	var e *types.Error
	if !errors.As(err, &e) {
		return err
	}
	switch e.Code {
	case types.ErrTryAgainLater, types.ErrPluginNotAvailable, types.ErrLimitedConnectivity:
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	case types.ErrInvalidNetworkConfig, types.ErrIncompatibleCNIVersion, types.ErrUnsupportedField:
		return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return err
}

func runtimeConf(netns string, rec record, n confNetwork) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{ContainerID: rec.ID, NetNS: netns, IfName: n.ifName, Args: rec.Args, CapabilityArgs: rec.Capabilities}
}

// argsOf are the arguments of conventional names. Those that cannot be passed
// are left out: a sandbox that has such was never attached.
func argsOf(r network.Request) [][2]string {
	args := [][2]string{
		{"IgnoreUnknown", "1"},
		{"K8S_POD_NAMESPACE", r.Namespace},
		{"K8S_POD_NAME", r.Name},
		{"K8S_POD_INFRA_CONTAINER_ID", r.ID},
		{"K8S_POD_UID", r.UID},
	}
	return slices.DeleteFunc(args, func(a [2]string) bool { return !passable(a[1]) })
}

// The shapes of capability arguments are those of CNI's conventions.
type (
	portCapability struct {
		HostPort      uint16 `json:"hostPort"`
		ContainerPort uint16 `json:"containerPort"`
		Protocol      string `json:"protocol"`
		HostIP        string `json:"hostIP"`
	}
	bandwidthCapability struct {
		IngressRate  uint64 `json:"ingressRate"`
		IngressBurst uint64 `json:"ingressBurst"`
		EgressRate   uint64 `json:"egressRate"`
		EgressBurst  uint64 `json:"egressBurst"`
	}
	dnsCapability struct {
		Servers  []string `json:"servers"`
		Searches []string `json:"searches"`
		Options  []string `json:"options"`
	}
)

func capabilitiesOf(r network.Request) map[string]any {
	caps := map[string]any{"io.kubernetes.cri.pod-annotations": r.Annotations}
	var ports []portCapability
	for _, p := range r.Ports {
		c := portCapability{HostPort: p.HostPort, ContainerPort: p.ContainerPort, Protocol: strings.ToLower(p.Protocol)}
		if p.HostIP.IsValid() {
			c.HostIP = p.HostIP.String()
		}
		ports = append(ports, c)
	}
	if len(ports) > 0 {
		caps["portMappings"] = ports
	}
	if b := r.Bandwidth; b != nil && (b.IngressRate > 0 || b.EgressRate > 0) {
		c := bandwidthCapability{IngressRate: b.IngressRate, EgressRate: b.EgressRate}
		if c.IngressRate > 0 {
			c.IngressBurst = math.MaxUint32
		}
		if c.EgressRate > 0 {
			c.EgressBurst = math.MaxUint32
		}
		caps["bandwidth"] = c
	}
	if d := r.DNS; d != nil {
		caps["dns"] = dnsCapability{Servers: d.Servers, Searches: d.Searches, Options: d.Options}
	}
	if r.CgroupPath != "" {
		caps["cgroupPath"] = r.CgroupPath
	}
	return caps
}

// result reads what matters out of the first network's result.
func (a *Attacher) result(networks []confNetwork, results []types.Result) (*network.Result, error) {
	where := fmt.Sprintf("cni network %s (%s)", networks[0].list.Name, networks[0].file)
	cur, err := types100.NewResultFromResult(results[0])
	if err != nil {
		return nil, fmt.Errorf("%s: result: %w", where, err)
	}
	versioned, err := cur.GetAsVersion(resultVersion)
	if err != nil {
		return nil, fmt.Errorf("%s: result: %w", where, err)
	}
	res := &network.Result{Interface: mainInterface}
	if res.Raw, err = json.Marshal(versioned); err != nil {
		return nil, fmt.Errorf("%s: result: %w", where, err)
	}
	for _, ip := range cur.IPs {
		if i := ip.Interface; i != nil {
			if *i < 0 || *i >= len(cur.Interfaces) {
				return nil, fmt.Errorf("%s: result has the address %s on interface %d of %d", where, ip.Address.String(), *i, len(cur.Interfaces))
			}
			if cur.Interfaces[*i].Name != mainInterface {
				continue
			}
		}
		addr, ok := netip.AddrFromSlice(ip.Address.IP)
		if !ok {
			return nil, fmt.Errorf("%s: result has an address that is none", where)
		}
		res.IPs = append(res.IPs, addr.Unmap())
	}
	if len(res.IPs) == 0 {
		return nil, fmt.Errorf("%s gave %s of the pod no address: its plugins lack ipam: %w", where, mainInterface, errdefs.ErrFailedPrecondition)
	}
	preferFamily(res.IPs, a.now.Load().o.IPPref)
	res.DNS = network.DNS{Servers: cur.DNS.Nameservers, Searches: cur.DNS.Search, Options: cur.DNS.Options}
	return res, nil
}

// preferFamily moves the first address of the preferred family to the front.
func preferFamily(ips []netip.Addr, pref string) {
	if pref == "cni" {
		return
	}
	i := slices.IndexFunc(ips, func(a netip.Addr) bool { return a.Is4() == (pref != "ipv6") })
	if i > 0 {
		first := ips[i]
		copy(ips[1:i+1], ips[:i])
		ips[0] = first
	}
}

// Detach implements network.Attacher.
func (a *Attacher) Detach(ctx context.Context, r network.Request) error {
	if err := checkID(r); err != nil {
		return fmt.Errorf("detach sandbox %.80s: %w", r.ID, err)
	}
	rec, networks, err := a.attachment(r)
	if err == nil {
		err = a.delAll(ctx, r, rec, networks)
	}
	if err != nil {
		return fmt.Errorf("detach sandbox %s: %w", r.ID, err)
	}
	return nil
}

// attachment finds out what was done for a sandbox. Without a record, as after
// a reboot, the networks in force are the best guess; without those there is
// only what the built-in plugins keep.
func (a *Attacher) attachment(r network.Request) (record, []confNetwork, error) {
	stored, err := a.records.read(r.ID)
	if err != nil {
		return record{}, nil, err
	}
	if stored != nil {
		networks, err := stored.networks()
		return *stored, networks, err
	}
	networks, err := a.now.Load().folderOf(r.Handler).inForce()
	if err != nil {
		a.log.Warn("detaching without a network configuration", "sandbox", r.ID, "err", err)
		networks = nil
	}
	return record{ID: r.ID, Args: argsOf(r), Capabilities: capabilitiesOf(r)}, networks, nil
}

// delAll runs DEL for every network, last first, and forgets the attachment
// when all is done. One that fails does not keep the others from it.
func (a *Attacher) delAll(ctx context.Context, r network.Request, rec record, networks []confNetwork) error {
	netns := r.NetNS
	if ns, err := link.OpenNetNS(netns); err == nil {
		ns.Close()
	} else if errors.Is(err, fs.ErrNotExist) {
		netns = "" // so the protocol says that it is gone
	}
	var errs []error
	for i := len(networks) - 1; i >= 0; i-- {
		n := networks[i]
		if i == 0 {
			a.supplyCache(r, rec, n)
		}
		if err := a.now.Load().lib.DelNetworkList(ctx, n.list, runtimeConf(netns, rec, n)); err != nil {
			errs = append(errs, fmt.Errorf("cni network %s (%s): %w", n.list.Name, n.file, typed(err)))
		}
	}
	if len(networks) == 0 {
		errs = append(errs, a.plugins.Forget(ctx, r.ID, mainInterface))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return a.records.remove(rec.ID)
}

// supplyCache puts the result that the caller kept where the library looks for
// prevResult, if it is not there.
func (a *Attacher) supplyCache(r network.Request, rec record, n confNetwork) {
	if len(r.Cached) == 0 || !json.Valid(r.Cached) {
		return
	}
	path := filepath.Join(a.now.Load().o.CacheDir, "results", n.list.Name+"-"+rec.ID+"-"+n.ifName)
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return
	}
	data, err := json.Marshal(map[string]any{
		"kind": libcni.CNICacheV1, "containerId": rec.ID, "ifName": n.ifName, "networkName": n.list.Name,
		"config": []byte(n.raw), "cniArgs": rec.Args, "capabilityArgs": rec.Capabilities, "result": r.Cached,
	})
	if err == nil {
		err = os.MkdirAll(filepath.Dir(path), 0o700)
	}
	if err == nil {
		err = os.WriteFile(path, data, 0o600)
	}
	if err != nil {
		a.log.Warn("plugins will not be told the result of the attachment", "sandbox", rec.ID, "err", err)
	}
}

// Check runs CHECK for every network of an attached sandbox.
func (a *Attacher) Check(ctx context.Context, r network.Request) error {
	rec, networks, err := a.attachment(r)
	if err != nil {
		return fmt.Errorf("check sandbox %s: %w", r.ID, err)
	}
	for _, n := range networks {
		if err := a.now.Load().lib.CheckNetworkList(ctx, n.list, runtimeConf(r.NetNS, rec, n)); err != nil {
			return fmt.Errorf("check sandbox %s: cni network %s (%s): %w", r.ID, n.list.Name, n.file, typed(err))
		}
	}
	return nil
}
