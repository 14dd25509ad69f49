package image

import (
	"archive/tar"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	continuityfs "github.com/containerd/continuity/fs"
	"github.com/containerd/continuity/sysx"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Layers are unpacked at the same time, each without knowledge of those below
// it. A layer that holds "srv/data/x" but names neither folder leaves open
// what these look like: as in the layers below, where they exist there. That
// is made good when the layer is committed, for then those below it are.

// names remembers the folders of an archive.
type names struct {
	dirs    map[string]bool // named by an entry of their own
	parents map[string]bool // of any entry
}

func newNames() *names {
	return &names{dirs: make(map[string]bool), parents: make(map[string]bool)}
}

func (n *names) header(h *tar.Header) {
	name := path.Clean("/" + h.Name)
	if h.Typeflag == tar.TypeDir {
		n.dirs[name] = true
	}
	for dir := path.Dir(name); dir != "/" && !n.parents[dir]; dir = path.Dir(dir) {
		n.parents[dir] = true
	}
}

// unnamed are the folders that the archive needs and does not describe, outer
// ones first.
func (n *names) unnamed() []string {
	var out []string
	for p := range n.parents {
		if !n.dirs[p] {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b string) int {
		return cmp.Or(cmp.Compare(strings.Count(a, "/"), strings.Count(b, "/")), cmp.Compare(a, b))
	})
	return out
}

// unnamedDirs keeps the unnamed folders of layers, by upper directory, until
// the layers are committed.
type unnamedDirs struct {
	stay  bool // committed layers stay where they were unpacked
	mu    sync.Mutex
	upper map[string][]string
	below map[string][]string // directories of a layer that was committed and of those below it, nearest first
}

func (u *unnamedDirs) add(upper string, dirs []string) {
	if len(dirs) == 0 {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.upper == nil {
		u.upper = make(map[string][]string)
	}
	u.upper[upper] = dirs
}

func (u *unnamedDirs) take(upper string) []string {
	u.mu.Lock()
	defer u.mu.Unlock()
	dirs := u.upper[upper]
	delete(u.upper, upper)
	return dirs
}

// committed remembers where a layer is, when those below it are known.
func (u *unnamedDirs) committed(name, parent, dir string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	below, ok := u.below[parent]
	if parent != "" && !ok || dir == "" || !u.stay {
		return
	}
	if u.below == nil {
		u.below = make(map[string][]string)
	}
	u.below[name] = append([]string{dir}, below...)
}

func (u *unnamedDirs) known(name string) ([]string, bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	dirs, ok := u.below[name]
	return dirs, ok
}

// layering is a snapshotter that layers of an image are committed to. Where
// they were unpacked without those below them it completes their folders, and
// it marks those that were decrypted.
type layering struct {
	snapshots.Snapshotter
	dirs      *unnamedDirs    // nil: each layer is unpacked on those below it
	decrypted map[string]bool // by name
	lowest    string          // name of the layer with none below it
}

// Prepare tells the applier, by the kind of mount, whether there will be a
// layer below.
func (l layering) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	mounts, err := l.Snapshotter.Prepare(ctx, key, parent, opts...)
	if err != nil || l.dirs == nil || len(mounts) != 1 || mounts[0].Type != "bind" {
		return mounts, err
	}
	var info snapshots.Info
	for _, o := range opts {
		if err := o(&info); err != nil {
			return nil, err
		}
	}
	if info.Labels[snapshots.LabelSnapshotRef] != l.lowest {
		mounts = []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{"upperdir=" + mounts[0].Source}}}
	}
	return mounts, nil
}

func (l layering) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	var info snapshots.Info
	for _, o := range opts {
		if err := o(&info); err != nil {
			return err
		}
	}
	var dir string
	if l.dirs != nil {
		var err error
		if dir, err = l.upper(ctx, key); err != nil {
			return err
		}
		if err := l.complete(ctx, key, info.Parent, dir); err != nil {
			return fmt.Errorf("folders of layer %s: %w", name, err)
		}
	}
	if l.decrypted[name] {
		opts = append(slices.Clone(opts), snapshots.WithLabels(map[string]string{labelDecrypted: "1"}))
	}
	if err := l.Snapshotter.Commit(ctx, name, key, opts...); err != nil {
		return err
	}
	if l.dirs != nil {
		l.dirs.committed(name, info.Parent, dir)
	}
	return nil
}

