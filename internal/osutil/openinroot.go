package osutil

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// openTries bounds the repeats that openat2 asks for with EAGAIN while
// somebody renames directories below the root.
const openTries = 16

// OpenInRoot opens path as if root were the root of the file system: symbolic
// links (absolute ones too) and ".." are resolved below root and cannot leave
// it, however the tree changes meanwhile. Links of /proc are refused. flags
// are those of open(2) without O_CREAT.
func OpenInRoot(root, path string, flags int) (*os.File, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("root: %w", &fs.PathError{Op: "open", Path: root, Err: err})
	}
	defer unix.Close(dir)
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC),
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	for range openTries {
		var fd int
		fd, err = unix.Openat2(dir, path, &how)
		if err == nil {
			return os.NewFile(uintptr(fd), path), nil
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			break
		}
	}
	return nil, &fs.PathError{Op: "openat2", Path: path, Err: err}
}
