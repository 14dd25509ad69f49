package pod

import (
	"slices"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// family is one metric, under the name and with the labels that users of
// cAdvisor know.
type family struct {
	name, help string
	kind       runtimeapi.MetricType
	labels     []string // after baseLabels
}

const (
	counter = runtimeapi.MetricType_COUNTER
	gauge   = runtimeapi.MetricType_GAUGE
)

// baseLabels are the labels of every metric, as the kubelet gives them to
// cAdvisor's.
func baseLabels() []string {
	return []string{"id", "name", "image", "container", "pod", "namespace"}
}

// families are all metrics that there can be. Which of them a container has
// depends on what its kernel tells.
func families() []family {
	return slices.Concat(cpuFamilies(), memoryFamilies(), diskFamilies(), networkFamilies(), processFamilies(), specFamilies())
}

func cpuFamilies() []family {
	return []family{
		{"container_cpu_usage_seconds_total", "CPU time consumed, in seconds.", counter, []string{"cpu"}},
		{"container_cpu_user_seconds_total", "CPU time consumed in user mode, in seconds.", counter, nil},
		{"container_cpu_system_seconds_total", "CPU time consumed in the kernel, in seconds.", counter, nil},
		{"container_cpu_cfs_periods_total", "Periods in which a CPU quota was enforced.", counter, nil},
		{"container_cpu_cfs_throttled_periods_total", "Periods in which the quota was used up.", counter, nil},
		{"container_cpu_cfs_throttled_seconds_total", "Time spent waiting for the next period, in seconds.", counter, nil},
		{"container_pressure_cpu_waiting_seconds_total", "Time in which some tasks waited for a CPU, in seconds.", counter, nil},
		{"container_pressure_cpu_stalled_seconds_total", "Time in which all tasks waited for a CPU, in seconds.", counter, nil},
	}
}

func memoryFamilies() []family {
	return []family{
		{"container_memory_usage_bytes", "Memory in use, page cache included.", gauge, nil},
		{"container_memory_max_usage_bytes", "Most memory that was ever in use.", gauge, nil},
		{"container_memory_working_set_bytes", "Memory in use without what can be dropped at once.", gauge, nil},
		{"container_memory_rss", "Anonymous memory.", gauge, nil},
		{"container_memory_cache", "Page cache.", gauge, nil},
		{"container_memory_mapped_file", "Memory mapped files.", gauge, nil},
		{"container_memory_kernel_usage", "Kernel memory.", gauge, nil},
		{"container_memory_swap", "Swap in use.", gauge, nil},
		{"container_memory_failcnt", "Times that usage hit the memory limit.", counter, nil},
		{"container_memory_failures_total", "Page faults.", counter, []string{"failure_type", "scope"}},
		{"container_oom_events_total", "Processes that were killed for want of memory.", counter, nil},
		{"container_hugetlb_usage_bytes", "Huge pages in use.", gauge, []string{"pagesize"}},
		{"container_hugetlb_max_usage_bytes", "Most huge pages that were ever in use.", gauge, []string{"pagesize"}},
		{"container_pressure_memory_waiting_seconds_total", "Time in which some tasks waited for memory, in seconds.", counter, nil},
		{"container_pressure_memory_stalled_seconds_total", "Time in which all tasks waited for memory, in seconds.", counter, nil},
	}
}

func diskFamilies() []family {
	device := []string{"device"}
	return []family{
		{"container_fs_usage_bytes", "Size of the writable layer.", gauge, device},
		{"container_fs_limit_bytes", "Size of the file system that holds the writable layer.", gauge, device},
		{"container_fs_inodes_total", "Inodes of the file system that holds the writable layer.", gauge, device},
		{"container_fs_inodes_free", "Free inodes of the file system that holds the writable layer.", gauge, device},
		{"container_fs_reads_total", "Reads from a block device.", counter, device},
		{"container_fs_reads_bytes_total", "Bytes read from a block device.", counter, device},
		{"container_fs_writes_total", "Writes to a block device.", counter, device},
		{"container_fs_writes_bytes_total", "Bytes written to a block device.", counter, device},
		{"container_blkio_device_usage_total", "Bytes read from and written to a block device, by operation.", counter,
			[]string{"device", "major", "minor", "operation"}},
		{"container_pressure_io_waiting_seconds_total", "Time in which some tasks waited for IO, in seconds.", counter, nil},
		{"container_pressure_io_stalled_seconds_total", "Time in which all tasks waited for IO, in seconds.", counter, nil},
	}
}

func networkFamilies() []family {
	iface := []string{"interface"}
	return []family{
		{"container_network_receive_bytes_total", "Bytes received.", counter, iface},
		{"container_network_receive_packets_total", "Packets received.", counter, iface},
		{"container_network_receive_packets_dropped_total", "Received packets that were dropped.", counter, iface},
		{"container_network_receive_errors_total", "Errors while receiving.", counter, iface},
		{"container_network_transmit_bytes_total", "Bytes sent.", counter, iface},
		{"container_network_transmit_packets_total", "Packets sent.", counter, iface},
		{"container_network_transmit_packets_dropped_total", "Packets dropped while sending.", counter, iface},
		{"container_network_transmit_errors_total", "Errors while sending.", counter, iface},
	}
}

func processFamilies() []family {
	return []family{
		{"container_processes", "Processes.", gauge, nil},
		{"container_threads", "Threads.", gauge, nil},
		{"container_threads_max", "Most threads allowed, 0 without a limit.", gauge, nil},
		{"container_file_descriptors", "Open file descriptors.", gauge, nil},
		{"container_sockets", "Open sockets.", gauge, nil},
		{"container_ulimits_soft", "Soft limits of the first process.", gauge, []string{"ulimit"}},
		{"container_last_seen", "When the container was last measured, in seconds since 1970.", gauge, nil},
		{"container_start_time_seconds", "When the container was started, in seconds since 1970.", gauge, nil},
	}
}

func specFamilies() []family {
	return []family{
		{"container_spec_cpu_period", "Period of the CPU quota, in microseconds.", gauge, nil},
		{"container_spec_cpu_quota", "CPU time allowed in a period, in microseconds.", gauge, nil},
		{"container_spec_cpu_shares", "CPU shares.", gauge, nil},
		{"container_spec_memory_limit_bytes", "Memory limit, 0 without one.", gauge, nil},
		{"container_spec_memory_reservation_limit_bytes", "Memory that is kept from being reclaimed, 0 without such.", gauge, nil},
		{"container_spec_memory_swap_limit_bytes", "Limit of memory and swap together, 0 without one.", gauge, nil},
	}
}

// MetricDescriptors names the metrics that Metrics gives.
func (s *Service) MetricDescriptors() []*runtimeapi.MetricDescriptor {
	base := baseLabels()
	fs := families()
	all := make([]*runtimeapi.MetricDescriptor, len(fs))
	for i, f := range fs {
		all[i] = &runtimeapi.MetricDescriptor{Name: f.name, Help: f.help, LabelKeys: slices.Concat(base, f.labels)}
	}
	return all
}
