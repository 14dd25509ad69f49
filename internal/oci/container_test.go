package oci

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var update = flag.Bool("update", false, "write the golden files")

const testPasswd = `root:x:0:0:root:/root:/bin/sh
# a comment: with: colons: 1:2:3
daemon:x:1:1::/:
default-user:x:1000:1000::/home/default:/bin/sh
+::::::
broken
high:x:4294967296:0::/:
www-data:x:33:33:www:/var/www:/usr/sbin/nologin
`

const testGroup = `root:x:0:root
bin:x:1:root,daemon
default-user:x:1000:
group-defined-in-image:x:50000:default-user
www-data:x:33:
wheel:x:10:root
huge:x:99999999999:nobody
`

// testKernel is a machine on which everything is there.
func testKernel() kernel {
	known := []string{
		"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
		"CAP_SETUID", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_NET_ADMIN", "CAP_NET_RAW",
		"CAP_SYS_CHROOT", "CAP_SYS_ADMIN", "CAP_SYS_RESOURCE", "CAP_MKNOD", "CAP_AUDIT_WRITE", "CAP_SETFCAP",
	}
	return kernel{
		known: known, held: known, swap: true, hugetlb: true,
		masked:   []string{"/proc/kcore", "/sys/firmware"},
		hostname: func() (string, error) { return "node-1", nil },
		mounts: func() ([]mountPoint, error) {
			return []mountPoint{{path: "/", shared: true}, {path: "/private"}, {path: "/slave", slave: true}}, nil
		},
	}
}

// testRootfs is an image's root file system with accounts.
func testRootfs(t testing.TB) string {
	t.Helper()
	root := t.TempDir()
	write(t, filepath.Join(root, "etc/passwd"), testPasswd)
	write(t, filepath.Join(root, "etc/group"), testGroup)
	return root
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// typical is what kubelet sends for an ordinary container.
func typical(t testing.TB) Input {
	t.Helper()
	return Input{
		ID: "c0ffee", SandboxID: "5a4db0", ImageName: "registry.example/app:1",
		Sandbox: &runtimeapi.PodSandboxConfig{
			Metadata:     &runtimeapi.PodSandboxMetadata{Name: "web-0", Namespace: "shop", Uid: "7d1f"},
			Hostname:     "web-0",
			LogDirectory: "/var/log/pods/shop_web-0_7d1f",
			Linux: &runtimeapi.LinuxPodSandboxConfig{
				CgroupParent:    "/kubepods/burstable/pod7d1f",
				SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{},
			},
		},
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "app"},
			Image:    &runtimeapi.ImageSpec{Image: "sha256:0123"},
			Args:     []string{"--port", "80"},
			Envs:     []*runtimeapi.KeyValue{{Key: "A", Value: []byte("config")}, {Key: "PEM", Value: []byte("line\nline")}},
			LogPath:  "app/0.log",
			Mounts: []*runtimeapi.Mount{
				{ContainerPath: "/var/lib/app/data", HostPath: "/no/such/pods/data"},
				{ContainerPath: "/etc/hosts", HostPath: "/no/such/pods/hosts"},
				{ContainerPath: "/cfg", HostPath: "/no/such/pods/cfg", Readonly: true},
				{ContainerPath: "/dev/termination-log", HostPath: "/no/such/pods/tl"},
			},
			Linux: &runtimeapi.LinuxContainerConfig{
				Resources: &runtimeapi.LinuxContainerResources{
					CpuShares: 512, CpuQuota: 50000, CpuPeriod: 100000, MemoryLimitInBytes: 64 << 20, OomScoreAdj: 900,
					HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB"}},
				},
				SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
					RunAsUser:    &runtimeapi.Int64Value{Value: 1000},
					Capabilities: &runtimeapi.Capability{DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"NET_BIND_SERVICE"}},
					Seccomp:      &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault},
					NoNewPrivs:   true, SupplementalGroups: []int64{1234},
					MaskedPaths: []string{"/proc/kcore"}, ReadonlyPaths: []string{"/proc/sys"},
					NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
				},
			},
		},
		Image: imagespec.ImageConfig{
			Entrypoint: []string{"/app"}, Cmd: []string{"--help"}, WorkingDir: "/srv",
			Env: []string{"PATH=/app:/bin", "A=image", "B=image"}, StopSignal: "SIGQUIT",
		},
		Rootfs: testRootfs(t),
		Namespaces: Namespaces{
			Net: "/run/cloister/ns/net", IPC: "/run/cloister/ns/ipc", UTS: "/run/cloister/ns/uts", PrivatePID: true,
		},
		Files:   Files{ResolvConf: "/run/cloister/s/resolv.conf", Hostname: "/run/cloister/s/hostname", Hosts: "/run/cloister/s/hosts", Shm: "/run/cloister/s/shm"},
		Volumes: map[string]string{"/srv/cache": "/var/lib/cloister/v/1", "/a": "/var/lib/cloister/v/0"},
		Node:    Node{Seccomp: true, HugetlbTolerated: true},
		Handler: Handler{Name: "runc", OCIVersion: "1.1.0", RecursiveReadOnly: true, IDMappedMounts: true},
	}
}

