package image

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/erofs"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// layered is containerd's erofs snapshotter with mounts that anybody can
// perform. containerd's are templates that its mount manager fills in; here a
// layer is mounted once, where it was unpacked, and what a caller gets is an
// overlay over such folders.
//
// A layer is the file DIR/layer.erofs, mounted read-only at DIR/fs. It is
// mounted when it is first needed after a boot, and until the snapshotter
// removes it.
type layered struct {
	snapshots.Snapshotter
	mu *sync.Mutex // one mount at a time: two of a layer would share no cache
}

func openErofs(root string) (snapshots.Snapshotter, error) {
	if _, err := exec.LookPath("mkfs.erofs"); err != nil {
		return nil, fmt.Errorf("mkfs.erofs is missing, install erofs-utils: %w", errdefs.ErrFailedPrecondition)
	}
	if !erofs.FindErofs() {
		return nil, fmt.Errorf("this kernel has no erofs, try \"modprobe erofs\": %w", errdefs.ErrFailedPrecondition)
	}
	sn, err := erofs.NewSnapshotter(root, erofs.WithRemapIDs())
	if err != nil {
		return nil, err
	}
	return layered{sn, new(sync.Mutex)}, nil
}

func (l layered) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return l.plain(l.Snapshotter.Prepare(ctx, key, parent, opts...))
}

func (l layered) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return l.plain(l.Snapshotter.View(ctx, key, parent, opts...))
}

func (l layered) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	return l.plain(l.Snapshotter.Mounts(ctx, key))
}

// plain mounts the layers, which come first and from the top, and turns what
// refers to them into a mount of its own.
func (l layered) plain(mounts []mount.Mount, err error) ([]mount.Mount, error) {
	if err != nil {
		return nil, err
	}
	var lower []string
	last := mounts[len(mounts)-1]
	for _, m := range mounts {
		if m.Type != "erofs" {
			continue
		}
		dir := filepath.Join(filepath.Dir(m.Source), "fs")
		if err := l.mount(m.Source, dir); err != nil {
			return nil, fmt.Errorf("mount layer %s: %w", m.Source, err)
		}
		lower = append(lower, dir)
	}
	overlay := strings.HasSuffix(last.Type, "/overlay")
	switch {
	case len(lower) == 0:
		return mounts, nil
	case !overlay && len(lower) == 1:
		return []mount.Mount{{Type: "bind", Source: lower[0], Options: []string{"ro", "rbind"}}}, nil
	case !overlay:
		return nil, fmt.Errorf("mount of type %s over %d layers: %w", quoted(last.Type), len(lower), errdefs.ErrNotImplemented)
	}
	options := slices.DeleteFunc(slices.Clone(last.Options), func(o string) bool { return strings.HasPrefix(o, "lowerdir=") })
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: append(options, "lowerdir="+strings.Join(lower, ":"))}}, nil
}

func (l layered) mount(file, dir string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return err
	}
	if st.Type == unix.EROFS_SUPER_MAGIC_V1 {
		return nil
	}
	err := unix.Mount(file, dir, "erofs", unix.MS_RDONLY, "")
	if errors.Is(err, unix.ENOTBLK) { // before Linux 6.12
		m := mount.Mount{Type: "erofs", Source: file, Options: []string{"ro", "loop"}}
		return m.Mount(dir)
	}
	return err
}
