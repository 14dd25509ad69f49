package plugin

import (
	"cmp"
	"context"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"

	"cloister.dev/internal/tee"
)

// DefaultDir is kubelet's folder for device plugins, which it does not move.
const DefaultDir = "/var/lib/kubelet/device-plugins"

// Options of a Plugin.
type Options struct {
	// Dir is kubelet's folder; empty is DefaultDir.
	Dir string
	// CDIDir is where CDI specifications are written; empty writes none.
	CDIDir string
	// MaxDevices is the most units of one resource; 0 is DefaultMaxDevices.
	MaxDevices int
	Metrics    *Metrics // may be nil
	Log        *slog.Logger
}

// Plugin offers what an inventory knows.
type Plugin struct {
	o       Options
	inv     *tee.Inventory
	metrics *Metrics
	log     *slog.Logger

	mu        sync.Mutex // guards endpoints
	endpoints map[string]*endpoint
}

// New makes a plugin that Run lets work.
func New(inv *tee.Inventory, o Options) *Plugin {
	if o.Dir == "" {
		o.Dir = DefaultDir
	}
	if o.MaxDevices <= 0 {
		o.MaxDevices = DefaultMaxDevices
	}
	if o.Metrics == nil {
		o.Metrics = NewMetrics(inv)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Plugin{o: o, inv: inv, metrics: o.Metrics, log: o.Log, endpoints: map[string]*endpoint{}}
}

func (p *Plugin) kubeletSocket() string { return filepath.Join(p.o.Dir, "kubelet.sock") }

// Run offers every resource that the inventory knows, from when it knows it,
// until ctx ends.
func (p *Plugin) Run(ctx context.Context) {
	var all sync.WaitGroup
	all.Go(func() { p.watchFolder(ctx) })
	for {
		states, changed := p.inv.States()
		for _, s := range states {
			for _, r := range s.Resources {
				if e := p.endpoint(r); e != nil {
					all.Go(func() { e.run(ctx) })
				}
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			all.Wait()
			return
		}
	}
}

// endpoint brings the endpoint of a resource up to date; a new one is returned.
func (p *Plugin) endpoint(r tee.ResourceState) *endpoint {
	if r.Model == tee.Bytes {
		return nil // a figure of the node, nothing to hand out
	}
	p.mu.Lock()
	e := p.endpoints[r.Name]
	p.mu.Unlock()
	if e != nil {
		e.update(r)
		return nil
	}
	e = newEndpoint(p, r)
	p.mu.Lock()
	p.endpoints[r.Name] = e
	p.mu.Unlock()
	return e
}

func (p *Plugin) all() []*endpoint {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.SortedFunc(maps.Values(p.endpoints), func(a, b *endpoint) int { return cmp.Compare(a.name, b.name) })
}

// watchFolder wakes the endpoints when sockets come and go. They look by
// themselves, too, so that a lost event costs seconds only.
func (p *Plugin) watchFolder(ctx context.Context) {
	for ctx.Err() == nil {
		if err := p.watchOnce(ctx); err != nil {
			p.log.Debug("watch kubelet's folder", "folder", p.o.Dir, "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(lastRetry):
		}
	}
}

func (p *Plugin) watchOnce(ctx context.Context) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	defer w.Close()
	if err := w.Add(p.o.Dir); err != nil {
		return err
	}
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case e := <-w.Events:
			if e.Has(fsnotify.Create) || e.Has(fsnotify.Remove) {
				kubelet := filepath.Base(e.Name) == filepath.Base(p.kubeletSocket())
				for _, x := range p.all() {
					if kubelet || e.Name == x.socket {
						x.nudge()
					}
					if kubelet && e.Has(fsnotify.Create) {
						put(x.came)
					}
				}
			}
		case err := <-w.Errors:
			return err
		case <-tick.C:
			if len(w.WatchList()) == 0 {
				return os.ErrNotExist // the folder itself was replaced
			}
		}
	}
}
