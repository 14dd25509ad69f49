package pod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/image"
)

func TestContainerStatsAreCached(t *testing.T) {
	m := newMachine(t, Options{StatsPeriod: time.Minute})
	sb := m.sandbox(t, "")
	a := m.container(t, sb)
	m.container(t, sb)
	m.rootfs(t, a.rec.ID)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			all, err := m.ContainerStats(t.Context(), nil)
			if err != nil || len(all) != 2 {
				t.Errorf("%v, %v", all, err)
			}
		})
	}
	wg.Wait()
	if n := m.shim.asked.Load(); n != 2 {
		t.Errorf("the shim was asked %d times", n)
	}
	one, err := m.ContainerStats(t.Context(), []string{a.rec.ID, "absent"})
	if err != nil || len(one) != 1 {
		t.Fatal(one, err)
	}
	st := one[0]
	if st.Attributes.Id != a.rec.ID || st.Attributes.Labels["a"] != "b" || st.Attributes.Metadata.Name != "c" ||
		st.Cpu.Timestamp == 0 || st.Cpu.UsageCoreNanoSeconds.GetValue() == 0 || st.Memory.WorkingSetBytes.GetValue() != 900 ||
		st.Memory.AvailableBytes.GetValue() != 4100 || st.Memory.RssBytes == nil || st.Swap != nil || st.Io != nil {
		t.Errorf("%v", st)
	}
	if l := st.WritableLayer; l == nil || l.Timestamp == 0 || l.InodesUsed == nil || l.FsId.Mountpoint == "" {
		t.Errorf("writable layer %v", l)
	}
}

func TestSecondStatsHaveARate(t *testing.T) {
	m := newMachine(t, Options{})
	c := m.container(t, m.sandbox(t, ""))
	all, err := m.ContainerStats(t.Context(), nil)
	if err != nil || len(all) != 1 || all[0].Cpu.UsageNanoCores != nil {
		t.Fatal(all, err)
	}
	// The sampler measures again although nobody asks.
	usage := &m.stats.container(c.rec.ID).usage
	deadline := time.Now().Add(10 * time.Second)
	for {
		if v, _, _ := usage.last(); v.cores.known {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no rate after 10 s")
		}
		time.Sleep(20 * time.Millisecond)
	}
	if all, err = m.ContainerStats(t.Context(), nil); err != nil || len(all) != 1 {
		t.Fatal(all, err)
	}
	if n := all[0].Cpu.UsageNanoCores.GetValue(); n < 9e8 || n > 11e8 {
		t.Errorf("a task that uses one core uses %d nanocores", n)
	}
}

func TestEndedAndHangingContainersAreLeftOut(t *testing.T) {
	m := newMachine(t, Options{})
	sb := m.sandbox(t, "")
	good, ended, hanging := m.container(t, sb), m.container(t, sb), m.container(t, sb)
	m.shim.set(&m.shim.gone, ended.rec.ID, true)
	release := make(chan struct{})
	m.shim.mu.Lock()
	m.shim.hang[hanging.rec.ID] = release
	m.shim.mu.Unlock()
	all, err := m.ContainerStats(t.Context(), nil)
	if err != nil || len(all) != 1 || all[0].Attributes.Id != good.rec.ID {
		t.Errorf("%v, %v", all, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := m.ContainerStats(ctx, []string{hanging.rec.ID}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a caller without patience got %v", err)
	}
	close(release)
}

func TestStatsOfManyContainersAreCheap(t *testing.T) {
	m := newMachine(t, Options{StatsPeriod: time.Minute})
	sb := m.sandbox(t, "")
	for range 1000 {
		c := m.newContainer(sb, newID(), "h", &runtimeapi.ContainerConfig{Metadata: &runtimeapi.ContainerMetadata{}}, image.Image{})
		c.rec.State, c.rec.Phase = runtimeapi.ContainerState_CONTAINER_RUNNING, running
		snap := c.rec
		c.snap.Store(&snap)
		m.index.addContainer(c)
	}
	begin := time.Now()
	all, err := m.ContainerStats(t.Context(), nil)
	if err != nil || len(all) != 1000 {
		t.Fatal(len(all), err)
	}
	first := time.Since(begin)
	begin = time.Now()
	if all, err = m.ContainerStats(t.Context(), nil); err != nil || len(all) != 1000 {
		t.Fatal(len(all), err)
	}
	second := time.Since(begin)
	t.Logf("1,000 containers: %v measured, %v from the cache", first, second)
	// On a slow machine the sampler comes in between, for rates are known from
	// two measurements on.
	if n := m.shim.asked.Load(); n != 1000 && first+second < minWindow/2 {
		t.Errorf("the shim was asked %d times", n)
	}
	if second > max(time.Second, first) {
		t.Errorf("an answer from the cache took %v, measuring %v", second, first)
	}
}

// inCgroup runs a process in a new cgroup of every version 1 controller that
// counts.
func inCgroup(t *testing.T, group string) int {
	t.Helper()
	if cgroupRoot().unified {
		t.Skip("makes version 1 groups; version 2 is tested on fixtures")
	}
	cmd := exec.Command("sleep", "100")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	controllers := []string{"cpu", "cpuacct", "memory", "pids"}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		for _, c := range controllers {
			for dir := cgroupRoot().dir(c, group); dir != cgroupRoot().dir(c, ""); dir = filepath.Dir(dir) {
				if err := syscall.Rmdir(dir); err != nil && !errors.Is(err, syscall.ENOENT) {
					t.Errorf("remove %s: %v", dir, err)
				}
			}
		}
	})
	for _, c := range controllers {
		dir := cgroupRoot().dir(c, group)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Append(nil, cmd.Process.Pid), 0); err != nil {
			t.Fatal(err)
		}
	}
	return cmd.Process.Pid
}

