package pod

import (
	"fmt"
	"time"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"google.golang.org/protobuf/types/known/anypb"
)

// amount is a number that the kernel may not tell.
type amount struct {
	n     uint64
	known bool
}

func known(n uint64) amount { return amount{n, true} }

// plus adds two amounts; an unknown one adds nothing.
func (a amount) plus(b amount) amount {
	return amount{a.n + b.n, a.known || b.known}
}

// usage is what a cgroup has used, whichever cgroup version counted it.
// Times are in nanoseconds, sizes in bytes.
type usage struct {
	cpu, cpuUser, cpuSystem                  amount
	periods, throttledPeriods, throttledTime amount

	memory, memoryMax, workingSet  amount
	memoryLimit, swap, swapLimit   amount // limits: absent when there is none
	memoryTold, swapTold           bool   // the kernel was asked for limits
	rss, cache, mapped, kernel     amount
	faults, majorFaults            amount // of the cgroup and those below it
	ownFaults, ownMajorFaults      amount // v1 counts them apart
	limitHits, oomKills            amount
	threads, threadsMax            amount
	cpuStall, memoryStall, ioStall *stall
	devices                        []deviceUsage
	operations                     []operation
	hugePages                      []hugePages
}

// stall is pressure stall information: how long some or all tasks waited.
type stall struct{ some, full stallTime }

type stallTime struct {
	total                uint64 // nanoseconds
	avg10, avg60, avg300 float64
}

// deviceUsage is what was read from and written to a block device.
type deviceUsage struct {
	name                                 string // "" when unknown
	major, minor                         uint64
	readBytes, writeBytes, reads, writes uint64
}

// operation is bytes by kind, which only cgroup v1 tells apart.
type operation struct {
	name         string
	major, minor uint64
	kind         string
	bytes        uint64
}

type hugePages struct {
	size  string
	usage uint64
	max   amount
}

// unlimited is the size from which a limit means that there is none: cgroup v1
// says so with the highest multiple of the page size.
const unlimited = 1 << 62

func limit(n uint64) amount {
	if n == 0 || n >= unlimited {
		return amount{}
	}
	return known(n)
}

// less subtracts without going below zero: the two were not read at once.
func less(a, b uint64) uint64 {
	return a - min(a, b)
}

// usageOf reads the metrics of a shim.
func usageOf(a *anypb.Any) (usage, error) {
	var v1 cgroup1.Metrics
	var v2 cgroup2.Metrics
	switch {
	case a == nil:
		return usage{}, nil // a shim that counts nothing
	case a.MessageIs(&v1):
		if err := a.UnmarshalTo(&v1); err != nil {
			return usage{}, fmt.Errorf("read the shim's metrics: %w", err)
		}
		return usageV1(&v1), nil
	case a.MessageIs(&v2):
		if err := a.UnmarshalTo(&v2); err != nil {
			return usage{}, fmt.Errorf("read the shim's metrics: %w", err)
		}
		return usageV2(&v2), nil
	}
	return usage{}, fmt.Errorf("shim sent metrics of the unknown type %q", a.TypeUrl)
}

func usageV1(m *cgroup1.Metrics) usage {
	var u usage
	if c := m.CPU.GetUsage(); c != nil {
		u.cpu, u.cpuUser, u.cpuSystem = known(c.Total), known(c.User), known(c.Kernel)
	}
	if t := m.CPU.GetThrottling(); t != nil {
		u.periods, u.throttledPeriods, u.throttledTime = known(t.Periods), known(t.ThrottledPeriods), known(t.ThrottledTime)
	}
	if mem := m.Memory; mem != nil {
		u.memoryV1(mem)
	}
	if o := m.MemoryOomControl; o != nil {
		u.oomKills = known(o.OomKill)
	}
	if p := m.Pids; p != nil {
		u.threads, u.threadsMax = known(p.Current), known(limit(p.Limit).n)
	}
	for _, h := range m.Hugetlb {
		u.hugePages = append(u.hugePages, hugePages{h.Pagesize, h.Usage, known(h.Max)})
	}
	u.blockV1(m.Blkio)
	return u
}

func (u *usage) memoryV1(m *cgroup1.MemoryStat) {
	u.rss, u.cache, u.mapped = known(m.TotalRSS), known(m.TotalCache), known(m.TotalMappedFile)
	u.faults, u.majorFaults = known(m.TotalPgFault), known(m.TotalPgMajFault)
	u.ownFaults, u.ownMajorFaults = known(m.PgFault), known(m.PgMajFault)
	if e := m.Usage; e != nil {
		u.memory, u.memoryMax, u.limitHits = known(e.Usage), known(e.Max), known(e.Failcnt)
		u.workingSet = known(less(e.Usage, m.TotalInactiveFile))
		u.memoryLimit, u.memoryTold = limit(e.Limit), true
	}
	// The swap entry counts memory and swap together; it is all zero where
	// the kernel does not account swap.
	if e := m.Swap; e != nil && e.Limit != 0 {
		u.swap, u.swapTold = known(less(e.Usage, m.Usage.GetUsage())), true
		if l := limit(e.Limit); l.known && u.memoryLimit.known {
			u.swapLimit = known(less(l.n, u.memoryLimit.n))
		}
	}
	if e := m.Kernel; e != nil {
		u.kernel = known(e.Usage)
	}
}

