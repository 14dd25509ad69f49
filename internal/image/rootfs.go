package image

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

const (
	labelRoot     = "containerd.io/gc.root" // keeps a snapshot, and those below it, from collection
	labelRootfs   = "cloister.dev/rootfs"
	labelVolatile = "cloister.dev/volatile"

	maxKey = 256
)

// roots knows the root file systems and views that exist, so that a key alone
// finds its snapshotter.
type roots struct {
	mu    sync.Mutex
	byKey map[string]root
}

type root struct {
	snapshotter string
	volatile    bool
	folder      bool  // its files are in a folder, see folders.go
	base        *base // of a folder that is whole
}

func (r *roots) get(key string) (root, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	v, ok := r.byKey[key]
	return v, ok
}

func (r *roots) set(key string, v root) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.byKey[key] = v
}

// delete tells whether it was there.
func (r *roots) delete(key string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, was := r.byKey[key]
	delete(r.byKey, key)
	return was
}

// folders lists the keys of root file systems that are folders of some kind.
func (r *roots) folders() (keys []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for key, v := range r.byKey {
		if v.folder {
			keys = append(keys, key)
		}
	}
	return keys
}

func (s *Store) loadRoots(ctx context.Context) error {
	s.roots.byKey = make(map[string]root)
	for name, sn := range s.snapshotters {
		if !s.inUse(name) {
			continue
		}
		err := sn.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
			if i.Labels[labelRootfs] != "" {
				s.roots.set(i.Name, root{snapshotter: name, volatile: i.Labels[labelVolatile] != ""})
			}
			return nil
		})
		if _, ok := s.o.ProxySnapshotters[name]; ok && err != nil {
			s.log.Warn("proxy snapshotter does not answer; its root file systems are found when it does", "snapshotter", name, "error", clean(err.Error()))
		} else if err != nil {
			return fmt.Errorf("list snapshots of %s: %w", name, err)
		}
	}
	return s.loadFolders(ctx)
}

// findProxied looks for a root file system in snapshotters that may not have
// answered when the store was opened.
func (s *Store) findProxied(ctx context.Context, key string) (root, bool) {
	for name := range s.o.ProxySnapshotters {
		sn, ok := s.snapshotters[name]
		if !ok {
			continue
		}
		if i, err := sn.Stat(s.within(ctx), key); err == nil && i.Labels[labelRootfs] != "" {
			r := root{snapshotter: name, volatile: i.Labels[labelVolatile] != ""}
			s.roots.set(key, r)
			return r, true
		}
	}
	return root{}, false
}

// PrepareRootfs makes a writable root file system for a container and returns
// the mounts that show it. It answers AlreadyExists when the key is taken.
func (s *Store) PrepareRootfs(ctx context.Context, key string, img Image, o RootfsOptions) ([]mount.Mount, error) {
	name, sn, err := s.snapshotter(o.Snapshotter)
	if err != nil {
		return nil, fmt.Errorf("root file system %s: %w", quoted(key), err)
	}
	labels := map[string]string{}
	if len(o.UIDs) > 0 || len(o.GIDs) > 0 {
		if err := s.idLabels(labels, name, o.UIDs, o.GIDs); err != nil {
			return nil, fmt.Errorf("root file system %s: %w", quoted(key), err)
		}
	}
	volatile := o.Volatile && overlays(name)
	if volatile {
		labels[labelVolatile] = "1"
	}
	if name == snapshotterOverlay && img.ChainID != "" && len(o.UIDs) == 0 {
		return s.make(ctx, key, img, func(ctx context.Context) ([]mount.Mount, error) {
			return s.prepareFolder(ctx, key, img, volatile)
		})
	}
	return s.prepare(ctx, key, img, root{snapshotter: name, volatile: volatile}, labels, sn.Prepare)
}

// PrepareView makes a read-only view of an image, for an image volume. An empty
// snapshotter is the default one.
func (s *Store) PrepareView(ctx context.Context, key string, img Image, snapshotter string) ([]mount.Mount, error) {
	name, sn, err := s.snapshotter(snapshotter)
	if err != nil {
		return nil, fmt.Errorf("view %s: %w", quoted(key), err)
	}
	return s.prepare(ctx, key, img, root{snapshotter: name}, map[string]string{}, sn.View)
}

type prepareFunc func(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error)

func (s *Store) prepare(ctx context.Context, key string, img Image, r root, labels map[string]string, do prepareFunc) ([]mount.Mount, error) {
	return s.make(ctx, key, img, func(ctx context.Context) ([]mount.Mount, error) {
		labels[labelRootfs] = "1"
		mounts, err := s.snapshotOf(ctx, key, img, r.snapshotter, labels, do)
		if err != nil {
			return nil, err
		}
		s.roots.set(key, r)
		return withVolatile(mounts, r.volatile), nil
	})
}

