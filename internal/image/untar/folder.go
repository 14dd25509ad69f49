package untar

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/containerd/continuity/fs"
	"golang.org/x/sys/unix"
)

// folder is an open folder of the layer.
type folder struct {
	name string // as the archive calls it; empty: none is open
	fd   int
	// plain says that files get the mode that they are made with, less the umask,
	// and the process' group: the folder has no default ACL and no other group.
	plain bool
}

func (f *folder) close() {
	if f.name != "" {
		_ = unix.Close(f.fd)
		*f = folder{}
	}
}

// path is a name in the folder for calls that take no descriptor.
func (f *folder) path(base string) string { return "/proc/self/fd/" + strconv.Itoa(f.fd) + "/" + base }

// enter opens a folder, which is made with those above it when it is missing.
func (x *extraction) enter(name string) error {
	if x.at.name == name {
		return nil
	}
	fd, err := x.open(name, unix.O_RDONLY)
	if errors.Is(err, unix.ENOENT) {
		if err = x.makeAll(name); err == nil {
			fd, err = x.open(name, unix.O_RDONLY)
		}
	}
	if err != nil {
		return fmt.Errorf("open its folder: %w", err)
	}
	x.at.close()
	x.at = folder{name: name, fd: fd, plain: x.isPlain(fd)}
	return nil
}

func (x *extraction) open(name string, flags int) (int, error) {
	how := unix.OpenHow{
		Flags:   uint64(flags) | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	for {
		fd, err := unix.Openat2(x.top, name, &how)
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}

func (x *extraction) isPlain(fd int) bool {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || int(st.Gid) != x.ids[1] {
		return false
	}
	_, err := unix.Fgetxattr(fd, "system.posix_acl_default", nil)
	return errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP)
}

// makeAll makes a folder that the archive does not describe, or not yet.
// Symbolic links on the way are followed within the root, to folders that may
// be missing too.
func (x *extraction) makeAll(name string) error {
	full, err := fs.RootPath(x.root, name)
	if err != nil {
		return err
	}
	at := x.root
	for part := range strings.SplitSeq(strings.Trim(strings.TrimPrefix(full, x.root), "/"), "/") {
		at += "/" + part
		err := os.Mkdir(at, 0o755)
		if err == nil {
			err = os.Chmod(at, 0o755) // whatever the umask
		}
		if err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}
