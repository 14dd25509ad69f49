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
	"maps"
	"path/filepath"
	"slices"
	"sync/atomic"

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
	MaxConfNum int
	// Handlers have folders of their own in place of ConfDir, by the handler's name.
	Handlers map[string]Folder
	// ConfTemplate is a Go template of a file in ConfDir; see SetPodRanges.
	ConfTemplate  string
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
	log     *slog.Logger
	node    *link.Node
	rules   nat.Rules
	plugins *plugin.Set
	records records
	now     atomic.Pointer[setup]
	ranges  podRanges
}

// setup is what follows of Options. It never changes: Reconfigure makes a new
// one, and who works with the old one ends with it.
type setup struct {
	o       Options
	lib     *libcni.CNIConfig
	main    *folder            // of handlers that have none of their own
	folders map[string]*folder // by handler
}

var _ network.Attacher = (*Attacher)(nil)

// New starts to follow the configuration folder, which may be absent for now.
func New(o Options) (_ *Attacher, err error) {
	o, err = complete(o)
	if err != nil {
		return nil, fmt.Errorf("cni: %w", err)
	}
	a := &Attacher{log: o.Log}
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
	a.now.Store(a.setUp(o, &setup{}))
	return a, nil
}

// setUp makes what follows of the options. Folders that the old setup follows
// already are taken over.
func (a *Attacher) setUp(o Options, old *setup) *setup {
	known := old.allFolders()
	open := func(at Folder) *folder {
		for _, f := range known {
			if f.Folder == at {
				return f
			}
		}
		f := openFolder(at, a.log)
		known = append(known, f)
		return f
	}
	s := &setup{o: o, folders: map[string]*folder{}}
	s.lib = libcni.NewCNIConfigWithCacheDir(o.BinDirs, o.CacheDir, &executor{plugins: a.plugins, path: o.BinDirs})
	s.main = open(Folder{Dir: o.ConfDir, MaxConfNum: o.MaxConfNum})
	for handler, f := range o.Handlers {
		s.folders[handler] = open(f)
	}
	return s
}

// Reconfigure replaces the options but for the folders of state, which stay
// what they were. Attached pods stay attached. On error nothing is changed.
// The caller serialises calls.
func (a *Attacher) Reconfigure(o Options) error {
	old := a.now.Load()
	o.CacheDir, o.StateDir, o.Log = old.o.CacheDir, old.o.StateDir, old.o.Log
	o, err := complete(o)
	if err != nil {
		return fmt.Errorf("cni: %w", err)
	}
	next := a.setUp(o, old)
	a.now.Store(next)
	var errs []error
	for _, f := range old.allFolders() {
		if !slices.Contains(next.allFolders(), f) {
			errs = append(errs, f.close())
		}
	}
	if err := errors.Join(errs...); err != nil {
		a.log.Warn("stop following a cni config folder", "err", err)
	}
	if err := a.renderAgain(); err != nil {
		a.log.Error("cni config not made of the template", "err", err)
	}
	return nil
}

// folderOf gives the folder with the networks of a handler.
func (s *setup) folderOf(handler string) *folder {
	if f := s.folders[handler]; f != nil {
		return f
	}
	return s.main
}

// allFolders lists each folder once, the main one first.
func (s *setup) allFolders() []*folder {
	if s.main == nil {
		return nil
	}
	all := []*folder{s.main}
	for _, handler := range slices.Sorted(maps.Keys(s.folders)) {
		if f := s.folders[handler]; !slices.Contains(all, f) {
			all = append(all, f)
		}
	}
	return all
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
	for _, n := range append(slices.Collect(maps.Values(o.Handlers)), Folder{MaxConfNum: o.MaxConfNum}) {
		if n.MaxConfNum < 0 {
			return o, fmt.Errorf("max_conf_num %d is negative: %w", n.MaxConfNum, errdefs.ErrInvalidArgument)
		}
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

// Reload reads the configuration folders. It is called by itself on changes.
func (a *Attacher) Reload() {
	for _, f := range a.now.Load().allFolders() {
		f.reload()
	}
}

// LoadError is why the newest state of the configuration folders is not in
// force, or nil.
func (a *Attacher) LoadError() error {
	var errs []error
	for _, f := range a.now.Load().allFolders() {
		_, err := f.get()
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Close implements network.Attacher.
func (a *Attacher) Close() error {
	var err error
	for _, f := range a.now.Load().allFolders() {
		err = errors.Join(err, f.close())
	}
	return errors.Join(err, a.node.Close(), a.rules.Close())
}

// Settle waits until the interfaces of detached sandboxes are gone from the
// node; Detach only cuts them off.
func (a *Attacher) Settle(ctx context.Context) error { return a.node.Settle(ctx) }

// Networks lists the files in force, by name, those of handlers last.
func (a *Attacher) Networks() []string {
	var out []string
	for _, f := range a.now.Load().allFolders() {
		networks, _ := f.get()
		for _, n := range networks {
			out = append(out, n.file)
		}
	}
	return out
}
