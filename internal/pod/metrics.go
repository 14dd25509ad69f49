package pod

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Metrics gives the metrics of all ready sandboxes and their running
// containers, under cAdvisor's names. What the kernel does not tell is absent.
func (s *Service) Metrics(ctx context.Context) ([]*runtimeapi.PodSandboxMetrics, error) {
	s.statsUsed()
	wait := time.Now().Add(layerWait)
	disk, err := statDisk(s.o.Root)
	if err != nil {
		return nil, err
	}
	kinds := map[string]family{}
	for _, f := range families() {
		kinds[f.name] = f
	}
	sbs := s.readySandboxes(nil)
	byPod := s.runningByPod()
	all := make([]*runtimeapi.PodSandboxMetrics, len(sbs))
	err = s.measureEach(ctx, len(sbs), func(ctx context.Context, i int) (err error) {
		sb := sbs[i]
		all[i], err = s.podMetrics(ctx, sb, kinds)
		if err != nil {
			return err
		}
		for _, c := range byPod[sb.get().ID] {
			m, err := s.containerMetrics(ctx, sb, c, kinds, disk, wait)
			if err := s.leftOut(ctx, c, err); err != nil {
				return err
			}
			if m != nil {
				all[i].ContainerMetrics = append(all[i].ContainerMetrics, m)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return all, nil
}

// podMetrics gives what is counted for a pod as a whole.
func (s *Service) podMetrics(ctx context.Context, sb *sandbox, kinds map[string]family) (*runtimeapi.PodSandboxMetrics, error) {
	v := sb.get()
	l := metricList{kinds: kinds, at: time.Now(), base: []string{podID(sb), "", "", "", v.Config.GetMetadata().GetName(), v.Config.GetMetadata().GetNamespace()}}
	m, ok, err := s.measurePod(ctx, sb, s.statsPeriod())
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil:
		s.log.Debug("pod cgroup left out of metrics", "sandbox", v.ID, "err", err)
	case ok:
		l.at = m.at
		l.cpu(m.usage)
		l.memory(m.usage)
	}
	ifs, err := s.measureNetwork(ctx, sb)
	if err != nil && ctx.Err() == nil && sb.get().State == runtimeapi.PodSandboxState_SANDBOX_READY {
		s.log.Warn("pod network left out of metrics", "sandbox", v.ID, "err", err)
	}
	l.at = time.Now()
	l.network(ifs)
	return &runtimeapi.PodSandboxMetrics{PodSandboxId: v.ID, Metrics: l.metrics}, ctx.Err()
}

// podID is the id label of a pod: its cgroup, as cAdvisor has it.
func podID(sb *sandbox) string {
	if group := podCgroup(sb); group != "" {
		return group
	}
	return sb.get().ID
}

func (s *Service) containerMetrics(ctx context.Context, sb *sandbox, c *container, kinds map[string]family, disk diskState, wait time.Time) (*runtimeapi.ContainerMetrics, error) {
	v, pod := c.get(), sb.get()
	m, err := s.measureContainer(ctx, c, s.statsPeriod())
	if err != nil {
		return nil, err
	}
	l := metricList{kinds: kinds, at: m.at, base: []string{containerCgroup(sb, v.ID), v.ID, imageName(v.Config),
		v.Config.GetMetadata().GetName(), pod.Config.GetMetadata().GetName(), pod.Config.GetMetadata().GetNamespace()}}
	l.cpu(m.usage)
	l.memory(m.usage)
	l.devices(m.usage)
	l.add("container_threads", m.usage.threads)
	l.add("container_threads_max", m.usage.threadsMax)
	l.limits(m.usage)
	l.add("container_last_seen", known(uint64(m.at.Unix())))
	if at := v.StartedAt.Unix(); at > 0 {
		l.add("container_start_time_seconds", known(uint64(at)))
	}
	if p, err := s.measureProcesses(ctx, c); err == nil {
		l.at = p.at
		l.processes(p)
	}
	l.at = time.Now()
	l.add("container_fs_limit_bytes", known(disk.bytes), disk.device)
	l.add("container_fs_inodes_total", known(disk.inodes), disk.device)
	l.add("container_fs_inodes_free", known(disk.free), disk.device)
	if size, ok := s.layerSize(ctx, v.ID, wait); ok {
		l.at = size.at
		l.add("container_fs_usage_bytes", known(size.bytes), disk.device)
	}
	return &runtimeapi.ContainerMetrics{ContainerId: v.ID, Metrics: l.metrics}, nil
}

// metricList gathers the metrics of one pod or container.
type metricList struct {
	kinds   map[string]family
	base    []string // values of baseLabels
	at      time.Time
	metrics []*runtimeapi.Metric
}

// add appends a metric with the values of its own labels, unless it is
// unknown.
func (l *metricList) add(name string, a amount, labels ...string) {
	if !a.known {
		return
	}
	l.metrics = append(l.metrics, &runtimeapi.Metric{Name: name, Timestamp: l.at.UnixNano(), MetricType: l.kinds[name].kind,
		LabelValues: slices.Concat(l.base, labels), Value: &runtimeapi.UInt64Value{Value: a.n}})
}

// seconds adds a time that is known in nanoseconds.
func (l *metricList) seconds(name string, a amount, labels ...string) {
	a.n /= uint64(time.Second)
	l.add(name, a, labels...)
}

func (l *metricList) cpu(u usage) {
	l.seconds("container_cpu_usage_seconds_total", u.cpu, "total")
	l.seconds("container_cpu_user_seconds_total", u.cpuUser)
	l.seconds("container_cpu_system_seconds_total", u.cpuSystem)
	l.add("container_cpu_cfs_periods_total", u.periods)
	l.add("container_cpu_cfs_throttled_periods_total", u.throttledPeriods)
	l.seconds("container_cpu_cfs_throttled_seconds_total", u.throttledTime)
	l.pressure("cpu", u.cpuStall)
}

func (l *metricList) memory(u usage) {
	l.add("container_memory_usage_bytes", u.memory)
	l.add("container_memory_max_usage_bytes", u.memoryMax)
	l.add("container_memory_working_set_bytes", u.workingSet)
	l.add("container_memory_rss", u.rss)
	l.add("container_memory_cache", u.cache)
	l.add("container_memory_mapped_file", u.mapped)
	l.add("container_memory_kernel_usage", u.kernel)
	l.add("container_memory_swap", u.swap)
	l.add("container_memory_failcnt", u.limitHits)
	l.add("container_memory_failures_total", u.ownFaults, "pgfault", "container")
	l.add("container_memory_failures_total", u.ownMajorFaults, "pgmajfault", "container")
	l.add("container_memory_failures_total", u.faults, "pgfault", "hierarchy")
	l.add("container_memory_failures_total", u.majorFaults, "pgmajfault", "hierarchy")
	l.add("container_oom_events_total", u.oomKills)
	for _, h := range u.hugePages {
		l.add("container_hugetlb_usage_bytes", known(h.usage), h.size)
		l.add("container_hugetlb_max_usage_bytes", h.max, h.size)
	}
	l.pressure("memory", u.memoryStall)
}

func (l *metricList) pressure(what string, p *stall) {
	if p == nil {
		return
	}
	l.seconds("container_pressure_"+what+"_waiting_seconds_total", known(p.some.total))
	l.seconds("container_pressure_"+what+"_stalled_seconds_total", known(p.full.total))
}

func (l *metricList) devices(u usage) {
	for _, d := range u.devices {
		name := d.name
		if name == "" {
			name = deviceName(d.major, d.minor)
		}
		l.add("container_fs_reads_total", known(d.reads), name)
		l.add("container_fs_reads_bytes_total", known(d.readBytes), name)
		l.add("container_fs_writes_total", known(d.writes), name)
		l.add("container_fs_writes_bytes_total", known(d.writeBytes), name)
	}
	for _, o := range u.operations {
		name := o.name
		if name == "" {
			name = deviceName(o.major, o.minor)
		}
		l.add("container_blkio_device_usage_total", known(o.bytes), name,
			strconv.FormatUint(o.major, 10), strconv.FormatUint(o.minor, 10), o.kind)
	}
	l.pressure("io", u.ioStall)
}

// limits adds the memory limits. cAdvisor's users know 0 as no limit.
func (l *metricList) limits(u usage) {
	if u.memoryTold {
		l.add("container_spec_memory_limit_bytes", known(u.memoryLimit.n))
	}
	if !u.swapTold {
		return
	}
	both := uint64(0)
	if u.swapLimit.known && u.memoryLimit.known {
		both = u.memoryLimit.n + u.swapLimit.n
	}
	l.add("container_spec_memory_swap_limit_bytes", known(both))
}

func (l *metricList) processes(p processes) {
	l.add("container_processes", p.count)
	l.add("container_file_descriptors", p.files)
	l.add("container_sockets", p.sockets)
	l.add("container_ulimits_soft", p.maxOpenFiles, "max_open_files")
	l.add("container_spec_cpu_shares", p.cpuShares)
	l.add("container_spec_cpu_period", p.cpuPeriod)
	l.add("container_spec_cpu_quota", p.cpuQuota)
	l.add("container_spec_memory_reservation_limit_bytes", p.reservation)
}

func (l *metricList) network(ifs []iface) {
	for _, f := range ifs {
		if f.name == loopback {
			continue // cAdvisor's users do not expect it in their sums
		}
		l.add("container_network_receive_bytes_total", known(f.rxBytes), f.name)
		l.add("container_network_receive_packets_total", known(f.rxPackets), f.name)
		l.add("container_network_receive_packets_dropped_total", known(f.rxDropped), f.name)
		l.add("container_network_receive_errors_total", known(f.rxErrors), f.name)
		l.add("container_network_transmit_bytes_total", known(f.txBytes), f.name)
		l.add("container_network_transmit_packets_total", known(f.txPackets), f.name)
		l.add("container_network_transmit_packets_dropped_total", known(f.txDropped), f.name)
		l.add("container_network_transmit_errors_total", known(f.txErrors), f.name)
	}
}

// diskState is the file system that holds the writable layers.
type diskState struct {
	device              string
	bytes, inodes, free uint64
}

func statDisk(dir string) (diskState, error) {
	var fs unix.Statfs_t
	var st unix.Stat_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return diskState{}, fmt.Errorf("file system of the images: %w", &os.PathError{Op: "statfs", Path: dir, Err: err})
	}
	if err := unix.Stat(dir, &st); err != nil {
		return diskState{}, fmt.Errorf("file system of the images: %w", &os.PathError{Op: "stat", Path: dir, Err: err})
	}
	return diskState{device: deviceName(uint64(unix.Major(st.Dev)), uint64(unix.Minor(st.Dev))),
		bytes: fs.Blocks * uint64(fs.Bsize), inodes: fs.Files, free: fs.Ffree}, nil
}
