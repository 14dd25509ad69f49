package plugin

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/plugins/plugins/ipam/host-local/backend/allocator"
)

// hostLocal gives addresses out of ranges, kept in files.
type hostLocal struct{ *Set }

func (p hostLocal) add(ctx context.Context, c Call) (_ types.Result, err error) {
	conf, _, err := allocator.LoadIPAMConfig(c.Stdin, c.Args)
	if err != nil {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "host-local", err.Error())
	}
	res := &types100.Result{CNIVersion: types100.ImplementedSpecVersion, Routes: conf.Routes}
	if conf.ResolvConf != "" {
		if res.DNS, err = readResolvConf(conf.ResolvConf); err != nil {
			return nil, err
		}
	}
	store, err := p.stores.open(ctx, conf.DataDir, conf.Name)
	if err != nil {
		return nil, err
	}
	defer store.Close()
	requested := map[string]net.IP{}
	for _, ip := range conf.IPArgs {
		requested[ip.String()] = ip
	}
	taken := false
	defer func() {
		if err != nil && taken {
			err = errors.Join(err, p.release(store, c))
		}
	}()
	for i := range conf.Ranges {
		var want net.IP
		for k, ip := range requested {
			if conf.Ranges[i].Contains(ip) {
				want = ip
				delete(requested, k)
				break
			}
		}
		ip, err := allocator.NewIPAllocator(&conf.Ranges[i], store, i).Get(c.ContainerID, c.IfName, want)
		if err != nil {
			return nil, fmt.Errorf("host-local: network %s, range %d: %w", conf.Name, i, err)
		}
		taken = true
		res.IPs = append(res.IPs, ip)
	}
	if len(requested) > 0 {
		return nil, fmt.Errorf("host-local: network %s has no range with the requested %s",
			conf.Name, strings.Join(slices.Sorted(maps.Keys(requested)), ", "))
	}
	return res, nil
}

// locked runs f on the call's network with its store locked.
func (p hostLocal) locked(ctx context.Context, c Call, f func(conf *allocator.IPAMConfig, s *store) error) error {
	conf, _, err := allocator.LoadIPAMConfig(c.Stdin, c.Args)
	if err != nil {
		return types.NewError(types.ErrInvalidNetworkConfig, "host-local", err.Error())
	}
	store, err := p.stores.open(ctx, conf.DataDir, conf.Name)
	if err != nil {
		return err
	}
	defer store.Close()
	if err := store.Lock(); err != nil {
		return err
	}
	return errors.Join(f(conf, store), store.Unlock())
}

func (p hostLocal) del(ctx context.Context, c Call) error {
	return p.locked(ctx, c, func(_ *allocator.IPAMConfig, s *store) error { return s.ReleaseByID(c.ContainerID, c.IfName) })
}

func (p hostLocal) release(store *store, c Call) error {
	if err := store.Lock(); err != nil {
		return err
	}
	return errors.Join(store.ReleaseByID(c.ContainerID, c.IfName), store.Unlock())
}

func (p hostLocal) check(ctx context.Context, c Call) error {
	return p.locked(ctx, c, func(conf *allocator.IPAMConfig, s *store) error {
		if len(s.GetByID(c.ContainerID, c.IfName)) == 0 {
			return fmt.Errorf("host-local: network %s has no address for %s", conf.Name, c.ContainerID)
		}
		return nil
	})
}

// gc gives back what belongs to no valid attachment.
func (p hostLocal) gc(ctx context.Context, c Call, valid []types.GCAttachment) error {
	return p.locked(ctx, c, func(_ *allocator.IPAMConfig, s *store) error {
		var errs []error
		for _, h := range s.holders() {
			if !slices.Contains(valid, types.GCAttachment{ContainerID: h.id, IfName: h.ifName}) {
				errs = append(errs, s.ReleaseByID(h.id, h.ifName))
			}
		}
		return errors.Join(errs...)
	})
}

// readResolvConf reads the DNS settings of a file in resolv.conf's form.
func readResolvConf(path string) (types.DNS, error) {
	var dns types.DNS
	f, err := os.Open(path)
	if err != nil {
		return dns, fmt.Errorf("host-local: resolvConf: %w", err)
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		fields := strings.Fields(sc.Text())
		if len(fields) < 2 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		switch fields[0] {
		case "nameserver":
			dns.Nameservers = append(dns.Nameservers, fields[1])
		case "domain":
			dns.Domain = fields[1]
		case "search":
			dns.Search = append(dns.Search, fields[1:]...)
		case "options":
			dns.Options = append(dns.Options, fields[1:]...)
		}
	}
	if err := sc.Err(); err != nil {
		return dns, fmt.Errorf("host-local: read %s: %w", path, err)
	}
	return dns, nil
}
