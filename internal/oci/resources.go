package oci

import (
	"maps"
	"math"
	"regexp"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// What the kernel takes; beyond it a runtime fails with a bare EINVAL.
const (
	minShares, maxShares = 2, 262144
	minPeriod, maxPeriod = 1000, 1000000
	minQuota, maxQuota   = 1000, 1<<44 - 1
	maxCpuset            = 4096
	maxUnified           = 4096
)

var (
	cpuList    = regexp.MustCompile(`^[0-9]{1,6}(-[0-9]{1,6})?(,[0-9]{1,6}(-[0-9]{1,6})?)*$`)
	pageSize   = regexp.MustCompile(`^[1-9][0-9]{0,5}[KMG]B$`)
	cgroupFile = regexp.MustCompile(`^[a-z][a-z0-9_]*(\.[A-Za-z0-9_-]+)+$`)
)

// setResources writes the container's limits.
func (b *builder) setResources() error {
	if b.in.Node.CgroupDisabled {
		return nil
	}
	err := applyResources(b.spec.Linux.Resources, b.in.Config.GetLinux().GetResources(), b.in.Node, b.k, b.warn)
	DropUnlimited(b.spec.Linux.Resources)
	return err
}

// DropUnlimited leaves out of the resources of a container that is not made
// yet what it has without being told: no limit of its CPU time. crun 1.8 takes
// the -1 that stands for that to be a large number, which cgroup v1 refuses.
func DropUnlimited(r *specs.LinuxResources) {
	if r.CPU == nil || r.CPU.Quota == nil || *r.CPU.Quota != -1 {
		return
	}
	cpu := *r.CPU
	cpu.Quota = nil
	r.CPU = &cpu
	if cpu == (specs.LinuxCPU{}) {
		r.CPU = nil
	}
}

// UpdateResources returns the resources of spec with r's values in the place
// of the old ones; what r leaves at zero stays. spec is not changed.
func UpdateResources(spec *specs.Spec, r *runtimeapi.LinuxContainerResources, node Node) (*specs.LinuxResources, error) {
	k, err := thisKernel()
	if err != nil {
		return nil, err
	}
	return updateResources(spec, r, node, k)
}

func updateResources(spec *specs.Spec, r *runtimeapi.LinuxContainerResources, node Node, k kernel) (*specs.LinuxResources, error) {
	if err := checkResources(r); err != nil {
		return nil, err
	}
	var merged specs.LinuxResources
	if spec != nil && spec.Linux != nil && spec.Linux.Resources != nil {
		merged = *spec.Linux.Resources
	}
	if merged.CPU != nil {
		cpu := *merged.CPU
		merged.CPU = &cpu
	}
	if merged.Memory != nil {
		memory := *merged.Memory
		merged.Memory = &memory
	}
	merged.HugepageLimits = slices.Clone(merged.HugepageLimits)
	merged.Unified = maps.Clone(merged.Unified)
	if err := applyResources(&merged, r, node, k, func(string, ...any) {}); err != nil {
		return nil, err
	}
	return &merged, nil
}

// applyResources writes r's values over those of to.
func applyResources(to *specs.LinuxResources, r *runtimeapi.LinuxContainerResources, node Node, k kernel, warn func(string, ...any)) error {
	if r == nil {
		return nil
	}
	applyCPU(to, r)
	if err := applyMemory(to, r, k); err != nil {
		return err
	}
	if err := applyHugepages(to, r, node, k, warn); err != nil {
		return err
	}
	if len(r.GetUnified()) == 0 {
		return nil
	}
	if !node.CgroupV2 {
		return impossible("number of unified resources", len(r.GetUnified()), "this node has cgroup v1, which has no unified resources; use the typed fields")
	}
	if to.Unified == nil {
		to.Unified = map[string]string{}
	}
	maps.Copy(to.Unified, r.GetUnified())
	return nil
}

func applyCPU(to *specs.LinuxResources, r *runtimeapi.LinuxContainerResources) {
	cpu := specs.LinuxCPU{}
	if to.CPU != nil {
		cpu = *to.CPU
	}
	if v := uint64(r.GetCpuShares()); v != 0 {
		cpu.Shares = &v
	}
	if v := r.GetCpuQuota(); v != 0 {
		cpu.Quota = &v
	}
	if v := uint64(r.GetCpuPeriod()); v != 0 {
		cpu.Period = &v
	}
	if v := r.GetCpusetCpus(); v != "" {
		cpu.Cpus = v
	}
	if v := r.GetCpusetMems(); v != "" {
		cpu.Mems = v
	}
	if cpu != (specs.LinuxCPU{}) {
		to.CPU = &cpu
	}
}

// applyMemory sets the limits. A memory limit without a swap limit means no
// swap: the sum of both, which is what the specification's swap is, equals the
// memory limit.
func applyMemory(to *specs.LinuxResources, r *runtimeapi.LinuxContainerResources, k kernel) error {
	limit, swap := r.GetMemoryLimitInBytes(), r.GetMemorySwapLimitInBytes()
	if limit == 0 && swap == 0 {
		return nil
	}
	memory := specs.LinuxMemory{}
	if to.Memory != nil {
		memory = *to.Memory
	}
	if limit != 0 {
		memory.Limit = &limit
		if swap == 0 {
			swap = limit
		}
	}
	if k.swap {
		if swap > 0 && memory.Limit == nil {
			return invalid("memory_swap_limit_in_bytes", swap, "it counts memory and swap together and needs memory_limit_in_bytes beside it")
		}
		if swap > 0 && swap < *memory.Limit {
			return invalid("memory_swap_limit_in_bytes", swap, "it counts memory and swap together, so it may not be less than memory_limit_in_bytes")
		}
		memory.Swap = &swap
	}
	to.Memory = &memory
	return nil
}

func applyHugepages(to *specs.LinuxResources, r *runtimeapi.LinuxContainerResources, node Node, k kernel, warn func(string, ...any)) error {
	if node.HugetlbDisabled {
		return nil
	}
	for _, h := range r.GetHugepageLimits() {
		if !k.hugetlb {
			// kubelet sends a zero for every page size of the machine.
			if h.GetLimit() == 0 {
				continue
			}
			if !node.HugetlbTolerated {
				return impossible("hugepage_limits", h.GetPageSize(), "this node has no hugetlb cgroup controller; set tolerate_missing_hugetlb_controller to ignore it")
			}
			warn("hugepage limit of %s is ignored: this node has no hugetlb cgroup controller", h.GetPageSize())
			continue
		}
		limit := specs.LinuxHugepageLimit{Pagesize: h.GetPageSize(), Limit: h.GetLimit()}
		i := slices.IndexFunc(to.HugepageLimits, func(o specs.LinuxHugepageLimit) bool { return o.Pagesize == limit.Pagesize })
		if i < 0 {
			to.HugepageLimits = append(to.HugepageLimits, limit)
		} else {
			to.HugepageLimits[i] = limit
		}
	}
	return nil
}

// checkResources refuses negative, overflowing and malformed values.
func checkResources(r *runtimeapi.LinuxContainerResources) error {
	if r == nil {
		return nil
	}
	switch shares, quota, period := r.GetCpuShares(), r.GetCpuQuota(), r.GetCpuPeriod(); {
	case shares != 0 && (shares < minShares || shares > maxShares):
		return invalid("cpu_shares", shares, "give 0 for none, or 2 to 262144")
	case period != 0 && (period < minPeriod || period > maxPeriod):
		return invalid("cpu_period", period, "give 0 for none, or 1000 to 1000000 microseconds")
	case quota != 0 && quota != -1 && (quota < minQuota || quota > maxQuota):
		return invalid("cpu_quota", quota, "give 0 for none, -1 for no limit, or at least 1000 microseconds")
	case r.GetMemoryLimitInBytes() < -1:
		return invalid("memory_limit_in_bytes", r.GetMemoryLimitInBytes(), "give 0 for none, -1 for no limit, or a positive number")
	case r.GetMemorySwapLimitInBytes() < -1:
		return invalid("memory_swap_limit_in_bytes", r.GetMemorySwapLimitInBytes(), "give 0 for none, -1 for no limit, or a positive number")
	case r.GetOomScoreAdj() < -1000 || r.GetOomScoreAdj() > 1000:
		return invalid("oom_score_adj", r.GetOomScoreAdj(), "give -1000 to 1000")
	}
	for _, f := range []named[string]{{"cpuset_cpus", r.GetCpusetCpus()}, {"cpuset_mems", r.GetCpusetMems()}} {
		if f.value != "" && (len(f.value) > maxCpuset || !cpuList.MatchString(f.value)) {
			return invalid(f.field, f.value, `give a list such as "0-3,8"`)
		}
	}
	return checkMaps(r)
}

func checkMaps(r *runtimeapi.LinuxContainerResources) error {
	if len(r.GetHugepageLimits()) > maxRepeated || len(r.GetUnified()) > maxRepeated {
		return invalid("number of hugepage_limits or unified", max(len(r.GetHugepageLimits()), len(r.GetUnified())), "too many")
	}
	for _, h := range r.GetHugepageLimits() {
		if h == nil || !pageSize.MatchString(h.GetPageSize()) {
			return invalid("page_size of hugepage_limits", h.GetPageSize(), `give a size such as "2MB" or "1GB"`)
		}
		if h.GetLimit() > math.MaxInt64 {
			return invalid("limit of hugepage_limits", h.GetLimit(), "it is larger than the kernel counts")
		}
	}
	for _, key := range slices.Sorted(maps.Keys(r.GetUnified())) {
		value := r.GetUnified()[key]
		// cgroup.procs and its like move processes instead of limiting them.
		if !cgroupFile.MatchString(key) || strings.HasPrefix(key, "cgroup.") {
			return invalid("unified key", key, `name a limit file of cgroup v2 such as "memory.high"`)
		}
		if len(value) > maxUnified || !printable(strings.ReplaceAll(value, "\n", "")) {
			return invalid("unified "+key, value, "give at most 4096 printable bytes")
		}
	}
	return nil
}
