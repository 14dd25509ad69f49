package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// setting reads the first file that is there, of cgroup version 1 or 2.
func setting(t *testing.T, c *container, controller string, names ...string) string {
	t.Helper()
	for _, name := range names {
		if data, err := os.ReadFile(filepath.Join(cgroupOf(t, c, controller), name)); err == nil {
			return strings.TrimSpace(string(data))
		}
	}
	t.Fatalf("the cgroup of %s has none of %v", c.id, names)
	return ""
}

func TestResourcesAreInTheCgroup(t *testing.T) {
	p := runPod(t, shared(t))
	c := p.idle(func(c *cri.ContainerConfig) {
		c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuQuota: 20000, CpuPeriod: 100000, CpuShares: 512, CpusetCpus: "0", OomScoreAdj: 500}
	})
	want := func(memory, quota string) {
		t.Helper()
		if got := setting(t, c, "memory", "memory.limit_in_bytes", "memory.max"); got != memory {
			t.Errorf("memory limit %s, not %s", got, memory)
		}
		if got := setting(t, c, "cpu", "cpu.cfs_quota_us", "cpu.max"); got != quota && got != quota+" 100000" {
			t.Errorf("quota %s, not %s", got, quota)
		}
	}
	want("67108864", "20000")
	if got := setting(t, c, "cpuset", "cpuset.cpus"); got != "0" {
		t.Errorf("CPU set %s", got)
	}
	if got := c.run("cat /proc/1/oom_score_adj"); got != "500" {
		t.Errorf("OOM score %s", got)
	}
	_, err := p.n.Runtime.UpdateContainerResources(t.Context(), &cri.UpdateContainerResourcesRequest{ContainerId: c.id, Linux: &cri.LinuxContainerResources{MemoryLimitInBytes: 128 << 20, CpuQuota: 30000, CpuPeriod: 100000}})
	if err != nil {
		t.Fatal(err)
	}
	want("134217728", "30000")
	r := c.status().GetResources().GetLinux()
	if r.GetMemoryLimitInBytes() != 128<<20 || r.GetCpuQuota() != 30000 || r.GetCpuShares() != 512 || r.GetCpusetCpus() != "0" {
		t.Errorf("status tells %v", r)
	}
	for name, bad := range map[string]*cri.LinuxContainerResources{"negative": {MemoryLimitInBytes: -5}, "shares": {CpuShares: 1 << 50}} {
		if _, err := p.n.Runtime.UpdateContainerResources(t.Context(), &cri.UpdateContainerResourcesRequest{ContainerId: c.id, Linux: bad}); err == nil {
			t.Errorf("an update with %s was taken", name)
		}
	}
	want("134217728", "30000")
}

// A container that is changed before its start begins with the change.
func TestUpdateBeforeStart(t *testing.T) {
	p := runPod(t, shared(t))
	c := p.create(busybox, []string{"sleep", "1000"}, func(c *cri.ContainerConfig) { c.Linux.Resources.MemoryLimitInBytes = 64 << 20 })
	_, err := p.n.Runtime.UpdateContainerResources(t.Context(), &cri.UpdateContainerResourcesRequest{ContainerId: c.id, Linux: &cri.LinuxContainerResources{MemoryLimitInBytes: 96 << 20}})
	if err != nil {
		t.Fatal(err)
	}
	c.start()
	if got := setting(t, c, "memory", "memory.limit_in_bytes", "memory.max"); got != "100663296" {
		t.Errorf("memory limit %s", got)
	}
}

func TestOOMKilledIsTold(t *testing.T) {
	p := runPod(t, shared(t))
	limited := func(c *cri.ContainerConfig) { c.Linux.Resources.MemoryLimitInBytes = 24 << 20 }
	c := p.sh(`x=0123456789abcdef; while :; do x=$x$x; done`, limited)
	if st := c.ended(); st.Reason != "OOMKilled" || st.ExitCode != 137 {
		t.Errorf("%s with %d", st.Reason, st.ExitCode)
	}
	killed := p.sh("kill -9 $$; sleep 100", limited)
	killed.waitGone()
	if st := killed.ended(); st.Reason == "OOMKilled" {
		t.Errorf("killed by hand, and told as %s", st.Reason)
	}
}

