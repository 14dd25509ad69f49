package pod

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	cgroup1stats "github.com/containerd/cgroups/v3/cgroup1/stats"
	"github.com/containerd/cgroups/v3/cgroup2"

	"cloister.dev/internal/oci"
)

// cgroupTree is where the kernel shows cgroups: one folder on version 2, one
// for each controller on version 1. On a hybrid machine version 1 counts.
type cgroupTree struct {
	root    string
	unified bool
}

func cgroupRoot() cgroupTree {
	return cgroupTree{root: "/sys/fs/cgroup", unified: cgroups.Mode() == cgroups.Unified}
}

// dir gives the folder in which a controller shows the group.
func (t cgroupTree) dir(controller, group string) string {
	if t.unified {
		return filepath.Join(t.root, group)
	}
	return filepath.Join(t.root, controller, group)
}

// usage reads what the group and those below it have used.
func (t cgroupTree) usage(group string) (usage, error) {
	if _, err := os.Stat(t.dir("memory", group)); err != nil {
		return usage{}, fmt.Errorf("cgroup %s: %w", group, err)
	}
	if !t.unified {
		return t.usageV1(group)
	}
	m, err := cgroup2.Load(group, cgroup2.WithMountpoint(t.root))
	if err != nil {
		return usage{}, fmt.Errorf("cgroup %s: %w", group, err)
	}
	st, err := m.Stat()
	if err != nil {
		return usage{}, fmt.Errorf("cgroup %s: %w", group, err)
	}
	return usageV2(st), nil
}

// usageV1 reads the controllers that matter for a pod. One that is not mounted
// leaves its numbers unknown.
func (t cgroupTree) usageV1(group string) (usage, error) {
	m := &cgroup1stats.Metrics{CPU: &cgroup1stats.CPUStat{Usage: &cgroup1stats.CPUUsage{}, Throttling: &cgroup1stats.Throttle{}}}
	read := 0
	for _, c := range []interface {
		Stat(string, *cgroup1stats.Metrics) error
	}{
		cgroup1.NewCpuacct(t.root),
		cgroup1.NewCpu(t.root),
		cgroup1.NewMemory(t.root, cgroup1.OptionalSwap(), cgroup1.IgnoreModules("kmem", "kmem.tcp")),
		cgroup1.NewPids(t.root),
	} {
		err := c.Stat(group, m)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return usage{}, fmt.Errorf("cgroup %s: %w", group, err)
		}
		if err == nil {
			read++
		}
	}
	if read == 0 {
		return usage{}, fmt.Errorf("cgroup %s: %w", group, fs.ErrNotExist)
	}
	u := usageV1(m)
	u.kernel = amount{} // not read
	return u, nil
}

// pids lists the processes in the group and those below it.
func (t cgroupTree) pids(group string) ([]string, error) {
	var pids []string
	err := filepath.WalkDir(t.dir("memory", group), func(p string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // a group that ended meanwhile
		}
		if err != nil || !d.IsDir() {
			return err
		}
		b, err := os.ReadFile(filepath.Join(p, "cgroup.procs"))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		pids = append(pids, strings.Fields(string(b))...)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("processes of cgroup %s: %w", group, err)
	}
	return pids, nil
}

// podCgroup gives the cgroup of the whole pod, "" when the client named none.
func podCgroup(sb *sandbox) string {
	parent := sb.get().Config.GetLinux().GetCgroupParent()
	if parent == "" {
		return ""
	}
	return oci.ParentCgroup(parent)
}

// containerCgroup gives the cgroup of a container.
func containerCgroup(sb *sandbox, id string) string {
	systemd := sb.handler != nil && sb.handler.Runtime.SystemdCgroup
	return oci.ContainerCgroup(sb.record().CgroupParent, id, systemd)
}
