package oci

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// oldestVersion is understood by every runtime still in use.
	oldestVersion = "1.0.2"
	// maxBaseSpec bounds the administrator's JSON file.
	maxBaseSpec = 4 << 20
	// bundleRoot is where shims mount the root file system, beneath the bundle.
	bundleRoot = "rootfs"
)

// Container makes the spec of a container. The result depends on the input,
// the image's accounts, the devices of a privileged container, and what the
// kernel offers; nothing else, and nothing is changed.
func Container(in Input) (*Result, error) {
	k, err := thisKernel()
	if err != nil {
		return nil, err
	}
	return container(in, k)
}

// builder carries one spec through its steps.
type builder struct {
	in   Input
	k    kernel
	sc   *runtimeapi.LinuxContainerSecurityContext
	spec *specs.Spec
	res  *Result
}

func container(in Input, k kernel) (*Result, error) {
	if err := ValidateContainer(in.Config, in.Sandbox, in.Node); err != nil {
		return nil, err
	}
	if err := checkID(in.ID); err != nil {
		return nil, err
	}
	spec, err := baseSpec(in.Handler)
	if err != nil {
		return nil, err
	}
	b := &builder{
		in: in, k: k, spec: spec,
		sc:  in.Config.GetLinux().GetSecurityContext(),
		res: &Result{Spec: spec},
	}
	// Later steps read what earlier ones wrote: HOME needs the variables,
	// seccomp the capabilities, CDI edits the finished spec.
	steps := []func() error{
		b.setProcess, b.setUser, b.setCapabilities, b.setStopSignal,
		b.setNamespaces, b.setCgroup, b.setResources, b.setOOMScore,
		b.setLabels, b.setMounts, b.setPaths, b.setDevices,
		b.setSeccomp, b.setAppArmor, b.setAnnotations, b.setClasses, b.injectCDI,
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return b.res, nil
}

// checkID keeps an id one component of a cgroup's path and of a systemd name.
func checkID(id string) error {
	if id == "" {
		return missing("id of the container")
	}
	if strings.Contains(id, ":") {
		return invalid("id of the container", id, `":" is not allowed`)
	}
	return checkName("id of the container", id)
}

func (b *builder) warn(format string, args ...any) {
	b.res.Warnings = append(b.res.Warnings, fmt.Sprintf(format, args...))
}

func (b *builder) userNamespace() bool { return b.in.Namespaces.User != "" }

// baseSpec is the administrator's spec, or an empty one with the standard
// mounts, in either case with every section that the steps write to.
func baseSpec(h Handler) (*specs.Spec, error) {
	s := &specs.Spec{Mounts: standardMounts()}
	if h.BaseSpec != "" {
		var err error
		if s, err = readBaseSpec(h.BaseSpec); err != nil {
			return nil, err
		}
	}
	s.Version = h.OCIVersion
	if s.Version == "" {
		s.Version = oldestVersion
	}
	if s.Process == nil {
		s.Process = &specs.Process{}
	}
	if s.Root == nil {
		s.Root = &specs.Root{}
	}
	s.Root.Path = bundleRoot
	if s.Linux == nil {
		s.Linux = &specs.Linux{}
	}
	if s.Linux.Resources == nil {
		s.Linux.Resources = &specs.LinuxResources{}
	}
	if len(s.Linux.Resources.Devices) == 0 {
		s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}
	}
	return s, nil
}