// waitGone stops a container that may have ended by itself: the kernel keeps
// signals of a PID namespace's own processes from its first one.
func (c *container) waitGone() { c.stop(0) }

func TestStats(t *testing.T) {
	n := own(t, testnode.Options{})
	p := runPod(t, n)
	busy := p.sh("x=$(head -c 8000000 /dev/zero | tr '\\0' x); head -c 3000000 /dev/zero >/file; echo ready; while :; do :; done")
	idle := p.idle()
	busy.waitLog("ready")
	stats := func(c *container) *cri.ContainerStats {
		t.Helper()
		r, err := n.Runtime.ContainerStats(t.Context(), &cri.ContainerStatsRequest{ContainerId: c.id})
		if err != nil {
			t.Fatal(err)
		}
		return r.Stats
	}
	eventually(t, 30*time.Second, "a busy container uses a good part of a CPU by the nanosecond", func() bool {
		return stats(busy).GetCpu().GetUsageNanoCores().GetValue() > 100_000_000
	})
	first := stats(busy)
	if first.Attributes.GetId() != busy.id || first.Cpu.UsageCoreNanoSeconds.GetValue() == 0 {
		t.Errorf("stats %v", first)
	}
	if ws := first.Memory.WorkingSetBytes.GetValue(); ws < 4<<20 || ws > 200<<20 {
		t.Errorf("working set %d", ws)
	}
	eventually(t, 30*time.Second, "the writable layer holds what was written", func() bool {
		used := stats(busy).GetWritableLayer().GetUsedBytes().GetValue()
		return used >= 3_000_000 && used < 30_000_000
	})
	if u := stats(idle).GetCpu().GetUsageNanoCores().GetValue(); u > 50_000_000 {
		t.Errorf("an idle container uses %d ns of CPU a second", u)
	}
	ps, err := n.Runtime.PodSandboxStats(t.Context(), &cri.PodSandboxStatsRequest{PodSandboxId: p.id})
	if err != nil {
		t.Fatal(err)
	}
	l := ps.Stats.Linux
	if len(l.GetContainers()) != 2 || l.GetCpu().GetUsageCoreNanoSeconds().GetValue() < first.Cpu.UsageCoreNanoSeconds.Value ||
		l.GetProcess().GetProcessCount().GetValue() < 2 || l.GetNetwork().GetDefaultInterface().GetName() != "eth0" {
		t.Errorf("pod stats %v", l)
	}
	m, err := n.Runtime.ListPodSandboxMetrics(t.Context(), &cri.ListPodSandboxMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	d, err := n.Runtime.ListMetricDescriptors(t.Context(), &cri.ListMetricDescriptorsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	labels := map[string]int{}
	for _, desc := range d.Descriptors {
		labels[desc.Name] = len(desc.LabelKeys)
	}
	if len(labels) < 40 || len(m.PodMetrics) != 1 || len(m.PodMetrics[0].ContainerMetrics) != 2 {
		t.Fatalf("%d families, %d pods", len(labels), len(m.PodMetrics))
	}
	for _, c := range m.PodMetrics[0].ContainerMetrics {
		seen := map[string]bool{}
		for _, metric := range c.Metrics {
			seen[metric.Name] = true
			if want, ok := labels[metric.Name]; !ok || want != len(metric.LabelValues) {
				t.Errorf("%s has %d label values, its descriptor %d labels (known %v)", metric.Name, len(metric.LabelValues), want, ok)
			}
		}
		for _, name := range []string{"container_cpu_usage_seconds_total", "container_memory_working_set_bytes", "container_start_time_seconds"} {
			if !seen[name] {
				t.Errorf("container %s has no %s", c.ContainerId, name)
			}
		}
	}
}
