package container

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cloister.dev/internal/host/backend"
)

// mountFlags are the mount options that are flags; the others are the file
// system's own.
var mountFlags = map[string]struct {
	clear bool
	flag  uintptr
}{
	"defaults": {}, "rw": {true, unix.MS_RDONLY}, "ro": {false, unix.MS_RDONLY},
	"bind": {false, unix.MS_BIND}, "rbind": {false, unix.MS_BIND | unix.MS_REC},
	"nosuid": {false, unix.MS_NOSUID}, "suid": {true, unix.MS_NOSUID},
	"nodev": {false, unix.MS_NODEV}, "dev": {true, unix.MS_NODEV},
	"noexec": {false, unix.MS_NOEXEC}, "exec": {true, unix.MS_NOEXEC},
	"noatime": {false, unix.MS_NOATIME}, "relatime": {false, unix.MS_RELATIME},
	"sync": {false, unix.MS_SYNCHRONOUS}, "dirsync": {false, unix.MS_DIRSYNC},
}

// MountRootfs mounts what the request names on the bundle's rootfs. Cloister's
// own daemon names nothing: it has mounted already.
func MountRootfs(t *backend.TaskSpec) (err error) {
	if len(t.Rootfs) == 0 {
		return nil
	}
	rootfs := filepath.Join(t.Bundle, "rootfs")
	if err := os.MkdirAll(rootfs, 0o711); err != nil {
		return fmt.Errorf("make the root file system's folder: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, UnmountRootfs(t))
		}
	}()
	for _, m := range t.Rootfs {
		target := rootfs
		if m.Target != "" {
			if !filepath.IsLocal(m.Target) {
				return fmt.Errorf("mount target %q leaves the root file system: %w", m.Target, errdefs.ErrInvalidArgument)
			}
			target = filepath.Join(rootfs, m.Target)
		}
		if err := mount(m, target); err != nil {
			return fmt.Errorf("mount the root file system (%s from %s): %w", m.Type, m.Source, err)
		}
	}
	return nil
}

func mount(m backend.Mount, target string) error {
	var flags uintptr
	var data []string
	for _, o := range m.Options {
		f, ok := mountFlags[o]
		switch {
		case !ok:
			data = append(data, o)
		case f.clear:
			flags &^= f.flag
		default:
			flags |= f.flag
		}
	}
	if err := unix.Mount(m.Source, target, m.Type, flags, strings.Join(data, ",")); err != nil {
		return err
	}
	// A bind mount takes other flags only when it is mounted again.
	const binding = unix.MS_BIND | unix.MS_REC
	if flags&unix.MS_BIND != 0 && flags&^binding != 0 {
		return unix.Mount("", target, "", flags&^unix.MS_REC|unix.MS_REMOUNT, "")
	}
	return nil
}

// UnmountRootfs undoes MountRootfs, as far as it went.
func UnmountRootfs(t *backend.TaskSpec) error {
	rootfs := filepath.Join(t.Bundle, "rootfs")
	for range t.Rootfs {
		if err := unix.Unmount(rootfs, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
				return nil
			}
			return fmt.Errorf("unmount the root file system: %w", err)
		}
	}
	return nil
}
