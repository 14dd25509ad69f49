package external

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestShimCgroup starts a shim in the cgroup that its handler's options name.
func TestShimCgroup(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes cgroups")
	}
	group := fmt.Sprintf("/clshim%d", os.Getpid())
	parents, _ := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs") // one for each hierarchy of v1
	parents = append(parents, "/sys/fs/cgroup/cgroup.procs")
	for _, p := range parents {
		if _, err := os.Stat(p); err != nil {
			continue
		}
		dir := filepath.Join(filepath.Dir(p), group)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if procs, err := os.ReadFile(filepath.Join(filepath.Dir(p), "cpuset.cpus")); err == nil { // v1 takes nobody without
			mems, _ := os.ReadFile(filepath.Join(filepath.Dir(p), "cpuset.mems"))
			_ = os.WriteFile(filepath.Join(dir, "cpuset.cpus"), procs, 0o644)
			_ = os.WriteFile(filepath.Join(dir, "cpuset.mems"), mems, 0o644)
		}
		t.Cleanup(func() {
			if err := os.Remove(dir); err != nil {
				t.Error(err)
			}
		})
	}
	m := start(t, fmt.Sprintf("version = 3\n[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.%s.options]\nShimCgroup = %q\n", handler, group))
	p := m.mustRun(t, "grouped")
	inside := map[string]bool{}
	for _, parent := range parents {
		procs, _ := os.ReadFile(filepath.Join(filepath.Dir(parent), group, "cgroup.procs"))
		for pid := range strings.FieldsSeq(string(procs)) {
			exe, _ := os.Readlink("/proc/" + pid + "/exe")
			inside[exe] = true
		}
	}
	if len(inside) != 1 || !inside[m.shim] {
		t.Errorf("in the cgroup there are %v, want %s", inside, m.shim)
	}
	p.mustRemove(t)
}