func security(in Input) *runtimeapi.LinuxContainerSecurityContext {
	return in.Config.Linux.SecurityContext
}

// build makes the spec on the test kernel and fails the test on an error.
func build(t testing.TB, in Input) *Result {
	t.Helper()
	res, err := container(in, testKernel())
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// refuse wants an error of a kind that names words.
func refuse(t *testing.T, in Input, kind error, words ...string) {
	t.Helper()
	_, err := container(in, testKernel())
	wantError(t, err, kind, words...)
}

func wantError(t *testing.T, err, kind error, words ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Fatalf("error is %v, want one of kind %v", err, kind)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not name %q", err, w)
		}
	}
	if len(err.Error()) > 1000 {
		t.Errorf("error has %d bytes", len(err.Error()))
	}
}

func TestGolden(t *testing.T) {
	res := build(t, typical(t))
	// The default profile belongs to a library and a machine type.
	res.Spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: res.Spec.Linux.Seccomp.DefaultAction}
	got, err := json.MarshalIndent(res, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	if *update {
		write(t, "testdata/typical.json", string(got))
	}
	want, err := os.ReadFile("testdata/typical.json")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("spec differs from testdata/typical.json; run with -update and read the difference:\n%s", got)
	}
}

func TestSameInputSameSpec(t *testing.T) {
	in := typical(t)
	in.Image.Volumes = map[string]struct{}{"/x": {}, "/y": {}}
	in.Handler.PodAnnotations = []string{"*"}
	in.Sandbox.Annotations = map[string]string{"a": "1", "b": "2", "c": "3"}
	in.Config.Linux.Resources.Unified = map[string]string{"memory.high": "1", "memory.low": "0"}
	in.Node.CgroupV2 = true
	first := ""
	for range 50 {
		data, err := json.Marshal(build(t, in))
		if err != nil {
			t.Fatal(err)
		}
		if first == "" {
			first = string(data)
		}
		if string(data) != first {
			t.Fatalf("two specs of one input:\n%s\n%s", first, data)
		}
	}
}

func TestInputIsNotChanged(t *testing.T) {
	in := typical(t)
	before, _ := json.Marshal(in)
	build(t, in)
	after, _ := json.Marshal(in)
	if !bytes.Equal(before, after) {
		t.Errorf("input changed:\n%s\n%s", before, after)
	}
}

func TestThisMachine(t *testing.T) {
	res, err := Container(typical(t))
	if err != nil {
		t.Fatal(err)
	}
	if len(res.Spec.Process.Args) == 0 || res.Spec.Linux.Seccomp == nil {
		t.Errorf("spec of this machine is not complete: %+v", res.Spec.Process)
	}
}

