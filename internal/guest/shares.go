package guest

import (
	"errors"
	"log/slog"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// Each mount of the host beneath the shared folder is a file system of its own
// here, mounted when it is first looked into. It must not be the end of a
// container's last process that unmounts it: the kernel gives the files that
// the process had open back to the host in the background, finds them busy
// while it takes the file system down, and takes that for corrupted memory
// ("Busy inodes after unmount", a kernel BUG in Debian's 6.1). So they are
// mounted before the container and held until nothing of it is left.

// held is a file system that the host announced.
type held struct {
	path string
	dir  *os.File // in it, so that it stays where its mount is taken away
}

// hold mounts what the host announces at paths; outer ones come first. What
// cannot be looked into is the container's to stumble over, if it ever does.
func hold(paths []string, log *slog.Logger) (all []held) {
	for _, path := range paths {
		// The dot is within, so the kernel mounts what is announced there.
		fd, err := unix.Open(path+"/.", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err == nil {
			all = append(all, held{path, os.NewFile(uintptr(fd), path)})
		} else if !errors.Is(err, unix.ENOTDIR) {
			log.Warn("file system of the host is not held", "path", path, "err", err)
		}
	}
	return all
}

// letGo unmounts file systems that no process uses any more.
func letGo(all []held) {
	for _, h := range slices.Backward(all) {
		// Its answer comes after those about files that were closed before.
		var st unix.Statfs_t
		_ = unix.Fstatfs(int(h.dir.Fd()), &st)
		// A plain folder of the share is no mount.
		_ = unix.Unmount(h.path, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		h.dir.Close()
	}
}
