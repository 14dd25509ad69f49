package pod

import (
	"context"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// containerStats measures one running container. It waits until wait for a
// writable layer that was never measured.
func (s *Service) containerStats(ctx context.Context, c *container, wait time.Time) (*runtimeapi.ContainerStats, error) {
	v := c.get()
	m, err := s.measureContainer(ctx, c, s.statsPeriod())
	if err != nil {
		return nil, err
	}
	st := &runtimeapi.ContainerStats{
		Attributes: &runtimeapi.ContainerAttributes{Id: v.ID, Metadata: v.Config.Metadata,
			Labels: v.Config.Labels, Annotations: v.Config.Annotations},
		Cpu: m.cpuUsage(), Memory: m.memoryUsage(), Swap: m.swapUsage(), Io: m.ioUsage(),
	}
	if l, ok := s.layerSize(ctx, v.ID, wait); ok {
		st.WritableLayer = &runtimeapi.FilesystemUsage{
			Timestamp:  l.at.UnixNano(),
			FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: s.o.Root},
			UsedBytes:  &runtimeapi.UInt64Value{Value: l.bytes},
			InodesUsed: &runtimeapi.UInt64Value{Value: l.inodes},
		}
	}
	return st, nil
}

// sandboxStats measures one sandbox with its running containers.
func (s *Service) sandboxStats(ctx context.Context, sb *sandbox, cs []*container, wait time.Time) (*runtimeapi.PodSandboxStats, error) {
	v := sb.get()
	st := &runtimeapi.LinuxPodSandboxStats{}
	sum := usage{}
	var sumCores amount
	var processes amount
	for _, c := range cs {
		one, err := s.containerStats(ctx, c, wait)
		if err != nil {
			if err := s.leftOut(ctx, c, err); err != nil {
				return nil, err
			}
			continue
		}
		st.Containers = append(st.Containers, one)
		m, _, _ := s.stats.container(c.get().ID).usage.last()
		sum.add(m.usage)
		sumCores = sumCores.plus(m.cores)
		processes = processes.plus(s.processCount(c))
	}
	whole, ok, err := s.measurePod(ctx, sb, s.statsPeriod())
	if err != nil {
		s.log.Debug("pod cgroup left out of statistics", "sandbox", v.ID, "err", err)
	}
	if ok {
		if pids, err := cgroupRoot().pids(podCgroup(sb)); err == nil {
			processes = known(uint64(len(pids)))
		}
	} else {
		whole = sample{at: time.Now(), usage: sum, cores: sumCores}
	}
	st.Cpu, st.Memory, st.Io = whole.cpuUsage(), whole.memoryUsage(), whole.ioUsage()
	if processes.known {
		st.Process = &runtimeapi.ProcessUsage{Timestamp: time.Now().UnixNano(), ProcessCount: value(processes)}
	}
	ifs, err := s.measureNetwork(ctx, sb)
	if err != nil && ctx.Err() == nil && sb.get().State == runtimeapi.PodSandboxState_SANDBOX_READY {
		s.log.Warn("pod network left out of statistics", "sandbox", v.ID, "err", err)
	}
	st.Network = networkUsage(ifs)
	if ctx.Err() != nil { // what is missing now is no news of the pod
		return nil, ctx.Err()
	}
	return &runtimeapi.PodSandboxStats{Linux: st, Attributes: &runtimeapi.PodSandboxAttributes{
		Id: v.ID, Metadata: v.Config.Metadata, Labels: v.Config.Labels, Annotations: v.Config.Annotations}}, nil
}

// value is an amount in CRI's form: nil says that it is unknown.
func value(a amount) *runtimeapi.UInt64Value {
	if !a.known {
		return nil
	}
	return &runtimeapi.UInt64Value{Value: a.n}
}

func (m sample) cpuUsage() *runtimeapi.CpuUsage {
	return &runtimeapi.CpuUsage{Timestamp: m.at.UnixNano(), UsageCoreNanoSeconds: value(m.usage.cpu),
		UsageNanoCores: value(m.cores), Psi: m.usage.cpuStall.cri()}
}

func (m sample) memoryUsage() *runtimeapi.MemoryUsage {
	u := m.usage
	mem := &runtimeapi.MemoryUsage{Timestamp: m.at.UnixNano(), WorkingSetBytes: value(u.workingSet), UsageBytes: value(u.memory),
		RssBytes: value(u.rss), PageFaults: value(u.faults), MajorPageFaults: value(u.majorFaults), Psi: u.memoryStall.cri()}
	if u.memoryLimit.known && u.workingSet.known {
		mem.AvailableBytes = value(known(less(u.memoryLimit.n, u.workingSet.n)))
	}
	return mem
}

func (m sample) swapUsage() *runtimeapi.SwapUsage {
	u := m.usage
	if !u.swap.known {
		return nil
	}
	sw := &runtimeapi.SwapUsage{Timestamp: m.at.UnixNano(), SwapUsageBytes: value(u.swap)}
	if u.swapLimit.known {
		sw.SwapAvailableBytes = value(known(less(u.swapLimit.n, u.swap.n)))
	}
	return sw
}

func (m sample) ioUsage() *runtimeapi.IoUsage {
	if m.usage.ioStall == nil {
		return nil
	}
	return &runtimeapi.IoUsage{Timestamp: m.at.UnixNano(), Psi: m.usage.ioStall.cri()}
}

func (p *stall) cri() *runtimeapi.PsiStats {
	if p == nil {
		return nil
	}
	data := func(t stallTime) *runtimeapi.PsiData {
		return &runtimeapi.PsiData{Total: t.total, Avg10: t.avg10, Avg60: t.avg60, Avg300: t.avg300}
	}
	return &runtimeapi.PsiStats{Some: data(p.some), Full: data(p.full)}
}

func networkUsage(ifs []iface) *runtimeapi.NetworkUsage {
	if len(ifs) == 0 {
		return nil
	}
	u := &runtimeapi.NetworkUsage{Timestamp: time.Now().UnixNano()}
	first := mainOf(ifs)
	for i, f := range ifs {
		one := &runtimeapi.NetworkInterfaceUsage{Name: f.name,
			RxBytes: value(known(f.rxBytes)), RxErrors: value(known(f.rxErrors)),
			TxBytes: value(known(f.txBytes)), TxErrors: value(known(f.txErrors))}
		if i == first {
			u.DefaultInterface = one
		} else {
			u.Interfaces = append(u.Interfaces, one)
		}
	}
	return u
}
