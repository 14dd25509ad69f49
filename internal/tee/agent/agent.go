// Package agent puts the rooms of tee together: backends, inventory, device
// plugin, the Node object and the status socket. The daemon and "cloister
// device-plugin" run the same agent.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/tee"
	"cloister.dev/internal/tee/backend"
	"cloister.dev/internal/tee/kubenode"
	"cloister.dev/internal/tee/plugin"
)

// Options of an Agent.
type Options struct {
	// Backends by name; empty takes those whose technology the machine has.
	Backends       []string
	Backend        backend.Options
	HealthInterval time.Duration
	Recover        int // see tee.Options
	PluginDir      string
	CDIDir         string
	MaxDevices     int
	StatusSocket   string // empty serves none
	MetricsAddress string // TCP; empty serves none
	Kubeconfig     string // empty leaves the Node object alone
	NodeName       string
	Version        string
	Log            *slog.Logger
}

// Agent is made by New and works in Run.
type Agent struct {
	o        Options
	backends []tee.Backend
	inv      *tee.Inventory
	plugin   *plugin.Plugin
	node     *kubenode.Client // nil: the Node object is left alone
	changes  chan tee.Change
}

// New judges the options and makes what Run needs.
func New(o Options) (*Agent, error) {
	if len(o.Backends) == 0 {
		o.Backends = backend.Auto(o.Backend.Machine)
		if len(o.Backends) == 0 {
			return nil, fmt.Errorf("no trusted execution technology was found on this machine; name backends to wait for one, or the backend sim to try without: %w", errdefs.ErrNotFound)
		}
	}
	a := &Agent{o: o, changes: make(chan tee.Change, 64)}
	var err error
	if a.backends, err = backend.Open(o.Backends, o.Backend); err != nil {
		return nil, err
	}
	if o.Kubeconfig != "" {
		if a.node, err = kubenode.Open(o.Kubeconfig, o.NodeName); err != nil {
			return nil, err
		}
	}
	metrics := plugin.NewMetrics(nil)
	a.inv = tee.New(a.backends, tee.Options{Interval: o.HealthInterval, Recover: o.Recover, Log: o.Log,
		OnCheck: metrics.Checked, OnChange: func(c tee.Change) { metrics.Changed(c); a.note(c) }})
	metrics.Watch(a.inv)
	a.plugin = plugin.New(a.inv, plugin.Options{Dir: o.PluginDir, CDIDir: o.CDIDir, MaxDevices: o.MaxDevices, Metrics: metrics, Log: o.Log})
	return a, nil
}

// Inventory is what the agent knows of the machine.
func (a *Agent) Inventory() *tee.Inventory { return a.inv }

// Run works until ctx ends.
func (a *Agent) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	servers, err := a.listen(ctx)
	if err != nil {
		return err
	}
	a.o.Log.Info("device plugin", "backends", a.o.Backends, "folder", a.o.PluginDir, "status", a.o.StatusSocket)
	var all sync.WaitGroup
	all.Go(func() { a.inv.Run(ctx) })
	all.Go(func() { a.plugin.Run(ctx) })
	all.Go(func() { a.writeNode(ctx) })
	<-ctx.Done()
	for _, s := range servers {
		err = errors.Join(err, s.Close())
	}
	all.Wait()
	for _, b := range a.backends {
		if c, ok := b.(interface{ Close() error }); ok {
			err = errors.Join(err, c.Close())
		}
	}
	return err
}

// listen serves status and metrics.
func (a *Agent) listen(ctx context.Context) ([]*http.Server, error) {
	handler, err := a.plugin.Handler(a.o.Version)
	if err != nil {
		return nil, err
	}
	var listeners []net.Listener
	if a.o.StatusSocket != "" {
		l, err := statusSocket(ctx, a.o.StatusSocket)
		if err != nil {
			return nil, err
		}
		listeners = append(listeners, l)
	}
	if a.o.MetricsAddress != "" {
		l, err := net.Listen("tcp", a.o.MetricsAddress)
		if err != nil {
			for _, l := range listeners {
				l.Close()
			}
			return nil, fmt.Errorf("metrics_address: %w", err)
		}
		listeners = append(listeners, l)
	}
	var servers []*http.Server
	for _, l := range listeners {
		s := &http.Server{Handler: handler, ReadHeaderTimeout: 5 * time.Second}
		servers = append(servers, s)
		go func() {
			if err := s.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
				a.o.Log.Warn("status server ended", "err", err)
			}
		}()
	}
	return servers, nil
}

// statusSocket takes the socket, unless another plugin has it.
func statusSocket(ctx context.Context, path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, fmt.Errorf("folder of the status socket: %w", err)
	}
	if _, err := plugin.ReadStatus(ctx, path); err == nil {
		return nil, fmt.Errorf("another device plugin is running, at %s: %w", path, errdefs.ErrAlreadyExists)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove the stale status socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("status socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("restrict the status socket: %w", err)
	}
	return l, nil
}
