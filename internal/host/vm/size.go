package vm

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/vm/machine"
)

const (
	mib = 1 << 20
	// guestMemory is what kernel and agent need beside the containers.
	guestMemory = 96 * mib
	// leastMemory is what a guest comes up with at all.
	leastMemory = 128 * mib
	maxCPUs     = 240
)

// sizeOf tells how large a machine the sandbox gets: the sum of its limits, or
// the handler's default, and what the guest itself needs.
func sizeOf(s *backend.SandboxSpec, o *hostv1.MachineOptions) (machine.Size, error) {
	size := machine.Size{CPUs: o.DefaultVcpus, Memory: int64(o.DefaultMemory) * mib}
	if s.CPUQuota > 0 && s.CPUPeriod > 0 {
		size.CPUs = uint32(min(maxCPUs, math.Ceil(float64(s.CPUQuota)/float64(s.CPUPeriod))))
	}
	if s.MemoryLimit > 0 {
		size.Memory = s.MemoryLimit + guestMemory
	}
	limit, at := cgroupLimit(cgroupDirs(s.CgroupPath))
	overhead := int64(o.OverheadMemory) * mib
	if limit > 0 && size.Memory+overhead > limit {
		// The pod's cgroup holds the machine: what does not fit would be
		// killed later, in the middle of its work.
		if limit-overhead < leastMemory {
			return size, fmt.Errorf("the pod's cgroup allows %d MiB (%s), and a virtual machine needs at least %d MiB (%d for the guest, %d for QEMU): raise the pod's memory limit, or let the RuntimeClass declare an overhead: %w",
				limit/mib, at, (leastMemory+overhead)/mib, leastMemory/mib, o.OverheadMemory, errdefs.ErrResourceExhausted)
		}
		size.Memory = limit - overhead
	}
	size.Memory -= size.Memory % mib
	return size, nil
}

// cgroupRoot is where the hierarchies are mounted.
const cgroupRoot = "/sys/fs/cgroup"

// holdingControllers are those of cgroup v1 that a machine is put into.
var holdingControllers = [...]string{"memory", "cpu", "cpuset", "pids", "blkio", "freezer"}

// cgroupDirs are the folders of a cgroup path in the hierarchies that hold
// machines.
func cgroupDirs(path string) []string {
	if path == "" {
		return nil
	}
	if _, err := os.Stat(filepath.Join(cgroupRoot, "cgroup.controllers")); err == nil {
		return []string{filepath.Join(cgroupRoot, path)}
	}
	var dirs []string
	seen := map[string]bool{}
	for _, c := range holdingControllers {
		mount, err := filepath.EvalSymlinks(filepath.Join(cgroupRoot, c))
		if err == nil && !seen[mount] {
			seen[mount] = true
			dirs = append(dirs, filepath.Join(mount, path))
		}
	}
	return dirs
}

// emptyTime bounds the wait for a cgroup to be empty: the kernel counts a
// process for a moment after its end.
const emptyTime = 2 * time.Second

// removeCgroup removes a cgroup that we made. An absent one is success.
func removeCgroup(ctx context.Context, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, emptyTime)
	defer cancel()
	for {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || ctx.Err() != nil {
			left, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs")) // for the message
			return fmt.Errorf("remove the machine's cgroup %s (processes %q): %w", dir, strings.Fields(string(left)), err)
		}
		select {
		case <-time.After(5 * time.Millisecond): // there is no event for it
		case <-ctx.Done():
		}
	}
}

// cgroupLimit finds the smallest memory limit from the cgroups up to the root;
// 0 is none.
func cgroupLimit(dirs []string) (limit int64, at string) {
	for _, dir := range dirs {
		for ; len(dir) > len(cgroupRoot); dir = filepath.Dir(dir) {
			for _, file := range []string{"memory.max", "memory.limit_in_bytes"} {
				b, err := os.ReadFile(filepath.Join(dir, file))
				if err != nil {
					continue
				}
				n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
				if err == nil && n < math.MaxInt64/2 && (limit == 0 || n < limit) {
					limit, at = n, filepath.Join(dir, file)
				}
			}
		}
	}
	return limit, at
}
