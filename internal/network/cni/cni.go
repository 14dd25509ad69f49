// Package cni attaches pods to the networks of the node's CNI configuration,
// as users of the kubelet know it: /etc/cni/net.d, /opt/cni/bin, lists of
// plugins, capabilities.
//
// The standard plugin types run inside the process (package plugin), with the
// same configuration and the same state on disk as their programs; other types
// are executed. A change in the configuration folder takes effect at once; a
// file that cannot be used leaves what was in force, and is told by LoadError.
//
// It promises that DEL is given the configuration of the ADD, whatever happened
// to the folder and to the process in between.
package cni

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"

	"cloister.dev/internal/network"
	"cloister.dev/internal/network/cni/plugin"
	"cloister.dev/internal/network/link"
	"cloister.dev/internal/network/nat"
)

// Options are those of containerd's CNI table, and where state goes.
type Options struct {
	ConfDir string   // default /etc/cni/net.d
	BinDirs []string // default /opt/cni/bin
	// MaxConfNum is how many files of the folder are used, by name; 0: all.
	MaxConfNum    int
	SetupSerially bool
	// IPPref is which address of the pod comes first: "ipv4" (or ""), "ipv6",
	// or "cni" for the plugins' order.
	IPPref   string
	CacheDir string // libcni's results; default: below StateDir
	StateDir string // default /var/lib/cni/cloister
	Log      *slog.Logger
}

// Attacher implements network.Attacher.
type Attacher struct {
	o       Options
	log     *slog.Logger
	node    *link.Node
	rules   nat.Rules
	lib     *libcni.CNIConfig
	plugins *plugin.Set
	records records
	watch   *watcher

	mu       sync.Mutex
	networks []confNetwork // replaced, never changed
	loadErr  error

	status statusCache
}

var _ network.Attacher = (*Attacher)(nil)

// New starts to follow the configuration folder, which may be absent for now.
func New(o Options) (_ *Attacher, err error) {
	o, err = complete(o)
	if err != nil {
		return nil, fmt.Errorf("cni: %w", err)
	}
	a := &Attacher{o: o, log: o.Log}
	if a.records, err = openRecords(filepath.Join(o.StateDir, "attachments")); err != nil {
		return nil, fmt.Errorf("cni: %w", err)
	}
	if a.node, err = link.Open(o.Log); err != nil {
		return nil, fmt.Errorf("cni: %w", err)
	}
	if a.rules, err = nat.Open(tableName(o.StateDir), o.Log); err != nil {
		return nil, fmt.Errorf("cni: %w", errors.Join(err, a.node.Close()))
	}
	a.plugins = plugin.New(a.node, a.rules, o.Log)
	a.lib = libcni.NewCNIConfigWithCacheDir(o.BinDirs, o.CacheDir, &executor{plugins: a.plugins, path: o.BinDirs})
	a.Reload()
	if a.watch, err = watch(o.ConfDir, a.Reload); err != nil {
		// Without it the folder is read when there is need.
		a.log.Warn("changes of the cni config folder will not be noticed", "dir", o.ConfDir, "err", err)
	}
	return a, nil
}

func complete(o Options) (Options, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.ConfDir == "" {
		o.ConfDir = "/etc/cni/net.d"
	}
	if len(o.BinDirs) == 0 {
		o.BinDirs = []string{"/opt/cni/bin"}
	}
	if o.StateDir == "" {
		o.StateDir = "/var/lib/cni/cloister"
	}
	if o.CacheDir == "" {
		o.CacheDir = filepath.Join(o.StateDir, "cache")
	}
	if o.MaxConfNum < 0 {
		return o, fmt.Errorf("max_conf_num %d is negative: %w", o.MaxConfNum, errdefs.ErrInvalidArgument)
	}
	switch o.IPPref {
	case "", "ipv4", "ipv6", "cni":
	default:
		return o, fmt.Errorf("ip_pref %q is not ipv4, ipv6 or cni: %w", o.IPPref, errdefs.ErrInvalidArgument)
	}
	return o, nil
}

// tableName keeps instances apart that live side by side.
func tableName(stateDir string) string {
	sum := sha256.Sum256([]byte(filepath.Clean(stateDir)))
	return "cloister-cni-" + hex.EncodeToString(sum[:4])
}

// Reload reads the configuration folder. It is called by itself on changes.
func (a *Attacher) Reload() {
	networks, err := loadFolder(a.o.ConfDir, a.o.MaxConfNum)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.loadErr = err
	if err != nil {
		a.log.Error("cni config not loaded", "dir", a.o.ConfDir, "in_force", len(a.networks), "err", err)
		return
	}
	if !slices.EqualFunc(networks, a.networks, func(x, y confNetwork) bool { return x.file == y.file && string(x.raw) == string(y.raw) }) {
		var files []string
		for _, n := range networks {
			files = append(files, n.file)
		}
		a.log.Info("cni config loaded", "files", files)
	}
	a.networks = networks
	a.status.forget()
}

// LoadError is why the newest state of the configuration folder is not in
// force, or nil.
func (a *Attacher) LoadError() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.loadErr
}

// inForce returns the networks, reading the folder again while there are none.
func (a *Attacher) inForce() ([]confNetwork, error) {
	get := func() ([]confNetwork, error) {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.networks, a.loadErr
	}
	networks, err := get()
	if len(networks) == 0 {
		a.Reload()
		networks, err = get()
	}
	switch {
	case len(networks) > 0:
		return networks, nil
	case err != nil:
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	return nil, fmt.Errorf("cni config not found in %s: put a .conflist there or set network = \"builtin\": %w", a.o.ConfDir, errdefs.ErrUnavailable)
}

// Close implements network.Attacher.
func (a *Attacher) Close() error {
	var err error
	if a.watch != nil {
		err = a.watch.close()
	}
	return errors.Join(err, a.node.Close(), a.rules.Close())
}

// Settle waits until the interfaces of detached sandboxes are gone from the
// node; Detach only cuts them off.
func (a *Attacher) Settle(ctx context.Context) error { return a.node.Settle(ctx) }

// Networks lists the files in force, by name.
func (a *Attacher) Networks() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []string
	for _, n := range a.networks {
		out = append(out, n.file)
	}
	return out
}
