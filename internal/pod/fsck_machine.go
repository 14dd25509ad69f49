package pod

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"

	"github.com/moby/sys/mountinfo"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"cloister.dev/internal/network"
	"cloister.dev/internal/oci"
)

// networkOf is all that a network needs to release what an id holds after its
// namespace is gone.
func networkOf(id string) network.Request { return network.Request{ID: id} }

// listFolders lists the folders in dir that are named by ids.
func listFolders(dir, kind, detail string, remove func(context.Context, string) error) ([]orphan, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", dir, err)
	}
	var all []orphan
	for _, e := range entries {
		if !e.IsDir() || !isID(e.Name()) {
			continue
		}
		p := filepath.Join(dir, e.Name())
		all = append(all, orphan{owner: e.Name(), Finding: Finding{Kind: kind, ID: e.Name(), Path: p, Detail: detail},
			remove: func(ctx context.Context) error { return remove(ctx, p) }})
	}
	return all, nil
}

// removeTree unmounts everything below dir and removes it. It removes nothing
// while a mount is left: what is behind that may be somebody's data.
func removeTree(dir string) error {
	for {
		mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
		if err != nil {
			return fmt.Errorf("list mounts: %w", err)
		}
		if len(mounts) == 0 {
			break
		}
		slices.SortFunc(mounts, func(a, b *mountinfo.Info) int { return len(b.Mountpoint) - len(a.Mountpoint) })
		for _, m := range mounts {
			err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
			if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("unmount %s: %w", m.Mountpoint, err)
			}
		}
		left, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
		if err != nil {
			return fmt.Errorf("list mounts: %w", err)
		}
		if len(left) >= len(mounts) {
			return fmt.Errorf("%s: %w", left[0].Mountpoint, errStillMounted)
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	return nil
}

// mountRoot tells whether something is mounted at path, a folder or a file,
// even from the same file system.
func mountRoot(path string) bool {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, 0, &st)
	return err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}

// livingIn counts the processes of the container whose bundle this is.
func livingIn(bundle string) int {
	var spec specs.Spec
	data, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil || json.Unmarshal(data, &spec) != nil || spec.Linux == nil {
		return 0 // without a specification it was never started
	}
	group := oci.KernelCgroup(spec.Linux.CgroupsPath)
	if group == "" || group == "/" {
		return 0
	}
	pids, err := cgroupRoot().pids(group)
	if err != nil {
		return 0
	}
	return len(pids)
}

// listCgroups lists the cgroups without processes that are named by ids, in
// the places where ours are.
func (s *Service) listCgroups(context.Context) ([]orphan, error) {
	parents := map[string]bool{cmp.Or(s.o.CgroupParent, oci.DefaultCgroup): true}
	for _, sb := range s.index.allSandboxes() {
		parents[path.Dir(containerCgroup(sb, sb.get().ID))] = true
	}
	var all []orphan
	for _, h := range cgroupRoot().hierarchies() {
		for parent := range parents {
			some, err := emptyCgroups(filepath.Join(h, parent))
			if err != nil {
				return nil, err
			}
			all = append(all, some...)
		}
	}
	return all, nil
}

// hierarchies gives the mount points below which cgroups are.
func (t cgroupTree) hierarchies() []string {
	if t.unified {
		return []string{t.root}
	}
	entries, err := os.ReadDir(t.root)
	if err != nil {
		return nil
	}
	var dirs []string
	for _, e := range entries {
		if e.IsDir() { // links name the same hierarchy a second time
			dirs = append(dirs, filepath.Join(t.root, e.Name()))
		}
	}
	return dirs
}

// emptyCgroups lists the groups in dir that are named by ids and hold no
// process.
func emptyCgroups(dir string) ([]orphan, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list cgroups: %w", err)
	}
	var all []orphan
	for _, e := range entries {
		id := oci.ContainerOf(e.Name())
		p := filepath.Join(dir, e.Name())
		if !e.IsDir() || !isID(id) || populated(p) {
			continue
		}
		all = append(all, orphan{owner: id, Finding: Finding{Kind: "cgroup", ID: id, Path: p,
			Detail: "empty cgroup of a container that does not exist"},
			remove: func(context.Context) error { return removeCgroup(p) }})
	}
	return all, nil
}

// populated tells whether the group at dir, or one below it, holds processes.
// What cannot be read is taken to.
func populated(dir string) bool {
	full := errors.New("holds processes")
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		b, err := os.ReadFile(filepath.Join(p, "cgroup.procs"))
		if err == nil && len(b) > 0 {
			err = full
		}
		return err
	})
	return err != nil
}

// removeCgroup removes a group and those below it. The kernel refuses while
// there are processes.
func removeCgroup(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && d.IsDir() {
			dirs = append(dirs, p)
		}
		return err
	})
	for i := len(dirs) - 1; i >= 0 && err == nil; i-- { // inner ones come later in the walk
		if err = unix.Rmdir(dirs[i]); errors.Is(err, unix.ENOENT) {
			err = nil
		}
	}
	if err != nil {
		return fmt.Errorf("remove cgroup %s: %w", dir, err)
	}
	return nil
}
