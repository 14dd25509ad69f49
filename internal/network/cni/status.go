package cni

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"

	"cloister.dev/internal/network/cni/plugin"
)

const (
	// statusAge is how long the plugins' word is good: asking a program for
	// each poll of the kubelet would be dear.
	statusAge  = 10 * time.Second
	statusTime = 5 * time.Second
)

// statusCache keeps what the plugins said of themselves.
type statusCache struct {
	mu   sync.Mutex
	when time.Time
	err  error
}

func (c *statusCache) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.when = time.Time{}
}

// Ready implements network.Attacher: there is a configuration, its programs
// are there, and those that can tell say that they are ready. A handler's own
// folder counts when a pod of that handler is attached.
func (a *Attacher) Ready() error {
	set := a.now.Load()
	f := set.main
	networks, err := f.inForce()
	if err != nil {
		return err
	}
	exec := &executor{plugins: a.plugins, path: set.o.BinDirs}
	for _, typ := range pluginTypes(networks) {
		if _, err := exec.FindInPath(typ, set.o.BinDirs); err != nil {
			return fmt.Errorf("cni: %w", err)
		}
	}
	f.status.mu.Lock()
	defer f.status.mu.Unlock()
	if time.Since(f.status.when) > statusAge {
		f.status.err = a.askStatus(networks)
		f.status.when = time.Now()
	}
	return f.status.err
}

// askStatus runs STATUS, which version 1.1.0 of the specification brought.
func (a *Attacher) askStatus(networks []confNetwork) error {
	ctx, cancel := context.WithTimeout(context.Background(), statusTime)
	defer cancel()
	for _, n := range networks {
		err := a.now.Load().lib.GetStatusNetworkList(ctx, n.list)
		var e *types.Error
		if errors.As(err, &e) && (e.Code == types.ErrInvalidEnvironmentVariables || e.Code == types.ErrIncompatibleCNIVersion) {
			continue // the program is older than its configuration says
		}
		if err != nil {
			return fmt.Errorf("cni network %s (%s) is not ready: %w", n.list.Name, n.file, typed(err))
		}
	}
	return nil
}

// Allocations implements network.Attacher. Addresses of other runtimes that
// share a network are not among them.
func (a *Attacher) Allocations(ctx context.Context) ([]string, error) {
	ids, err := a.records.ids()
	if err != nil {
		return nil, fmt.Errorf("list allocations: %w", err)
	}
	owners, err := a.rules.Owners(ctx)
	if err != nil {
		return nil, fmt.Errorf("list allocations: %w", err)
	}
	for _, o := range owners {
		ids = append(ids, plugin.OwnerID(o))
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// AddressHolders lists all containers that hold an address of a network in
// force in host-local's files: also those of other runtimes, so it is for
// reports and not for cleaning up.
func (a *Attacher) AddressHolders() ([]string, error) {
	networks, err := a.now.Load().allInForce()
	if errdefs.IsUnavailable(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	ids := map[string]bool{}
	for _, n := range networks {
		for _, p := range n.list.Plugins {
			if p.Network.IPAM.Type != "host-local" {
				continue
			}
			held, err := plugin.Holders(p.Bytes)
			if err != nil {
				return nil, err
			}
			for _, id := range held[n.list.Name] {
				ids[id] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(ids)), nil
}

// GC has the plugins give back what belongs to none of the sandboxes. It must
// not run while another runtime shares the networks.
func (a *Attacher) GC(ctx context.Context, keep []string) error {
	networks, err := a.now.Load().allInForce()
	if err != nil {
		return fmt.Errorf("collect network garbage: %w", err)
	}
	var errs []error
	for _, n := range networks {
		args := &libcni.GCArgs{}
		for _, id := range keep {
			args.ValidAttachments = append(args.ValidAttachments, types.GCAttachment{ContainerID: id, IfName: n.ifName})
		}
		if err := a.now.Load().lib.GCNetworkList(ctx, n.list, args); err != nil {
			errs = append(errs, fmt.Errorf("cni network %s (%s): %w", n.list.Name, n.file, err))
		}
	}
	return errors.Join(errs...)
}
