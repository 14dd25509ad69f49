package oci

import (
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func (e *specEditor) Spec() *specs.Spec { return e.spec }

func (e *specEditor) AddAnnotation(key, value string) { set(&e.spec.Annotations, key, value) }
func (e *specEditor) RemoveAnnotation(key string)     { delete(e.spec.Annotations, key) }

func (e *specEditor) AddProcessEnv(name, value string) {
	env := newEnviron(e.process().Env)
	env.set(name + "=" + value)
	e.process().Env = env.list
}
func (e *specEditor) ClearProcessEnv()              { e.process().Env = nil }
func (e *specEditor) SetProcessArgs(args []string)  { e.process().Args = args }
func (e *specEditor) SetProcessOOMScoreAdj(adj int) { e.process().OOMScoreAdj = &adj }

//nolint:staticcheck // plugins may still ask for prestart hooks
func (e *specEditor) AddPreStartHook(h specs.Hook) {
	e.hooks().Prestart = append(e.hooks().Prestart, h)
}
func (e *specEditor) AddPostStartHook(h specs.Hook) {
	e.hooks().Poststart = append(e.hooks().Poststart, h)
}
func (e *specEditor) AddPostStopHook(h specs.Hook) {
	e.hooks().Poststop = append(e.hooks().Poststop, h)
}

func (e *specEditor) Mounts() []specs.Mount  { return e.spec.Mounts }
func (e *specEditor) AddMount(m specs.Mount) { e.spec.Mounts = append(e.spec.Mounts, m) }
func (e *specEditor) ClearMounts()           { e.spec.Mounts = nil }
func (e *specEditor) RemoveMount(dest string) {
	e.spec.Mounts = slices.DeleteFunc(e.spec.Mounts, func(m specs.Mount) bool { return m.Destination == dest })
}

func (e *specEditor) AddDevice(d specs.LinuxDevice) {
	e.RemoveDevice(d.Path)
	e.linux().Devices = append(e.linux().Devices, d)
}
func (e *specEditor) RemoveDevice(path string) {
	e.linux().Devices = slices.DeleteFunc(e.linux().Devices, func(d specs.LinuxDevice) bool { return d.Path == path })
}

// AddOrReplaceLinuxNamespace takes the spec's own words for namespaces.
func (e *specEditor) AddOrReplaceLinuxNamespace(kind, path string) error {
	if err := e.RemoveLinuxNamespace(kind); err != nil {
		return err
	}
	e.linux().Namespaces = append(e.linux().Namespaces, specs.LinuxNamespace{Type: specs.LinuxNamespaceType(kind), Path: path})
	return nil
}

func (e *specEditor) RemoveLinuxNamespace(kind string) error {
	known := []specs.LinuxNamespaceType{specs.PIDNamespace, specs.NetworkNamespace, specs.MountNamespace, specs.IPCNamespace,
		specs.UTSNamespace, specs.UserNamespace, specs.CgroupNamespace, specs.TimeNamespace}
	if !slices.Contains(known, specs.LinuxNamespaceType(kind)) {
		return invalid("namespace of an NRI plugin", kind, "give pid, network, mount, ipc, uts, user, cgroup or time")
	}
	e.linux().Namespaces = slices.DeleteFunc(e.linux().Namespaces, func(n specs.LinuxNamespace) bool { return string(n.Type) == kind })
	return nil
}

func (e *specEditor) AddLinuxSysctl(key, value string) { set(&e.linux().Sysctl, key, value) }
func (e *specEditor) RemoveLinuxSysctl(key string)     { delete(e.linux().Sysctl, key) }
func (e *specEditor) SetLinuxCgroupsPath(path string)  { e.linux().CgroupsPath = path }

// SetLinuxRootPropagation is called for mounts that propagate.
func (e *specEditor) SetLinuxRootPropagation(mode string) error {
	if !slices.Contains([]string{"", "private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable"}, mode) {
		return invalid("propagation of an NRI plugin", mode, "give rprivate, rslave or rshared")
	}
	e.linux().RootfsPropagation = mode
	return nil
}

func (e *specEditor) AddLinuxResourcesDevice(allow bool, kind string, major, minor *int64, access string) {
	r := e.resources()
	r.Devices = append(r.Devices, specs.LinuxDeviceCgroup{Allow: allow, Type: kind, Major: major, Minor: minor, Access: access})
}

func (e *specEditor) AddLinuxResourcesHugepageLimit(size string, limit uint64) {
	r := e.resources()
	r.HugepageLimits = slices.DeleteFunc(r.HugepageLimits, func(l specs.LinuxHugepageLimit) bool { return l.Pagesize == size })
	r.HugepageLimits = append(r.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: size, Limit: limit})
}

func (e *specEditor) AddLinuxResourcesUnified(key, value string) {
	set(&e.resources().Unified, key, value)
}

func (e *specEditor) SetLinuxResourcesCPUCpus(cpus string)        { e.cpu().Cpus = cpus }
func (e *specEditor) SetLinuxResourcesCPUMems(mems string)        { e.cpu().Mems = mems }
func (e *specEditor) SetLinuxResourcesCPUPeriod(period uint64)    { e.cpu().Period = &period }
func (e *specEditor) SetLinuxResourcesCPUQuota(quota int64)       { e.cpu().Quota = &quota }
func (e *specEditor) SetLinuxResourcesCPUShares(shares uint64)    { e.cpu().Shares = &shares }
func (e *specEditor) SetLinuxResourcesMemoryLimit(limit int64)    { e.memory().Limit = &limit }
func (e *specEditor) SetLinuxResourcesMemorySwap(swap int64)      { e.memory().Swap = &swap }
func (e *specEditor) SetLinuxResourcesCPURealtimePeriod(p uint64) { e.cpu().RealtimePeriod = &p }
func (e *specEditor) SetLinuxResourcesCPURealtimeRuntime(t int64) { e.cpu().RealtimeRuntime = &t }