func TestNamespaces(t *testing.T) {
	in := typical(t)
	types := func(in Input) map[specs.LinuxNamespaceType]string {
		out := map[specs.LinuxNamespaceType]string{}
		for _, n := range build(t, in).Spec.Linux.Namespaces {
			if _, twice := out[n.Type]; twice {
				t.Errorf("namespace %s is there twice", n.Type)
			}
			out[n.Type] = n.Path
		}
		return out
	}
	got := types(in)
	if p, ok := got[specs.PIDNamespace]; !ok || p != "" {
		t.Errorf("private PID namespace is %q, %v, want a new one", p, ok)
	}
	if _, ok := got[specs.CgroupNamespace]; ok {
		t.Error("cgroup v1 has a cgroup namespace")
	}
	in.Namespaces = Namespaces{}
	if got := types(in); len(got) != 1 {
		t.Errorf("namespaces on the node's own are %v, want only mount", got)
	}
	in.Node.CgroupV2 = true
	in.Namespaces.PID = "/proc/7/ns/pid"
	in.Namespaces.PrivatePID = true
	got = types(in)
	if _, ok := got[specs.CgroupNamespace]; !ok || got[specs.PIDNamespace] != "/proc/7/ns/pid" {
		t.Errorf("namespaces are %v, want a cgroup namespace and the target's PIDs", got)
	}
}

// withUserNamespace turns an input into one of a pod with its own users.
func withUserNamespace(in Input) Input {
	ids := []*runtimeapi.IDMapping{{HostId: 100000, ContainerId: 0, Length: 65536}}
	u := &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: ids, Gids: ids}
	in.Sandbox.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{UsernsOptions: u}
	security(in).NamespaceOptions = &runtimeapi.NamespaceOption{UsernsOptions: u}
	in.Namespaces.User, in.Namespaces.UIDs, in.Namespaces.GIDs = "/run/cloister/ns/user", ids, ids
	return in
}

func TestUserNamespace(t *testing.T) {
	in := withUserNamespace(typical(t))
	l := build(t, in).Spec
	if len(l.Linux.UIDMappings) != 1 || l.Linux.UIDMappings[0].HostID != 100000 {
		t.Errorf("mappings are %v", l.Linux.UIDMappings)
	}
	for _, m := range l.Mounts {
		if m.Destination == "/etc/resolv.conf" && len(m.UIDMappings) != 0 {
			t.Errorf("mount %v is id-mapped, though the file belongs to the pod's root already", m)
		}
		if m.Destination == "/sys" && m.Type != "sysfs" {
			t.Errorf("mount %v, want sysfs", m)
		}
	}
	in.Namespaces.Net = ""
	i := slices.IndexFunc(build(t, in).Spec.Mounts, func(m specs.Mount) bool {
		return m.Destination == "/sys" && m.Type == "bind" && m.Source == "/sys" && slices.Contains(m.Options, "rro")
	})
	if i < 0 {
		t.Error("on the node's network /sys is not the node's, read-only")
	}
	in.Namespaces.UIDs = nil
	refuse(t, in, errdefs.ErrInvalidArgument, "mappings")
}

func TestCgroupsPath(t *testing.T) {
	for _, c := range []struct {
		parent  string
		systemd bool
		want    string
	}{
		{"/kubepods/pod1", false, "/kubepods/pod1/c0ffee"},
		{"", false, "/cloister/c0ffee"},
		{"relative", false, "/relative/c0ffee"},
		{"/kubepods.slice/kubepods-pod1.slice", true, "kubepods-pod1.slice:cloister:c0ffee"},
		{"", true, "system.slice:cloister:c0ffee"},
	} {
		in := typical(t)
		in.Sandbox.Linux.CgroupParent, in.Handler.SystemdCgroup = c.parent, c.systemd
		if got := build(t, in).Spec.Linux.CgroupsPath; got != c.want {
			t.Errorf("cgroupsPath of %q is %q, want %q", c.parent, got, c.want)
		}
	}
	in := typical(t)
	in.Handler.SystemdCgroup = true
	refuse(t, in, errdefs.ErrFailedPrecondition, "cgroupDriver")
}

