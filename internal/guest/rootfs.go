package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	guestv1 "cloister.dev/api/guest/v1"
	"cloister.dev/internal/osutil"
)

// Folders of a task whose root file system is put together here.
const (
	layersDir = "layers"
	rootDir   = "rootfs"
)

// mountRootfs puts a root file system together in a task's folder and gives its
// path: disks beneath, and what is written on the host.
func (a *Agent) mountRootfs(ctx context.Context, dir string, r *guestv1.Rootfs) (string, error) {
	layers, root := filepath.Join(dir, layersDir), filepath.Join(dir, rootDir)
	// The kernel would ask for them, but a program that it starts takes longer.
	for _, name := range []string{"erofs", "overlay"} {
		if err := loadNamed(a.contents, name); err != nil {
			return "", err
		}
	}
	if err := os.Mkdir(root, 0o755); err != nil {
		return "", err
	}
	var names []string
	for i, id := range r.Layers {
		disk, err := a.disk(ctx, id)
		if err != nil {
			return "", fmt.Errorf("layer %d of the root file system: %w", i, err)
		}
		name := strconv.Itoa(i)
		names = append(names, name)
		if err := os.MkdirAll(filepath.Join(layers, name), 0o755); err != nil {
			return "", err
		}
		if err := unix.Mount("/dev/"+disk, filepath.Join(layers, name), "erofs", unix.MS_RDONLY, ""); err != nil {
			return "", fmt.Errorf("mount layer %d of the root file system (disk %s): %w", i, disk, err)
		}
	}
	writable := filepath.Join(ShareDir, r.Writable)
	options := "userxattr,lowerdir=" + strings.Join(names, ":") +
		",upperdir=" + filepath.Join(writable, "upper") + ",workdir=" + filepath.Join(writable, "work")
	// In the folder of layers their names are short: all have to fit in a page.
	err := osutil.OnThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return err
		}
		if err := unix.Chdir(layers); err != nil {
			return err
		}
		return unix.Mount("overlay", root, "overlay", 0, options)
	})
	if err != nil {
		return "", fmt.Errorf("mount the root file system: %w", err)
	}
	return root, nil
}

// removeTask removes a task's folder. What is mounted in it is let go of
// before, or nothing is removed.
func removeTask(dir string) error {
	mounts := []string{filepath.Join(dir, rootDir)}
	layers, err := filepath.Glob(filepath.Join(dir, layersDir, "*"))
	if err != nil {
		return err
	}
	for _, m := range append(mounts, layers...) {
		err := unix.Unmount(m, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			err = unix.Unmount(m, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("unmount %s: %w", m, err)
		}
	}
	return os.RemoveAll(dir)
}
