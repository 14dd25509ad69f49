package oci

import (
	"math"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func resources(t *testing.T, r *runtimeapi.LinuxContainerResources, node Node, k kernel) *specs.LinuxResources {
	t.Helper()
	got, err := updateResources(nil, r, node, k)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestSwap(t *testing.T) {
	const m = 64 << 20
	for name, c := range map[string]struct {
		limit, swap int64
		noSwap      bool
		want        int64 // 0: not set
	}{
		"limit alone forbids swap": {limit: m, want: m},
		"more swap":                {limit: m, swap: 2 * m, want: 2 * m},
		"endless swap":             {limit: m, swap: -1, want: -1},
		"no limits":                {},
		"no controller":            {limit: m, swap: 2 * m, noSwap: true},
		"unlimited":                {limit: -1, want: -1},
	} {
		t.Run(name, func(t *testing.T) {
			k := testKernel()
			k.swap = !c.noSwap
			got := resources(t, &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: c.limit, MemorySwapLimitInBytes: c.swap}, Node{}, k)
			switch {
			case c.want == 0 && got.Memory != nil && got.Memory.Swap != nil:
				t.Errorf("swap is %d, want none", *got.Memory.Swap)
			case c.want != 0 && (got.Memory == nil || got.Memory.Swap == nil || *got.Memory.Swap != c.want):
				t.Errorf("memory is %+v, want swap %d", got.Memory, c.want)
			case c.limit != 0 && *got.Memory.Limit != c.limit:
				t.Errorf("limit is %d", *got.Memory.Limit)
			}
		})
	}
}

func TestResourcesRefused(t *testing.T) {
	type r = runtimeapi.LinuxContainerResources
	for name, c := range map[string]struct {
		r    *r
		word string
	}{
		"negative shares":      {&r{CpuShares: -1}, "cpu_shares"},
		"overflowing shares":   {&r{CpuShares: math.MaxInt64}, "cpu_shares"},
		"one share":            {&r{CpuShares: 1}, "cpu_shares"},
		"negative period":      {&r{CpuPeriod: -1}, "cpu_period"},
		"overflowing period":   {&r{CpuPeriod: math.MaxInt64}, "cpu_period"},
		"negative quota":       {&r{CpuQuota: -2}, "cpu_quota"},
		"overflowing quota":    {&r{CpuQuota: math.MaxInt64}, "cpu_quota"},
		"tiny quota":           {&r{CpuQuota: 10}, "cpu_quota"},
		"negative memory":      {&r{MemoryLimitInBytes: -2}, "memory_limit_in_bytes"},
		"least memory":         {&r{MemoryLimitInBytes: math.MinInt64}, "memory_limit_in_bytes"},
		"negative swap":        {&r{MemorySwapLimitInBytes: -7}, "memory_swap_limit_in_bytes"},
		"swap below memory":    {&r{MemoryLimitInBytes: 4 << 20, MemorySwapLimitInBytes: 1 << 20}, "memory_swap_limit_in_bytes"},
		"swap without memory":  {&r{MemorySwapLimitInBytes: 1 << 20}, "memory_limit_in_bytes"},
		"score":                {&r{OomScoreAdj: 1001}, "oom_score_adj"},
		"overflowing score":    {&r{OomScoreAdj: math.MinInt64}, "oom_score_adj"},
		"cpuset path":          {&r{CpusetCpus: "../../x"}, "cpuset_cpus"},
		"cpuset newline":       {&r{CpusetMems: "0\n1"}, "cpuset_mems"},
		"page size":            {&r{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB/../x", Limit: 1}}}, "page_size"},
		"page size nil":        {&r{HugepageLimits: []*runtimeapi.HugepageLimit{nil}}, "page_size"},
		"page limit":           {&r{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: math.MaxUint64}}}, "limit"},
		"unified path":         {&r{Unified: map[string]string{"../memory.max": "1"}}, "unified"},
		"unified moves":        {&r{Unified: map[string]string{"cgroup.procs": "1"}}, "unified"},
		"unified binary value": {&r{Unified: map[string]string{"memory.max": "1\x00"}}, "memory.max"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := updateResources(nil, c.r, Node{CgroupV2: true}, testKernel())
			wantError(t, err, errdefs.ErrInvalidArgument, c.word)
		})
	}
	_, err := updateResources(nil, &r{Unified: map[string]string{"memory.max": "1"}}, Node{}, testKernel())
	wantError(t, err, errdefs.ErrFailedPrecondition, "cgroup v1")
}

func TestHugepages(t *testing.T) {
	r := &runtimeapi.LinuxContainerResources{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "1GB"}, {PageSize: "2MB", Limit: 4 << 20}}}
	if got := resources(t, r, Node{}, testKernel()); len(got.HugepageLimits) != 2 {
		t.Errorf("limits are %v", got.HugepageLimits)
	}
	absent := testKernel()
	absent.hugetlb = false
	_, err := updateResources(nil, r, Node{}, absent)
	wantError(t, err, errdefs.ErrFailedPrecondition, "tolerate_missing_hugetlb_controller")
	if got := resources(t, r, Node{HugetlbTolerated: true}, absent); got.HugepageLimits != nil {
		t.Errorf("limits are %v, want none", got.HugepageLimits)
	}
	if got := resources(t, r, Node{HugetlbDisabled: true}, testKernel()); got.HugepageLimits != nil {
		t.Errorf("limits are %v, want none where they are disabled", got.HugepageLimits)
	}
	r.HugepageLimits = r.HugepageLimits[:1]
	if got := resources(t, r, Node{}, absent); got.HugepageLimits != nil {
		t.Errorf("a zero limit became %v", got.HugepageLimits)
	}
}

func TestUpdateMerges(t *testing.T) {
	node := Node{CgroupV2: true}
	spec := &specs.Spec{Linux: &specs.Linux{Resources: resources(t, &runtimeapi.LinuxContainerResources{
		CpuShares: 100, CpuQuota: 2000, CpusetCpus: "0", MemoryLimitInBytes: 1 << 20,
		HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 1}},
		Unified:        map[string]string{"memory.low": "1"},
	}, node, testKernel())}}
	got, err := updateResources(spec, &runtimeapi.LinuxContainerResources{
		CpuQuota: -1, MemoryLimitInBytes: 2 << 20,
		HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 2}, {PageSize: "1GB", Limit: 3}},
		Unified:        map[string]string{"memory.high": "2"},
	}, node, testKernel())
	if err != nil {
		t.Fatal(err)
	}
	if *got.CPU.Shares != 100 || *got.CPU.Quota != -1 || got.CPU.Cpus != "0" || *got.Memory.Limit != 2<<20 || *got.Memory.Swap != 2<<20 {
		t.Errorf("cpu %+v, memory %+v", got.CPU, got.Memory)
	}
	if len(got.HugepageLimits) != 2 || got.HugepageLimits[0].Limit != 2 || len(got.Unified) != 2 {
		t.Errorf("hugepages %v, unified %v", got.HugepageLimits, got.Unified)
	}
	old := spec.Linux.Resources
	if *old.CPU.Quota != 2000 || *old.Memory.Limit != 1<<20 || len(old.HugepageLimits) != 1 || old.HugepageLimits[0].Limit != 1 || len(old.Unified) != 1 {
		t.Error("the old spec changed")
	}
	if _, err := UpdateResources(nil, nil, Node{}); err != nil {
		t.Errorf("nothing to update: %v", err)
	}
}
