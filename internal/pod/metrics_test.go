package pod

import (
	"slices"
	"testing"
	"time"
)

// expectedFamilies are the metrics that the public CRI suite looks for.
var expectedFamilies = []string{
	"container_blkio_device_usage_total", "container_cpu_cfs_periods_total", "container_cpu_cfs_throttled_periods_total",
	"container_cpu_cfs_throttled_seconds_total", "container_cpu_system_seconds_total", "container_cpu_usage_seconds_total",
	"container_cpu_user_seconds_total", "container_file_descriptors", "container_fs_inodes_free", "container_fs_inodes_total",
	"container_fs_limit_bytes", "container_fs_reads_bytes_total", "container_fs_reads_total", "container_fs_usage_bytes",
	"container_fs_writes_bytes_total", "container_fs_writes_total", "container_hugetlb_max_usage_bytes", "container_hugetlb_usage_bytes",
	"container_last_seen", "container_memory_cache", "container_memory_failcnt", "container_memory_failures_total",
	"container_memory_kernel_usage", "container_memory_mapped_file", "container_memory_max_usage_bytes", "container_memory_rss",
	"container_memory_swap", "container_memory_usage_bytes", "container_memory_working_set_bytes", "container_network_receive_bytes_total",
	"container_network_receive_errors_total", "container_network_receive_packets_dropped_total", "container_network_receive_packets_total",
	"container_network_transmit_bytes_total", "container_network_transmit_errors_total", "container_network_transmit_packets_dropped_total",
	"container_network_transmit_packets_total", "container_oom_events_total", "container_pressure_cpu_stalled_seconds_total",
	"container_pressure_cpu_waiting_seconds_total", "container_pressure_io_stalled_seconds_total", "container_pressure_io_waiting_seconds_total",
	"container_pressure_memory_stalled_seconds_total", "container_pressure_memory_waiting_seconds_total", "container_processes",
	"container_sockets", "container_spec_cpu_period", "container_spec_cpu_quota", "container_spec_cpu_shares",
	"container_spec_memory_limit_bytes", "container_spec_memory_reservation_limit_bytes", "container_spec_memory_swap_limit_bytes",
	"container_start_time_seconds", "container_threads", "container_threads_max", "container_ulimits_soft",
}

func TestMetricDescriptors(t *testing.T) {
	var names []string
	for _, d := range (&Service{}).MetricDescriptors() {
		names = append(names, d.Name)
		if d.Help == "" || len(d.LabelKeys) < len(baseLabels()) {
			t.Errorf("%s has help %q and labels %v", d.Name, d.Help, d.LabelKeys)
		}
	}
	slices.Sort(names)
	if !slices.Equal(names, expectedFamilies) {
		t.Errorf("families %v", names)
	}
}

// everything is a usage in which the kernel told all there is.
func everything() (usage, processes, []iface) {
	a, s := known(1), &stall{}
	u := usage{cpu: a, cpuUser: a, cpuSystem: a, periods: a, throttledPeriods: a, throttledTime: a, memory: a, memoryMax: a,
		workingSet: a, memoryLimit: a, swap: a, swapLimit: a, memoryTold: true, swapTold: true, rss: a, cache: a, mapped: a, kernel: a,
		faults: a, majorFaults: a, ownFaults: a, ownMajorFaults: a, limitHits: a, oomKills: a, threads: a, threadsMax: a,
		cpuStall: s, memoryStall: s, ioStall: s, devices: []deviceUsage{{name: "/dev/x"}}, operations: []operation{{kind: "Read"}},
		hugePages: []hugePages{{"2MB", 1, a}}}
	p := processes{count: a, files: a, sockets: a, maxOpenFiles: a, cpuShares: a, cpuPeriod: a, cpuQuota: a, reservation: a}
	return u, p, []iface{{name: "lo"}, {name: "eth0"}}
}

func TestMetricsMatchTheirDescriptors(t *testing.T) {
	labels := map[string]int{}
	for _, d := range (&Service{}).MetricDescriptors() {
		labels[d.Name] = len(d.LabelKeys)
	}
	kinds := map[string]family{}
	for _, f := range families() {
		kinds[f.name] = f
	}
	list := func() *metricList {
		return &metricList{kinds: kinds, base: make([]string, len(baseLabels())), at: time.Unix(5, 6)}
	}
	fill := func(l *metricList, u usage, p processes, ifs []iface) {
		l.cpu(u)
		l.memory(u)
		l.devices(u)
		l.limits(u)
		l.processes(p)
		l.network(ifs)
		l.add("container_threads", u.threads)
		l.add("container_threads_max", u.threadsMax)
	}
	l := list()
	u, p, ifs := everything()
	fill(l, u, p, ifs)
	seen := map[string]bool{}
	for _, m := range l.metrics {
		seen[m.Name] = true
		if want, ok := labels[m.Name]; !ok || len(m.LabelValues) != want {
			t.Errorf("%s has the labels %q, its descriptor has %d", m.Name, m.LabelValues, want)
		}
		if m.MetricType != kinds[m.Name].kind || m.Timestamp != 5e9+6 || m.Value == nil {
			t.Errorf("%+v", m)
		}
		if m.LabelValues[len(m.LabelValues)-1] == "lo" {
			t.Errorf("%s counts the loopback interface", m.Name)
		}
	}
	// These are added where the container and its file system are known.
	for _, n := range []string{"container_last_seen", "container_start_time_seconds", "container_fs_usage_bytes",
		"container_fs_limit_bytes", "container_fs_inodes_total", "container_fs_inodes_free"} {
		if _, ok := labels[n]; !ok {
			t.Errorf("%s has no descriptor", n)
		}
		seen[n] = true
	}
	for _, n := range expectedFamilies {
		if !seen[n] {
			t.Errorf("%s is never given", n)
		}
	}

	l = list()
	fill(l, usage{}, processes{}, nil)
	if len(l.metrics) != 0 {
		t.Errorf("made up: %v", l.metrics)
	}
}

func TestMemoryLimitMetrics(t *testing.T) {
	for _, c := range []struct {
		name         string
		u            usage
		memory, both amount
	}{
		{"none", usage{memoryTold: true, swapTold: true}, known(0), known(0)},
		{"memory and swap", usage{memoryTold: true, swapTold: true, memoryLimit: known(5), swapLimit: known(2)}, known(5), known(7)},
		{"memory alone", usage{memoryTold: true, swapTold: true, memoryLimit: known(5)}, known(5), known(0)},
		{"swap not accounted", usage{memoryTold: true, memoryLimit: known(5)}, known(5), amount{}},
	} {
		l := &metricList{}
		l.limits(c.u)
		got := map[string]amount{}
		for _, m := range l.metrics {
			got[m.Name] = known(m.Value.Value)
		}
		if got["container_spec_memory_limit_bytes"] != c.memory || got["container_spec_memory_swap_limit_bytes"] != c.both {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}