func TestPaths(t *testing.T) {
	in := typical(t)
	sc := security(in)
	sc.MaskedPaths, sc.ReadonlyPaths = []string{"/bin/ls"}, nil
	if l := build(t, in).Spec.Linux; !slices.Equal(l.MaskedPaths, []string{"/bin/ls"}) || l.ReadonlyPaths != nil {
		t.Errorf("paths are %v and %v, want exactly those asked for", l.MaskedPaths, l.ReadonlyPaths)
	}
	sc.MaskedPaths = nil
	if l := build(t, in).Spec.Linux; len(l.MaskedPaths) == 0 || !slices.Contains(l.ReadonlyPaths, "/proc/sys") {
		t.Errorf("paths are %v and %v, want the defaults", l.MaskedPaths, l.ReadonlyPaths)
	}
	if l := build(t, withUserNamespace(in)).Spec.Linux; l.MaskedPaths != nil || l.ReadonlyPaths != nil {
		t.Errorf("paths of procMount Unmasked are %v and %v, want none", l.MaskedPaths, l.ReadonlyPaths)
	}
	sc.ReadonlyRootfs = true
	if !build(t, in).Spec.Root.Readonly {
		t.Error("root file system is not read-only")
	}
}

func TestPrivileged(t *testing.T) {
	in := typical(t)
	security(in).Privileged = true
	refuse(t, in, errdefs.ErrInvalidArgument, "privileged")
	in.Sandbox.Linux.SecurityContext.Privileged = true
	in.Node.CgroupV2 = true
	in.Node.AppArmor = true
	s := build(t, in).Spec
	if !slices.Equal(s.Process.Capabilities.Bounding, testKernel().held) || s.Process.Capabilities.Inheritable != nil {
		t.Errorf("capabilities are %+v, want all", s.Process.Capabilities)
	}
	if s.Linux.Seccomp != nil || s.Linux.MaskedPaths != nil || s.Linux.ReadonlyPaths != nil || s.Process.ApparmorProfile != "" {
		t.Error("a privileged container is confined")
	}
	for _, m := range s.Mounts {
		if strings.HasPrefix(m.Destination, "/sys") && (slices.Contains(m.Options, "ro") || !slices.Contains(m.Options, "rw")) {
			t.Errorf("mount %v is not writable", m)
		}
	}
	if d := s.Linux.Resources.Devices; len(d) != 1 || !d[0].Allow {
		t.Errorf("device rules are %v, want all allowed", d)
	}
	if !slices.ContainsFunc(s.Linux.Devices, func(d specs.LinuxDevice) bool { return d.Path == "/dev/null" }) {
		t.Error("the node's /dev/null is missing")
	}
	in.Handler.PrivilegedWithoutHostDevices = true
	s = build(t, in).Spec
	if len(s.Linux.Devices) != 0 || s.Linux.Resources.Devices[0].Allow {
		t.Errorf("without host devices there are %v, %v", s.Linux.Devices, s.Linux.Resources.Devices)
	}
	in.Handler.PrivilegedAllDevices = true
	if d := build(t, in).Spec.Linux.Resources.Devices; !d[0].Allow {
		t.Errorf("device rules are %v, want all allowed", d)
	}
}

