package vm

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	guestv1 "cloister.dev/api/guest/v1"
	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/guest"
	"cloister.dev/internal/host/backend"
)

func TestAdaptLinux(t *testing.T) {
	s := &sandbox{id: "pod", rec: record{SharePID: true}}
	spec := &specs.Spec{Linux: &specs.Linux{
		Namespaces: []specs.LinuxNamespace{
			{Type: specs.NetworkNamespace, Path: "/run/ns/net"}, {Type: specs.IPCNamespace, Path: "/run/ns/ipc"},
			{Type: specs.UTSNamespace, Path: "/run/ns/uts"}, {Type: specs.MountNamespace},
			{Type: specs.PIDNamespace, Path: "/proc/42/ns/pid"}, {Type: specs.CgroupNamespace},
		},
		Resources: &specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: "7"}, HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB"}},
			Unified: map[string]string{"cpuset.cpus": "7", "memory.high": "1"}},
		CgroupsPath: "/kubepods/x", Sysctl: map[string]string{"a": "b"},
	}}
	if err := s.adaptLinux(&backend.TaskSpec{ID: "c"}, spec); err != nil {
		t.Fatal(err)
	}
	var kinds []string
	for _, n := range spec.Linux.Namespaces {
		kinds = append(kinds, string(n.Type))
		if n.Type == specs.PIDNamespace && n.Path != guest.PodPIDNamespace {
			t.Errorf("PID namespace is %q", n.Path)
		}
	}
	if want := []string{"mount", "pid", "cgroup"}; !slices.Equal(kinds, want) {
		t.Errorf("namespaces are %v, want %v", kinds, want)
	}
	r := spec.Linux.Resources
	if r.CPU.Cpus != "" || r.HugepageLimits != nil || len(r.Unified) != 1 {
		t.Errorf("resources are %+v", r)
	}
	if spec.Linux.Sysctl != nil || !strings.HasPrefix(spec.Linux.CgroupsPath, "/pod/") {
		t.Errorf("left of the node: %v, %s", spec.Linux.Sysctl, spec.Linux.CgroupsPath)
	}
}

func TestSharedMountIsRefused(t *testing.T) {
	m := &specs.Mount{Type: "bind", Source: "/mnt", Destination: "/mnt", Options: []string{"rbind", "rshared"}}
	if err := shareMount(nil, "x", 0, m); !errdefs.IsInvalidArgument(err) {
		t.Errorf("error is %v", err)
	}
}

func TestOptions(t *testing.T) {
	allowed := &hostv1.MachineOptions{EnableAnnotations: []string{"default_memory", "kernel_params"}}
	tests := []struct {
		name        string
		options     *hostv1.MachineOptions
		annotations map[string]string
		is          func(error) bool
		check       func(*hostv1.MachineOptions) bool
	}{
		{"nothing said", &hostv1.MachineOptions{}, nil, nil, func(o *hostv1.MachineOptions) bool {
			return o.MachineType == "microvm" && o.Accel == "kvm" && o.DefaultMemory == DefaultMemory
		}},
		{"allowed", allowed, map[string]string{annotationPrefix + "default_memory": "777"}, nil,
			func(o *hostv1.MachineOptions) bool { return o.DefaultMemory == 777 }},
		{"not on the list", allowed, map[string]string{annotationPrefix + "default_vcpus": "2"}, errdefs.IsPermissionDenied, nil},
		{"no number", allowed, map[string]string{annotationPrefix + "default_memory": "-1"}, errdefs.IsInvalidArgument, nil},
		{"too large", allowed, map[string]string{annotationPrefix + "default_memory": "99999999999"}, errdefs.IsInvalidArgument, nil},
		{"not for pods", &hostv1.MachineOptions{EnableAnnotations: []string{"path"}}, map[string]string{annotationPrefix + "path": "/bin/sh"}, errdefs.IsInvalidArgument, nil},
		{"others' annotations", allowed, map[string]string{"example.com/x": "y"}, nil, func(*hostv1.MachineOptions) bool { return true }},
		{"unknown machine type", &hostv1.MachineOptions{MachineType: "pc"}, nil, errdefs.IsInvalidArgument, nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			extra, err := proto.Marshal(test.options)
			if err != nil {
				t.Fatal(err)
			}
			o, err := readOptions(extra, test.annotations)
			switch {
			case test.is != nil && !test.is(err):
				t.Errorf("error is %v", err)
			case test.is == nil && err != nil:
				t.Error(err)
			case test.check != nil && !test.check(o):
				t.Errorf("options are %v", o)
			}
		})
	}
}

func TestSize(t *testing.T) {
	o := &hostv1.MachineOptions{}
	fill(o)
	size, err := sizeOf(&backend.SandboxSpec{}, o)
	if err != nil || size.CPUs != 1 || size.Memory != DefaultMemory*mib {
		t.Errorf("default size is %+v, %v", size, err)
	}
	size, err = sizeOf(&backend.SandboxSpec{CPUQuota: 150000, CPUPeriod: 100000, MemoryLimit: 300 * mib}, o)
	if err != nil || size.CPUs != 2 || size.Memory != 300*mib+guestMemory {
		t.Errorf("size for limits is %+v, %v", size, err)
	}
}

// What a guest answers is hostile.
func FuzzGuestAnswers(f *testing.F) {
	f.Add([]byte{}, int32(7), int64(0))
	f.Add([]byte{8, 1}, int32(-1), int64(1)<<62)
	s := &sandbox{}
	f.Fuzz(func(t *testing.T, value []byte, status int32, at int64) {
		began := time.Now()
		e := s.exitOf(&guestv1.WaitResponse{Status: status, AtNanos: at}, nil, began)
		if e.Status < 0 || e.Status > 255 || e.At.Before(began) || e.At.After(time.Now()) {
			t.Fatalf("believed %+v", e)
		}
		for _, kind := range []string{"io.containerd.cgroups.v2.Metrics", "io.containerd.cgroups.v1.Metrics", string(value)} {
			if a, err := checkedStats(&anypb.Any{TypeUrl: kind, Value: value}); err == nil && a.TypeUrl != kind {
				t.Fatal("metrics changed their type")
			}
		}
		_ = lastLines(value, 50)
		_ = line(string(value))
		_ = guestProcess(value)
		if out := guestResources(value); !json.Valid(out) && json.Valid(value) {
			t.Fatal("valid resources became invalid")
		}
	})
}
