package nri

import (
	"slices"

	"github.com/containerd/nri/pkg/api"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// DescribeSpec fills in what plugins read out of a container's specification.
func DescribeSpec(c *api.Container, spec *specs.Spec) {
	c.Mounts, c.Hooks = api.FromOCIMounts(spec.Mounts), api.FromOCIHooks(spec.Hooks)
	if p := spec.Process; p != nil {
		c.Args, c.Env = slices.Clone(p.Args), slices.Clone(p.Env)
		c.User = &api.User{Uid: p.User.UID, Gid: p.User.GID, AdditionalGids: slices.Clone(p.User.AdditionalGids)}
		for _, l := range p.Rlimits {
			c.Rlimits = append(c.Rlimits, &api.POSIXRlimit{Type: l.Type, Hard: l.Hard, Soft: l.Soft})
		}
	}
	l := spec.Linux
	if l == nil {
		return
	}
	c.Linux = &api.LinuxContainer{
		Namespaces: api.FromOCILinuxNamespaces(l.Namespaces), Devices: api.FromOCILinuxDevices(l.Devices),
		Resources: api.FromOCILinuxResources(l.Resources, nil), CgroupsPath: l.CgroupsPath,
		NetDevices: api.FromOCILinuxNetDevices(l.NetDevices), Sysctl: l.Sysctl,
	}
	if l.Seccomp != nil {
		c.Linux.SeccompPolicy = api.FromOCILinuxSeccomp(l.Seccomp)
	}
	if r := l.IntelRdt; r != nil {
		c.Linux.Rdt = &api.LinuxRdt{ClosId: api.String(r.ClosID), Schemata: api.RepeatedString(r.Schemata), EnableMonitoring: api.Bool(r.EnableMonitoring)}
	}
	if p := spec.Process; p != nil {
		c.Linux.OomScoreAdj = api.Int(p.OOMScoreAdj)
		c.Linux.IoPriority = api.FromOCILinuxIOPriority(p.IOPriority)
		if p.Scheduler != nil {
			c.Linux.Scheduler = api.FromOCILinuxScheduler(p.Scheduler)
		}
	}
}

// DescribeConfig fills in what only the client's request tells of a container.
func DescribeConfig(c *api.Container, cfg *runtimeapi.ContainerConfig) {
	for _, d := range cfg.GetCDIDevices() {
		c.CDIDevices = append(c.CDIDevices, &api.CDIDevice{Name: d.GetName()})
	}
	if p := cfg.GetLinux().GetSecurityContext().GetSeccomp(); p != nil && c.Linux != nil {
		c.Linux.SeccompProfile = &api.SecurityProfile{ProfileType: api.SecurityProfile_ProfileType(p.GetProfileType()), LocalhostRef: p.GetLocalhostRef()}
	}
}

// Resources translates resources of CRI. Unlike there, a value that is not set
// is not there.
func Resources(r *runtimeapi.LinuxContainerResources) *api.LinuxResources {
	if r == nil {
		return nil
	}
	out := &api.LinuxResources{
		Cpu:    &api.LinuxCPU{Cpus: r.CpusetCpus, Mems: r.CpusetMems},
		Memory: &api.LinuxMemory{},
	}
	if r.CpuShares != 0 {
		out.Cpu.Shares = api.UInt64(r.CpuShares)
	}
	if r.CpuQuota != 0 {
		out.Cpu.Quota = api.Int64(r.CpuQuota)
	}
	if r.CpuPeriod != 0 {
		out.Cpu.Period = api.UInt64(r.CpuPeriod)
	}
	if r.MemoryLimitInBytes != 0 {
		out.Memory.Limit = api.Int64(r.MemoryLimitInBytes)
	}
	if r.MemorySwapLimitInBytes != 0 {
		out.Memory.Swap = api.Int64(r.MemorySwapLimitInBytes)
	}
	for _, h := range r.HugepageLimits {
		out.HugepageLimits = append(out.HugepageLimits, &api.HugepageLimit{PageSize: h.PageSize, Limit: h.Limit})
	}
	if len(r.Unified) > 0 {
		out.Unified = r.Unified
	}
	return out
}
