package pod

import (
	"errors"
	"fmt"
	"os"

	"github.com/opencontainers/selinux/go-selinux/label"
	"golang.org/x/sys/unix"
)

// A sandbox's folder is a small tmpfs that carries everything of it that lives
// until its end: the pinned namespaces, /dev/shm and the files under /etc. One
// lazy unmount of it takes all the mounts inside with it, where an unmount for
// each would wait for the kernel as many times. It carries no mount flags:
// a container in a user namespace could not drop them from the files it binds.

const (
	folderSize = 4 << 20
	shmSize    = 64 << 20
)

// Its path stands in the node's list of mounts for everybody to read, so it is
// closed to all but root, and where the sandbox has a user namespace to the
// group that is root's inside: gid.
func mountFolder(dir string, gid uint32) error {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return fmt.Errorf("make the sandbox's folder: %w", err)
	}
	opts := fmt.Sprintf("mode=%o,gid=%d,size=%d", closedMode(gid), gid, folderSize)
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, opts); err != nil {
		return fmt.Errorf("mount the sandbox's folder: %w", err)
	}
	return nil
}

// closedMode is the mode of a folder that only root, and a group other than
// root's own, may pass.
func closedMode(gid uint32) os.FileMode {
	if gid == 0 {
		return 0o700
	}
	return 0o710
}

// makeClosed makes a folder that is closed as a sandbox's is. What a container
// holds, such as programs that change the user, is not for the node's users.
func makeClosed(dir string, gid uint32) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if gid == 0 {
		return nil
	}
	return errors.Join(os.Chown(dir, 0, int(gid)), os.Chmod(dir, closedMode(gid)))
}

// mountShm gives the sandbox a /dev/shm of its own, owned by the user that is
// root inside and with the pod's SELinux label, if any.
func mountShm(dir string, uid, gid uint32, selinux string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make the folder of /dev/shm: %w", err)
	}
	opts := fmt.Sprintf("mode=1777,size=%d,uid=%d,gid=%d", shmSize, uid, gid)
	opts = label.FormatMountLabel(opts, selinux)
	if err := unix.Mount("shm", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, opts); err != nil {
		return fmt.Errorf("mount /dev/shm: %w", err)
	}
	return nil
}

// unmountAll detaches every mount stacked at dir. Nothing mounted there, or no
// such folder, is success.
func unmountAll(dir string) error {
	for {
		err := unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
	}
}

// removeFolder unmounts dir and removes it with what it holds.
func removeFolder(dir string) error {
	if err := unmountAll(dir); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	return nil
}
