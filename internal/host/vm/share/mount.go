package share

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cloister.dev/internal/osutil"
)

// Add shares source, a folder or a file, under name, a relative path. The
// guest sees it at that path in the share. A name that is there already is
// errdefs.ErrAlreadyExists. A machine must have connected: until then there is
// nowhere to put it, and Add waits.
func (f *FS) Add(name, source string, o Options) error {
	if !filepath.IsLocal(name) || filepath.Clean(name) != name || name == "." {
		return fmt.Errorf("share %s as %q: the name has to be a clean relative path: %w", source, name, errdefs.ErrInvalidArgument)
	}
	tree, err := cloneTree(source, o)
	if err != nil {
		return fmt.Errorf("share %s: %w", source, err)
	}
	defer tree.Close()
	if err := f.mountPoint(name, tree); err != nil {
		return fmt.Errorf("share %s as %s: %w", source, name, err)
	}
	err = f.inside(func() error {
		return unix.MoveMount(int(tree.Fd()), "", unix.AT_FDCWD, "/"+name, unix.MOVE_MOUNT_F_EMPTY_PATH)
	})
	if err != nil {
		return fmt.Errorf("share %s as %s: %w", source, name, err)
	}
	return nil
}

// cloneTree gives a mount of the source that is nowhere yet. Device files do
// not work in it, and nothing else can ever be done to it by its later user.
func cloneTree(source string, o Options) (*os.File, error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	attrs := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID}
	recurse := uint(0)
	if o.Recursive {
		flags |= unix.AT_RECURSIVE
		recurse = unix.AT_RECURSIVE
	}
	if o.ReadOnly && o.ReadOnlyBeneath {
		attrs.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, source, flags)
	if err != nil {
		return nil, &fs.PathError{Op: "open_tree", Path: source, Err: err}
	}
	tree := os.NewFile(uintptr(fd), source)
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|recurse, &attrs); err != nil {
		tree.Close()
		return nil, &fs.PathError{Op: "mount_setattr", Path: source, Err: err}
	}
	if !o.ReadOnly {
		return tree, nil
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		tree.Close()
		return nil, &fs.PathError{Op: "mount_setattr", Path: source, Err: err}
	}
	return tree, nil
}

// mountPoint makes what the tree goes onto, a folder or an empty file.
func (f *FS) mountPoint(name string, tree *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(tree.Fd()), &st); err != nil {
		return err
	}
	path := filepath.Join(f.state.Dir, rootDir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	var err error
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		err = os.Mkdir(path, 0o755)
	} else {
		var file *os.File
		if file, err = os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644); err == nil {
			err = file.Close()
		}
	}
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("the name is taken: %w", errdefs.ErrAlreadyExists)
	}
	return err
}

// Remove takes a name, and all names beneath it, out of the share. An absent
// name is success.
func (f *FS) Remove(name string) error {
	if !filepath.IsLocal(name) {
		return fmt.Errorf("remove share %q: %w", name, errdefs.ErrInvalidArgument)
	}
	path := filepath.Join(f.state.Dir, rootDir, name)
	var points []string // deepest last
	err := filepath.WalkDir(path, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(filepath.Join(f.state.Dir, rootDir), p)
		points = append(points, rel)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove share %s: %w", name, err)
	}
	err = f.inside(func() error {
		for i := len(points) - 1; i >= 0; i-- {
			err := unix.Unmount("/"+points[i], unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
			if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
				return &fs.PathError{Op: "unmount", Path: points[i], Err: err}
			}
		}
		return nil
	})
	if err != nil && !errdefs.IsUnavailable(err) { // virtiofsd has gone, and its mounts with it
		return fmt.Errorf("remove share %s: %w", name, err)
	}
	info, err := os.Lstat(path)
	if err == nil && !info.IsDir() {
		if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) { // Stop may be at it too
			return err
		}
		return nil
	}
	return removeEmpty(path)
}

// readyTime bounds the wait for virtiofsd, which enters its namespace when the
// machine has connected.
const readyTime = 20 * time.Second

// inside runs do on a thread in virtiofsd's mount namespace, where "/" is the
// shared folder. The thread ends with it: one that has left the namespace of
// the others cannot be used for anything else.
func (f *FS) inside(do func() error) error {
	ns, err := f.namespace()
	if err != nil {
		return err
	}
	defer ns.Close()
	return osutil.OnThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("leave the process's folder: %w", err)
		}
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("enter virtiofsd's mount namespace: %w", err)
		}
		return do()
	})
}

// namespace waits until virtiofsd has its own mount namespace with the shared
// folder as root, and opens that.
func (f *FS) namespace() (*os.File, error) {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	limit := time.NewTimer(readyTime)
	defer limit.Stop()
	for {
		if f.state.Pid == 0 || f.ended() {
			return nil, fmt.Errorf("virtiofsd has ended: %w", errdefs.ErrUnavailable)
		}
		ns, err := os.Open("/proc/" + strconv.Itoa(f.state.Pid) + "/ns/mnt")
		if err != nil {
			return nil, fmt.Errorf("virtiofsd has ended: %w: %w", err, errdefs.ErrUnavailable)
		}
		if f.settled() {
			return ns, nil
		}
		ns.Close()
		select {
		case <-tick.C:
		case <-f.done:
		case <-limit.C:
			return nil, fmt.Errorf("virtiofsd is not ready after %v: no machine has connected: %w", readyTime, errdefs.ErrUnavailable)
		}
	}
}

func (f *FS) ended() bool {
	select {
	case <-f.done:
		return true
	default:
		return false
	}
}

// settled tells whether virtiofsd's root is the shared folder, on a mount of
// its own.
func (f *FS) settled() bool {
	var root, shared unix.Stat_t
	if unix.Stat("/proc/"+strconv.Itoa(f.state.Pid)+"/root", &root) != nil || unix.Stat(filepath.Join(f.state.Dir, rootDir), &shared) != nil {
		return false
	}
	return root.Dev == shared.Dev && root.Ino == shared.Ino
}