func TestSandboxStats(t *testing.T) {
	m := newMachine(t, Options{})
	parent := "/cltest-" + newID()[:8]
	sb := m.sandbox(t, parent)
	c := m.container(t, sb)
	pid := inCgroup(t, containerCgroup(sb, c.rec.ID))
	if err := m.changeContainer(c, func(r *containerRecord) { r.Pid = uint32(pid) }); err != nil {
		t.Fatal(err)
	}
	plain := m.sandbox(t, "") // without a cgroup of its own: the sum of its containers
	x, y := m.container(t, plain), m.container(t, plain)

	all, err := m.SandboxStats(t.Context(), []string{sb.rec.ID, plain.rec.ID})
	if err != nil || len(all) != 2 {
		t.Fatal(all, err)
	}
	own := all[0].Linux
	if all[0].Attributes.Id != sb.rec.ID || all[0].Attributes.Labels["l"] != "1" || len(own.Containers) != 1 ||
		own.Containers[0].Attributes.Id != c.rec.ID || own.Process.GetProcessCount().GetValue() != 1 ||
		own.Memory.GetUsageBytes().GetValue() == 1000 || own.Memory.GetUsageBytes() == nil || own.Cpu.GetUsageCoreNanoSeconds() == nil {
		t.Errorf("pod with a cgroup: %v", own)
	}
	if n := own.Network; n == nil || n.Timestamp == 0 || len(n.Interfaces) != 1 || n.Interfaces[0].Name != "lo" || n.DefaultInterface != nil {
		t.Errorf("network of a namespace with the loopback interface alone: %v", n)
	}
	sum := all[1].Linux
	if len(sum.Containers) != 2 || sum.Memory.GetUsageBytes().GetValue() != 2000 || sum.Memory.GetWorkingSetBytes().GetValue() != 1800 {
		t.Errorf("pod %s with containers %s and %s: %v", plain.rec.ID, x.rec.ID, y.rec.ID, sum)
	}

	if err := m.changeSandbox(plain, func(r *sandboxRecord) { r.Phase = stopped }); err != nil {
		t.Fatal(err)
	}
	if all, err = m.SandboxStats(t.Context(), nil); err != nil || len(all) != 1 {
		t.Errorf("a stopped pod was measured: %v, %v", all, err)
	}
}

func TestMetricsOfAPod(t *testing.T) {
	m := newMachine(t, Options{})
	parent := "/cltest-" + newID()[:8]
	sb := m.sandbox(t, parent)
	c := m.container(t, sb)
	m.rootfs(t, c.rec.ID)
	pid := inCgroup(t, containerCgroup(sb, c.rec.ID))
	if err := m.changeContainer(c, func(r *containerRecord) { r.Pid = uint32(pid) }); err != nil {
		t.Fatal(err)
	}
	all, err := m.Metrics(t.Context())
	if err != nil || len(all) != 1 || all[0].PodSandboxId != sb.rec.ID || len(all[0].ContainerMetrics) != 1 {
		t.Fatal(all, err)
	}
	cm := all[0].ContainerMetrics[0]
	if cm.ContainerId != c.rec.ID {
		t.Error(cm.ContainerId)
	}
	got := map[string]*runtimeapi.Metric{}
	for _, x := range cm.Metrics {
		got[x.Name] = x
	}
	for name, want := range map[string]uint64{
		"container_processes": 1, "container_threads": 3, "container_memory_working_set_bytes": 900, "container_spec_memory_limit_bytes": 5000,
		"container_spec_cpu_period": 100000, "container_spec_cpu_shares": 1024, "container_spec_memory_reservation_limit_bytes": 0,
	} {
		if got[name].GetValue().GetValue() != want || got[name] == nil {
			t.Errorf("%s is %v, want %d", name, got[name], want)
		}
	}
	for _, name := range []string{"container_fs_usage_bytes", "container_fs_limit_bytes", "container_file_descriptors", "container_ulimits_soft",
		"container_last_seen", "container_start_time_seconds"} {
		if got[name] == nil {
			t.Errorf("no %s", name)
		}
	}
	if l := got["container_processes"].GetLabelValues(); len(l) != 6 || l[0] != parent+"/"+c.rec.ID || l[3] != "c" || l[4] != "p" || l[5] != "ns" {
		t.Errorf("labels %q", l)
	}
	pod := map[string]bool{}
	for _, x := range all[0].Metrics {
		pod[x.Name] = true
	}
	if !pod["container_cpu_usage_seconds_total"] || pod["container_network_receive_bytes_total"] {
		t.Errorf("of the pod: %v", pod) // it has the loopback interface alone
	}
}