func (u *usage) blockV1(b *cgroup1.BlkIOStat) {
	type key struct{ major, minor uint64 }
	at := map[key]int{}
	device := func(e *cgroup1.BlkIOEntry) *deviceUsage {
		k := key{e.Major, e.Minor}
		i, ok := at[k]
		if !ok {
			i = len(u.devices)
			at[k] = i
			u.devices = append(u.devices, deviceUsage{name: e.Device, major: e.Major, minor: e.Minor})
		}
		return &u.devices[i]
	}
	for _, e := range b.GetIoServiceBytesRecursive() {
		switch e.Op {
		case "Read":
			device(e).readBytes = e.Value
		case "Write":
			device(e).writeBytes = e.Value
		}
		u.operations = append(u.operations, operation{e.Device, e.Major, e.Minor, e.Op, e.Value})
	}
	for _, e := range b.GetIoServicedRecursive() {
		switch e.Op {
		case "Read":
			device(e).reads = e.Value
		case "Write":
			device(e).writes = e.Value
		}
	}
}

func usageV2(m *cgroup2.Metrics) usage {
	var u usage
	if c := m.CPU; c != nil {
		micro := uint64(time.Microsecond)
		u.cpu, u.cpuUser, u.cpuSystem = known(c.UsageUsec*micro), known(c.UserUsec*micro), known(c.SystemUsec*micro)
		u.periods, u.throttledPeriods, u.throttledTime = known(c.NrPeriods), known(c.NrThrottled), known(c.ThrottledUsec*micro)
		u.cpuStall = stallOf(c.PSI)
	}
	if mem := m.Memory; mem != nil {
		u.memoryV2(mem)
	}
	if e := m.MemoryEvents; e != nil {
		u.limitHits, u.oomKills = known(e.Max), known(e.OomKill)
	}
	if p := m.Pids; p != nil {
		u.threads, u.threadsMax = known(p.Current), known(limit(p.Limit).n)
	}
	for _, h := range m.Hugetlb {
		u.hugePages = append(u.hugePages, hugePages{size: h.Pagesize, usage: h.Current}) // its Max is the limit
	}
	for _, e := range m.Io.GetUsage() {
		u.devices = append(u.devices, deviceUsage{major: e.Major, minor: e.Minor,
			readBytes: e.Rbytes, writeBytes: e.Wbytes, reads: e.Rios, writes: e.Wios})
	}
	u.ioStall = stallOf(m.Io.GetPSI())
	return u
}

func (u *usage) memoryV2(m *cgroup2.MemoryStat) {
	u.memory, u.workingSet = known(m.Usage), known(less(m.Usage, m.InactiveFile))
	u.memoryLimit, u.memoryTold = limit(m.UsageLimit), true
	u.rss, u.cache, u.mapped = known(m.Anon), known(m.File), known(m.FileMapped)
	u.kernel = known(m.KernelStack + m.Slab)
	// Version 2 counts a group with those below it and nothing else.
	u.faults, u.majorFaults = known(m.Pgfault), known(m.Pgmajfault)
	u.ownFaults, u.ownMajorFaults = u.faults, u.majorFaults
	if m.MaxUsage > 0 { // kernels before 5.19 do not tell
		u.memoryMax = known(m.MaxUsage)
	}
	u.swap, u.swapTold = known(m.SwapUsage), true
	if m.SwapLimit < unlimited { // 0 is a limit here: no swap
		u.swapLimit = known(m.SwapLimit)
	}
	u.memoryStall = stallOf(m.PSI)
}

func stallOf(p *cgroup2.PSIStats) *stall {
	if p == nil {
		return nil
	}
	t := func(d *cgroup2.PSIData) stallTime {
		return stallTime{d.GetTotal() * uint64(time.Microsecond), d.GetAvg10(), d.GetAvg60(), d.GetAvg300()}
	}
	return &stall{some: t(p.Some), full: t(p.Full)}
}

// add sums what containers of a pod without a cgroup of its own have used.
func (u *usage) add(v usage) {
	u.cpu = u.cpu.plus(v.cpu)
	u.memory = u.memory.plus(v.memory)
	u.workingSet = u.workingSet.plus(v.workingSet)
	u.rss = u.rss.plus(v.rss)
	u.faults = u.faults.plus(v.faults)
	u.majorFaults = u.majorFaults.plus(v.majorFaults)
	u.swap = u.swap.plus(v.swap)
}