// readBaseSpec reads the file at every call, so that an edit counts from the
// next container on.
func readBaseSpec(path string) (*specs.Spec, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("base_runtime_spec: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxBaseSpec+1))
	if err != nil {
		return nil, fmt.Errorf("base_runtime_spec: %w", err)
	}
	if len(data) > maxBaseSpec {
		return nil, impossible("base_runtime_spec", path, "it has more than 4 MiB")
	}
	s := &specs.Spec{}
	if err := json.Unmarshal(data, s); err != nil {
		return nil, impossible("base_runtime_spec", path, "it is not an OCI spec: "+err.Error())
	}
	// Both come from elsewhere in a pod: /run is the image's, /dev/shm the pod's.
	s.Mounts = slices.DeleteFunc(s.Mounts, func(m specs.Mount) bool {
		at := inContainer(m.Destination)
		return at == "/run" || at == "/dev/shm"
	})
	return s, nil
}

// setNamespaces joins the pod's namespaces by path and makes the others.
func (b *builder) setNamespaces() error {
	ns := b.in.Namespaces
	l := b.spec.Linux
	l.Namespaces = []specs.LinuxNamespace{{Type: specs.MountNamespace}}
	join := func(kind specs.LinuxNamespaceType, path string) {
		if path != "" {
			l.Namespaces = append(l.Namespaces, specs.LinuxNamespace{Type: kind, Path: path})
		}
	}
	join(specs.NetworkNamespace, ns.Net)
	join(specs.IPCNamespace, ns.IPC)
	join(specs.UTSNamespace, ns.UTS)
	if ns.PID == "" && ns.PrivatePID {
		l.Namespaces = append(l.Namespaces, specs.LinuxNamespace{Type: specs.PIDNamespace})
	}
	join(specs.PIDNamespace, ns.PID)
	join(specs.CgroupNamespace, ns.Cgroup)
	// A cgroup namespace hides the node's tree; on cgroup v1 and for
	// privileged containers the field is used to seeing all of it.
	if ns.Cgroup == "" && b.in.Node.CgroupV2 && !b.sc.GetPrivileged() {
		l.Namespaces = append(l.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	l.UIDMappings, l.GIDMappings = nil, nil
	if ns.User == "" {
		return nil
	}
	join(specs.UserNamespace, ns.User)
	if len(ns.UIDs) == 0 || len(ns.GIDs) == 0 {
		return missing("mappings of the pod's user namespace")
	}
	l.UIDMappings, l.GIDMappings = idMappings(ns.UIDs), idMappings(ns.GIDs)
	return nil
}

func idMappings(list []*runtimeapi.IDMapping) []specs.LinuxIDMapping {
	var out []specs.LinuxIDMapping
	for _, m := range list {
		out = append(out, specs.LinuxIDMapping{ContainerID: m.GetContainerId(), HostID: m.GetHostId(), Size: m.GetLength()})
	}
	return out
}

func (b *builder) setCgroup() error {
	if b.in.Node.CgroupDisabled {
		b.spec.Linux.CgroupsPath = ""
		return nil
	}
	parent := cmp.Or(b.in.CgroupParent, b.in.Sandbox.GetLinux().GetCgroupParent())
	systemd := b.in.Handler.SystemdCgroup
	if systemd && parent != "" && !strings.HasSuffix(path.Base(parent), ".slice") {
		return impossible("cgroup_parent", parent, "the systemd cgroup driver needs a name that ends in .slice; make kubelet's cgroupDriver and SystemdCgroup of the runtime handler agree")
	}
	b.spec.Linux.CgroupsPath = cgroupsPath(parent, b.in.ID, systemd)
	return nil
}

// defaultMaskedPaths are the kubelet's own. The throttle counters tell a
// neighbour what the machine is doing.
func defaultMaskedPaths(cpus string) []string {
	paths := []string{
		"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore",
		"/proc/keys", "/proc/latency_stats", "/proc/timer_list",
		"/proc/timer_stats", "/proc/sched_debug", "/proc/scsi",
		"/sys/firmware", "/sys/devices/virtual/powercap",
	}
	entries, err := os.ReadDir(cpus)
	if err != nil {
		return paths
	}
	for _, e := range entries {
		if throttle := path.Join(cpus, e.Name(), "thermal_throttle"); strings.HasPrefix(e.Name(), "cpu") && exists(throttle) {
			paths = append(paths, throttle)
		}
	}
	return paths
}

func defaultReadonlyPaths() []string {
	return []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
}

// setPaths writes masked and read-only paths. On the wire an empty list and
// none are the same. Kubernetes sends full lists except for procMount:
// Unmasked, which it admits in user namespaces only; so elsewhere an empty
// list is a client that says nothing, and gets the defaults.
func (b *builder) setPaths() error {
	l := b.spec.Linux
	b.spec.Root.Readonly = b.sc.GetReadonlyRootfs()
	if b.sc.GetPrivileged() {
		l.MaskedPaths, l.ReadonlyPaths = nil, nil
		return nil
	}
	l.MaskedPaths, l.ReadonlyPaths = b.sc.GetMaskedPaths(), b.sc.GetReadonlyPaths()
	unsaid := len(l.MaskedPaths) == 0 && len(l.ReadonlyPaths) == 0 && !b.userNamespace()
	if unsaid || b.in.Node.DefaultProcMount {
		l.MaskedPaths, l.ReadonlyPaths = slices.Clone(b.k.masked), defaultReadonlyPaths()
	}
	return nil
}

// setOOMScore always writes a score: without one the container would inherit
// the shim's, which the kernel hardly ever picks.
func (b *builder) setOOMScore() error {
	score := int(b.in.Config.GetLinux().GetResources().GetOomScoreAdj())
	lowest := b.in.Node.DaemonOOMScore
	if score < lowest && (b.in.Node.RestrictOOMScore || !slices.Contains(b.k.held, "CAP_SYS_RESOURCE")) {
		if !b.in.Node.RestrictOOMScore {
			b.warn("oom_score_adj %d is raised to %d: this process may not go below its own without CAP_SYS_RESOURCE", score, lowest)
		}
		score = lowest
	}
	b.spec.Process.OOMScoreAdj = &score
	return nil
}

const annotationPrefix = "io.kubernetes.cri."

// setAnnotations passes on what the handler asks for, then writes those that
// runtimes read; an image has no say in either.
func (b *builder) setAnnotations() error {
	all := map[string]string{}
	maps.Copy(all, b.spec.Annotations)
	passOn(all, b.in.Sandbox.GetAnnotations(), b.in.Handler.PodAnnotations)
	passOn(all, b.in.Config.GetAnnotations(), b.in.Handler.ContainerAnnotations)
	pod := b.in.Sandbox.GetMetadata()
	maps.Copy(all, map[string]string{
		annotationPrefix + "container-type":    "container",
		annotationPrefix + "sandbox-id":        b.in.SandboxID,
		annotationPrefix + "sandbox-name":      pod.GetName(),
		annotationPrefix + "sandbox-namespace": pod.GetNamespace(),
		annotationPrefix + "sandbox-uid":       pod.GetUid(),
		annotationPrefix + "container-name":    b.in.Config.GetMetadata().GetName(),
		annotationPrefix + "image-name":        b.in.ImageName,
	})
	b.spec.Annotations = all
	return nil
}

// passOn copies the annotations that a glob names.
func passOn(to, from map[string]string, globs []string) {
	for key, value := range from {
		if slices.ContainsFunc(globs, func(g string) bool { return admits(g, key) }) {
			to[key] = value
		}
	}
}

// admits matches a key with a glob. Keys that make a runtime run hooks or set
// systemd properties need a glob that spells their prefix out: a "*" for the
// sake of something else must not hand them to every pod.
func admits(glob, key string) bool {
	if strings.HasPrefix(key, annotationPrefix) {
		return false
	}
	literal := glob
	if i := strings.IndexAny(glob, `*?[\`); i >= 0 {
		literal = glob[:i]
	}
	for _, reserved := range []string{"org.systemd.property.", "run.oci.", "org.criu.", "org.opencontainers."} {
		if strings.HasPrefix(key, reserved) && !strings.HasPrefix(literal, reserved) {
			return false
		}
	}
	ok, err := path.Match(glob, key)
	return ok && err == nil
}
