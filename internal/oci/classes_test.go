package oci

import (
	"errors"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestBlockIOClass(t *testing.T) {
	const pods, own = "blockio.resources.beta.kubernetes.io/pod", "blockio.resources.beta.kubernetes.io/container.web"
	weight := uint16(40)
	classes := Classes{BlockIO: func(class string) (*specs.LinuxBlockIO, error) {
		if class != "slow" {
			return nil, errors.New("no such class")
		}
		return &specs.LinuxBlockIO{Weight: &weight}, nil
	}}
	base := typical(t)
	base.Config.Metadata = &runtimeapi.ContainerMetadata{Name: "web"}
	with := func(c Classes, podAnnotations map[string]string) Input {
		in := base
		in.Node.Classes = c
		in.Sandbox = proto.CloneOf(base.Sandbox)
		in.Sandbox.Annotations = podAnnotations
		return in
	}
	for name, annotations := range map[string]map[string]string{"pod": {pods: "slow"}, "container": {pods: "none", own: "slow"}} {
		res := build(t, with(classes, annotations))
		if b := res.Spec.Linux.Resources.BlockIO; b == nil || *b.Weight != 40 {
			t.Errorf("%s: limits %v", name, b)
		}
	}
	if b := build(t, with(classes, nil)).Spec.Linux.Resources.BlockIO; b != nil {
		t.Errorf("no class named: %v", b)
	}
	refuse(t, with(classes, map[string]string{pods: "other"}), errdefs.ErrFailedPrecondition, "no such class")
	refuse(t, with(Classes{}, map[string]string{pods: "slow"}), errdefs.ErrFailedPrecondition, "ignore_blockio_not_enabled_errors")
	res := build(t, with(Classes{IgnoreNoBlockIO: true}, map[string]string{pods: "slow"}))
	if res.Spec.Linux.Resources.BlockIO != nil || len(res.Warnings) == 0 {
		t.Errorf("ignored: %v, warnings %q", res.Spec.Linux.Resources.BlockIO, res.Warnings)
	}
}

func TestRDTClass(t *testing.T) {
	const pods = "rdt.resources.beta.kubernetes.io/pod"
	in := typical(t)
	in.Sandbox.Annotations = map[string]string{pods: "gold"}
	refuse(t, in, errdefs.ErrFailedPrecondition, "ignore_rdt_not_enabled_errors")
	in.Node.Classes.IgnoreNoRDT = true
	if res := build(t, in); res.Spec.Linux.IntelRdt != nil || len(res.Warnings) == 0 {
		t.Errorf("ignored: %v, warnings %q", res.Spec.Linux.IntelRdt, res.Warnings)
	}
	in.Node.Classes.RDT = func(_ string, _, podAnnotations map[string]string) error {
		if podAnnotations[pods] != "gold" {
			return errors.New("no such class")
		}
		return nil
	}
	if res := build(t, in); res.Spec.Linux.IntelRdt == nil || res.Spec.Linux.IntelRdt.ClosID != "gold" {
		t.Errorf("class %v", res.Spec.Linux.IntelRdt)
	}
	in.Sandbox.Annotations[pods] = "lead"
	refuse(t, in, errdefs.ErrFailedPrecondition, "no such class")
}

func TestDisableCgroup(t *testing.T) {
	in := typical(t)
	in.Config.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuShares: 2}
	in.Node.CgroupDisabled = true
	l := build(t, in).Spec.Linux
	if l.CgroupsPath != "" || l.Resources.Memory != nil || l.Resources.CPU != nil {
		t.Errorf("cgroup %q, %v", l.CgroupsPath, l.Resources)
	}
}