// make does what all kinds of root file systems have in common.
func (s *Store) make(ctx context.Context, key string, img Image, do func(context.Context) ([]mount.Mount, error)) ([]mount.Mount, error) {
	if key == "" || len(key) > maxKey || strings.HasPrefix(key, "sha256:") || strings.HasPrefix(key, baseName) {
		return nil, fmt.Errorf("root file system key %s: %w", quoted(key), errdefs.ErrInvalidArgument)
	}
	if _, ok := s.roots.get(key); ok {
		return nil, fmt.Errorf("root file system %s: %w", quoted(key), errdefs.ErrAlreadyExists)
	}
	ctx = s.within(ctx)
	if err := s.mayUse(ctx, img); err != nil {
		return nil, fmt.Errorf("root file system %s: %w", quoted(key), err)
	}
	mounts, err := do(ctx)
	if err != nil {
		return nil, fmt.Errorf("root file system %s of image %s: %w", quoted(key), img.ID, err)
	}
	return mounts, nil
}

// overlays says whether root file systems of a snapshotter are overlays, which
// can be volatile and have id-mapped layers.
func overlays(snapshotter string) bool {
	return snapshotter == snapshotterOverlay || snapshotter == snapshotterErofs
}

// idLabels asks the snapshotter for id-mapped lower layers.
func (s *Store) idLabels(labels map[string]string, snapshotter string, uids, gids []specs.LinuxIDMapping) error {
	if !overlays(snapshotter) {
		return fmt.Errorf("snapshotter %s has no id-mapped layers, user namespaces need %s or %s: %w", snapshotter, snapshotterOverlay, snapshotterErofs, errdefs.ErrNotImplemented)
	}
	if len(uids) == 0 || len(gids) == 0 {
		return fmt.Errorf("user namespace needs both uid and gid mappings: %w", errdefs.ErrInvalidArgument)
	}
	if ok, err := s.idmap(); err != nil || !ok {
		return fmt.Errorf("this kernel has no id-mapped mounts for overlayfs (%v): %w", err, errdefs.ErrNotImplemented)
	}
	labels[snapshots.LabelSnapshotUIDMapping] = mapping(uids)
	labels[snapshots.LabelSnapshotGIDMapping] = mapping(gids)
	return nil
}

func mapping(list []specs.LinuxIDMapping) string {
	parts := make([]string, len(list))
	for i, m := range list {
		parts[i] = fmt.Sprintf("%d:%d:%d", m.ContainerID, m.HostID, m.Size)
	}
	return strings.Join(parts, ",")
}

// SupportsIDMapping says whether PrepareRootfs takes UIDs and GIDs with the
// default snapshotter. The first call probes the kernel.
func (s *Store) SupportsIDMapping() bool {
	if !overlays(s.o.Snapshotter) {
		return false
	}
	ok, err := s.idmap()
	return err == nil && ok
}

func withVolatile(mounts []mount.Mount, volatile bool) []mount.Mount {
	if volatile {
		for i := range mounts {
			if mounts[i].Type == "overlay" {
				mounts[i].Options = append(slices.Clip(mounts[i].Options), "volatile")
			}
		}
	}
	return mounts
}

// RootfsMounts returns the mounts of an existing root file system or view.
func (s *Store) RootfsMounts(ctx context.Context, key string) ([]mount.Mount, error) {
	r, sn, err := s.existing(ctx, key)
	if err != nil {
		return nil, err
	}
	if r.folder {
		return s.folderMounts(s.within(ctx), key, r)
	}
	mounts, err := sn.Mounts(s.within(ctx), key)
	if err != nil {
		return nil, fmt.Errorf("root file system %s: %w", quoted(key), err)
	}
	return withVolatile(mounts, r.volatile), nil
}

func (s *Store) existing(ctx context.Context, key string) (root, snapshots.Snapshotter, error) {
	r, ok := s.roots.get(key)
	if !ok {
		r, ok = s.findProxied(ctx, key)
	}
	if !ok {
		return root{}, nil, fmt.Errorf("root file system %s: %w", quoted(key), errdefs.ErrNotFound)
	}
	return r, s.snapshotters[r.snapshotter], nil
}

// RemoveRootfs removes a root file system or view; one that does not exist is
// fine. The caller has unmounted it. Its disk space is freed soon after.
func (s *Store) RemoveRootfs(ctx context.Context, key string) error {
	r, sn, err := s.existing(ctx, key)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if r.folder {
		err = s.dropFolder(key, r)
	} else if err = sn.Remove(s.within(ctx), key); errdefs.IsNotFound(err) {
		err = nil
	}
	if err != nil {
		return fmt.Errorf("remove root file system %s: %w", quoted(key), err)
	}
	s.roots.delete(key)
	s.usage.forget(key)
	s.gc.kick()
	return nil
}

// Rootfs lists the keys of all root file systems and views.
func (s *Store) Rootfs(context.Context) ([]string, error) {
	s.roots.mu.Lock()
	defer s.roots.mu.Unlock()
	keys := make([]string, 0, len(s.roots.byKey))
	for k := range s.roots.byKey {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys, nil
}
