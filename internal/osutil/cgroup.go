package osutil

import "golang.org/x/sys/unix"

// CgroupV2 tells whether the node has the unified cgroup hierarchy at its
// usual place; version 1 and hybrid machines have a tmpfs there.
func CgroupV2() bool {
	var st unix.Statfs_t
	return unix.Statfs("/sys/fs/cgroup", &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}