func TestDisableProcMount(t *testing.T) {
	in := typical(t)
	in.Config.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{MaskedPaths: []string{"/proc/one"}}
	if l := build(t, in).Spec.Linux; !slices.Equal(l.MaskedPaths, []string{"/proc/one"}) || len(l.ReadonlyPaths) != 0 {
		t.Errorf("as asked: %v %v", l.MaskedPaths, l.ReadonlyPaths)
	}
	in.Node.DefaultProcMount = true
	if l := build(t, in).Spec.Linux; !slices.Contains(l.MaskedPaths, "/proc/kcore") || !slices.Contains(l.ReadonlyPaths, "/proc/sys") {
		t.Errorf("default: %v %v", l.MaskedPaths, l.ReadonlyPaths)
	}
}

func TestTreatReadOnlyMounts(t *testing.T) {
	for _, c := range []struct {
		word      string
		can       bool
		want, err string
	}{
		{"", true, "ro", ""},
		{"Disabled", true, "ro", ""},
		{"IfPossible", true, "rro", ""},
		{"IfPossible", false, "ro", ""},
		{"Enabled", true, "rro", ""},
		{"Enabled", false, "", "treat_ro_mounts_as_rro"},
	} {
		in := typical(t)
		in.Config.Mounts = []*runtimeapi.Mount{{HostPath: t.TempDir(), ContainerPath: "/data", Readonly: true}, {HostPath: t.TempDir(), ContainerPath: "/rw"}}
		in.Handler.ReadOnlyMounts, in.Handler.RecursiveReadOnly = c.word, c.can
		if c.err != "" {
			refuse(t, in, errdefs.ErrFailedPrecondition, c.err)
			continue
		}
		for _, m := range build(t, in).Spec.Mounts {
			if m.Destination == "/data" && !slices.Contains(m.Options, c.want) {
				t.Errorf("%q, handler can: %v: options %v, want %s", c.word, c.can, m.Options, c.want)
			}
			if m.Destination == "/rw" && !slices.Contains(m.Options, "rw") {
				t.Errorf("%q: a writable mount got %v", c.word, m.Options)
			}
		}
	}
}

func TestRlimits(t *testing.T) {
	in := typical(t)
	in.Handler.BaseSpec = filepath.Join(t.TempDir(), "base.json")
	write(t, in.Handler.BaseSpec, `{"process":{"rlimits":[{"type":"RLIMIT_NOFILE","soft":1,"hard":2},{"type":"RLIMIT_CORE","soft":0,"hard":0}]}}`)
	in.Handler.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 4096}}
	want := []specs.POSIXRlimit{{Type: "RLIMIT_CORE"}, {Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 4096}}
	if got := build(t, in).Spec.Process.Rlimits; !slices.Equal(got, want) {
		t.Errorf("limits %v, want %v", got, want)
	}
}

func TestCDIAnnotations(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "v.json"), `{"cdiVersion":"0.5.0","kind":"vendor.com/dev","devices":[{"name":"one","containerEdits":{"env":["CDI=1"]}}]}`)
	in := typical(t)
	in.Node.CDISpecDirs = []string{dir}
	in.Config.Annotations = map[string]string{"cdi.k8s.io/vendor": "vendor.com/dev=one"}
	res := build(t, in)
	if slices.Contains(res.Spec.Process.Env, "CDI=1") || len(res.Warnings) == 0 {
		t.Errorf("not trusted: %v, warnings %q", res.Spec.Process.Env, res.Warnings)
	}
	in.Node.TrustCDIAnnotations = true
	if res := build(t, in); !slices.Contains(res.Spec.Process.Env, "CDI=1") {
		t.Errorf("trusted: %v", res.Spec.Process.Env)
	}
	in.Config.Annotations["cdi.k8s.io/vendor"] = "not a device"
	refuse(t, in, errdefs.ErrInvalidArgument, "annotations")
	in.Config.Annotations, in.Sandbox.Annotations = nil, map[string]string{"cdi.k8s.io/vendor": "vendor.com/dev=one"}
	if res := build(t, in); slices.Contains(res.Spec.Process.Env, "CDI=1") {
		t.Error("a device of a pod's annotation, which any user writes")
	}
}