func TestOOMScore(t *testing.T) {
	for _, c := range []struct {
		asked, daemon    int
		restrict, weak   bool
		want, wantOfWarn int
	}{
		{asked: 900, want: 900},
		{asked: -997, want: -997},
		{asked: -997, weak: true, want: 0, wantOfWarn: 1},
		{asked: -997, daemon: -999, weak: true, want: -997},
		{asked: -997, daemon: -500, restrict: true, want: -500},
	} {
		in := typical(t)
		in.Config.Linux.Resources.OomScoreAdj = int64(c.asked)
		in.Node.DaemonOOMScore, in.Node.RestrictOOMScore = c.daemon, c.restrict
		k := testKernel()
		if c.weak {
			k.held = slices.DeleteFunc(slices.Clone(k.held), func(n string) bool { return n == "CAP_SYS_RESOURCE" })
		}
		res, err := container(in, k)
		if err != nil {
			t.Fatal(err)
		}
		if got := *res.Spec.Process.OOMScoreAdj; got != c.want || len(res.Warnings) != c.wantOfWarn {
			t.Errorf("%+v: score is %d with warnings %q", c, got, res.Warnings)
		}
	}
}

func TestBaseSpec(t *testing.T) {
	in := typical(t)
	in.Handler.BaseSpec = filepath.Join(t.TempDir(), "base.json")
	write(t, in.Handler.BaseSpec, `{"ociVersion":"9.9.9","process":{"rlimits":[{"type":"RLIMIT_NOFILE","hard":9,"soft":8}],"env":["A=base","BASE=1"]},
		"mounts":[{"destination":"/proc","type":"proc","source":"proc"},{"destination":"/run","type":"tmpfs"},{"destination":"/dev/shm","type":"tmpfs"}],
		"hooks":{"poststop":[{"path":"/bin/true"}]}, "linux":{"seccomp":{"defaultAction":"SCMP_ACT_LOG"}}}`)
	security(in).Seccomp = nil
	security(in).Capabilities = nil
	s := build(t, in).Spec
	if s.Version != "1.1.0" || len(s.Process.Rlimits) != 1 || len(s.Hooks.Poststop) != 1 || s.Linux.Seccomp.DefaultAction != specs.ActLog {
		t.Errorf("base spec was lost: %+v", s)
	}
	if !slices.Contains(s.Process.Env, "BASE=1") || !slices.Contains(s.Process.Env, "A=config") {
		t.Errorf("variables are %q", s.Process.Env)
	}
	for _, m := range s.Mounts {
		if m.Destination == "/run" || (m.Destination == "/dev/shm" && m.Type == "tmpfs") {
			t.Errorf("mount %v of the base spec stayed", m)
		}
	}
	write(t, in.Handler.BaseSpec, `[]`)
	refuse(t, in, errdefs.ErrFailedPrecondition, "base_runtime_spec")
}

func TestAnnotations(t *testing.T) {
	in := typical(t)
	in.Handler.PodAnnotations = []string{"io.katacontainers.*", "io.kubernetes.cri.*"}
	in.Handler.ContainerAnnotations = []string{"mine/exact"}
	in.Sandbox.Annotations = map[string]string{"io.katacontainers.config.x": "1", "io.kubernetes.cri.sandbox-id": "evil", "other": "2"}
	in.Config.Annotations = map[string]string{"mine/exact": "3", "mine/exact2": "4"}
	in.Image.Labels = map[string]string{"io.katacontainers.config.y": "evil", "mine/exact": "evil"}
	got := build(t, in).Spec.Annotations
	want := map[string]string{
		"io.katacontainers.config.x": "1", "mine/exact": "3",
		"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "5a4db0",
		"io.kubernetes.cri.sandbox-name": "web-0", "io.kubernetes.cri.sandbox-namespace": "shop",
		"io.kubernetes.cri.sandbox-uid": "7d1f", "io.kubernetes.cri.container-name": "app",
		"io.kubernetes.cri.image-name": "registry.example/app:1",
	}
	if len(got) != len(want) {
		t.Errorf("annotations are %v, want %v", got, want)
	}
	for k, v := range want {
		if got[k] != v {
			t.Errorf("annotation %s is %q, want %q", k, got[k], v)
		}
	}
}

func BenchmarkContainer(b *testing.B) {
	in := typical(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Container(in); err != nil {
			b.Fatal(err)
		}
	}
}