// upper is the directory of a layer that was unpacked without those below it.
func (l layering) upper(ctx context.Context, key string) (string, error) {
	mounts, err := l.Mounts(ctx, key)
	if err != nil || len(mounts) != 1 || mounts[0].Type != "bind" {
		return "", err
	}
	return mounts[0].Source, nil
}

// Remove forgets an unpacked layer. containerd's unpacker does so twice where
// several are unpacked at the same time.
func (l layering) Remove(ctx context.Context, key string) error {
	if err := l.Snapshotter.Remove(ctx, key); !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

// complete gives the unnamed folders of a layer what the layers below say of them.
func (l layering) complete(ctx context.Context, key, parent, upper string) (err error) {
	unnamed := l.dirs.take(upper)
	if parent == "" || len(unnamed) == 0 {
		return nil
	}
	lower, ok := l.dirs.known(parent)
	if !ok { // it was here before this pull
		view := key + "-below"
		below, err := l.View(ctx, view, parent)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, l.Remove(context.WithoutCancel(ctx), view)) }()
		lower = lowerDirs(below)
	}
	for _, d := range unnamed {
		if err := inherit(upper, d, lower); err != nil {
			return err
		}
	}
	return nil
}

// inherit gives a folder of upper what the nearest layer below says of it.
func inherit(upper, dir string, lower []string) error {
	to, err := continuityfs.RootPath(upper, dir)
	if err != nil {
		return err
	}
	if to != path.Join(upper, dir) {
		return nil // reached through a symbolic link: another folder, with a name
	}
	if at, err := os.Lstat(to); err != nil || !at.IsDir() {
		return nil //nolint:nilerr // a later entry of the archive took its place
	}
	for _, below := range lower {
		from, err := continuityfs.RootPath(below, dir)
		if err != nil {
			return err
		}
		at, err := os.Lstat(from)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
			continue
		}
		if err != nil {
			return err
		}
		if !at.IsDir() {
			return nil // deleted or replaced there
		}
		return copyAttributes(from, to, at)
	}
	return nil
}

func copyAttributes(from, to string, at fs.FileInfo) error {
	st, ok := at.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("no owner of %s", from)
	}
	if err := os.Lchown(to, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := os.Chmod(to, at.Mode()); err != nil {
		return err
	}
	attrs, err := sysx.LListxattr(from)
	if err != nil && !errors.Is(err, unix.ENOTSUP) {
		return fmt.Errorf("extended attributes of %s: %w", from, err)
	}
	for _, a := range attrs {
		if strings.HasPrefix(a, "trusted.overlay.") {
			continue
		}
		v, err := sysx.LGetxattr(from, a)
		if err != nil {
			return fmt.Errorf("extended attribute %s of %s: %w", a, from, err)
		}
		if err := sysx.LSetxattr(to, a, v, 0); err != nil && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("extended attribute %s of %s: %w", a, to, err)
		}
	}
	return os.Chtimes(to, at.ModTime(), at.ModTime())
}

// layerDir is the directory in which overlayfs keeps a layer that is being
// unpacked. The lowest one is a bind mount; those above it, which do not know
// yet what is below, come as overlays with an upper directory alone.
func layerDir(mounts []mount.Mount) (dir string, lowest, ok bool) {
	if len(mounts) != 1 {
		return "", false, false
	}
	if mounts[0].Type == "bind" {
		return mounts[0].Source, true, true
	}
	for _, o := range mounts[0].Options {
		if v, found := strings.CutPrefix(o, "upperdir="); found && mounts[0].Type == "overlay" {
			return v, false, true
		}
	}
	return "", false, false
}

// lowerDirs are the directories that a read-only view is made of.
func lowerDirs(mounts []mount.Mount) []string {
	if len(mounts) == 1 && mounts[0].Type == "bind" {
		return []string{mounts[0].Source}
	}
	for _, m := range mounts {
		for _, o := range m.Options {
			if v, found := strings.CutPrefix(o, "lowerdir="); found && m.Type == "overlay" {
				return strings.Split(v, ":")
			}
		}
	}
	return nil
}
