package oci

import (
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

// The tests of this file are the attacks that container engines have fallen
// to, with the numbers of the CVEs.

func TestAttack01VolumeOutsideTheImage(t *testing.T) { // CVE-2022-23648
	for _, v := range []string{"/../../x", "..", "a/../../b", "/", "/proc", "/proc/self", "/sys", "/dev", "/x\x00", "/x\ny", "/" + strings.Repeat("v", 10000)} {
		_, err := ImageVolumes(imagespec.ImageConfig{Volumes: map[string]struct{}{v: {}}})
		wantError(t, err, errdefs.ErrInvalidArgument, "VOLUME")
	}
}

func TestAttack02UserWrapsToRoot(t *testing.T) { // CVE-2024-40635
	for _, u := range []string{"4294967296", "4294967296:0", "2147483648", "18446744073709551616", "-4294967296", "0:4294967296"} {
		in := typical(t)
		in.Config.Linux.SecurityContext = nil
		in.Image.User = u
		refuse(t, in, errdefs.ErrInvalidArgument, "2147483647")
	}
}

func TestAttack03LabelsOfTheImageChangeNothing(t *testing.T) { // CVE-2026-53488
	in := typical(t)
	plain := build(t, in).Spec.Annotations
	in.Handler.PodAnnotations, in.Handler.ContainerAnnotations = []string{"*"}, []string{"*"}
	in.Image.Labels = map[string]string{"containerd.io/x": "1", "run.oci.hooks.stdin": "1", "io.kubernetes.cri.container-type": "sandbox"}
	if got := build(t, in).Spec.Annotations; len(got) != len(plain) || got["io.kubernetes.cri.container-type"] != "container" {
		t.Errorf("annotations are %v, want %v", got, plain)
	}
}

func TestAttack04CDIByAnnotation(t *testing.T) { // CVE-2026-53492
	dir := t.TempDir()
	write(t, filepath.Join(dir, "v.json"), `{"cdiVersion":"0.5.0","kind":"vendor.com/dev","devices":[{"name":"one","containerEdits":{"env":["CDI=1"]}}]}`)
	in := typical(t)
	in.Node.CDISpecDirs = []string{dir}
	in.Config.Annotations = map[string]string{"cdi.k8s.io/vendor": "vendor.com/dev=one"}
	in.Sandbox.Annotations = in.Config.Annotations
	in.Image.Labels = in.Config.Annotations
	if s := build(t, in).Spec; slices.Contains(s.Process.Env, "CDI=1") {
		t.Error("an annotation injected a device")
	}
}

func TestAttack09RelabelOfSystemFolders(t *testing.T) { // CVE-2021-43816
	for _, p := range []string{"/", "/etc", "/usr", "/var/lib", "/proc/sys", "/sys/kernel", "/dev/shm", "/home", "/boot/efi"} {
		if err := checkRelabel(p); err == nil {
			t.Errorf("%s is relabelled", p)
		}
	}
	for _, p := range []string{"/srv/data", "/var/lib/kubelet/pods/x/volumes/y", "/etcetera", "/home/user/project"} {
		if err := checkRelabel(p); err != nil {
			t.Errorf("%s: %v", p, err)
		}
	}
}

func TestAttack12HugeAccountFiles(t *testing.T) { // CVE-2025-4437
	in := typical(t)
	for _, f := range []string{"etc/passwd", "etc/group"} {
		in.Rootfs = testRootfs(t)
		if err := os.Truncate(filepath.Join(in.Rootfs, f), 1<<40); err != nil {
			t.Fatal(err)
		}
		refuse(t, in, errdefs.ErrInvalidArgument, "/"+f, "1 MiB")
	}
}

func TestAttack13SupplementaryGroups(t *testing.T) { // CVE-2023-25173, CVE-2022-2995
	in := typical(t)
	security(in).SupplementalGroups = nil
	for _, policy := range []runtimeapi.SupplementalGroupsPolicy{0, 1} {
		security(in).SupplementalGroupsPolicy = policy
		u := build(t, in).Spec.Process.User
		// An empty list makes some runtimes keep the groups of the daemon.
		if len(u.AdditionalGids) == 0 || !slices.Contains(u.AdditionalGids, u.GID) {
			t.Errorf("groups under policy %v are %v", policy, u.AdditionalGids)
		}
	}
}

func TestAttack14InheritableCapabilities(t *testing.T) { // CVE-2022-24769
	in := typical(t)
	for _, c := range []*runtimeapi.Capability{nil, {AddCapabilities: []string{"ALL"}}, {AddCapabilities: []string{"NET_ADMIN"}}} {
		security(in).Capabilities = c
		if got := build(t, in).Spec.Process.Capabilities; len(got.Inheritable)+len(got.Ambient) != 0 {
			t.Errorf("%v gives inheritable %v and ambient %v", c, got.Inheritable, got.Ambient)
		}
	}
}

func TestAttack15Sysctls(t *testing.T) { // CVE-2022-0811, CVE-2022-0532
	for name, value := range map[string]string{
		"kernel.shm_rmid_forced":            "1+kernel.core_pattern=|/evil",
		"kernel.shmmax":                     "1\nkernel.core_pattern=x",
		"kernel.core_pattern":               "|/evil",
		"kernel.hostname":                   "x",
		"vm.swappiness":                     "1",
		"net.ipv4.ip_forward=1,kernel":      "1",
		"net/../kernel/core_pattern":        "1",
		"net.ipv4/../../kernel.x":           "1",
		"net..ipv4":                         "1",
		"/net/ipv4":                         "1",
		"":                                  "1",
		"net." + strings.Repeat("a", 10000): "1",
	} {
		cfg := typical(t).Sandbox
		cfg.Linux.Sysctls = map[string]string{name: value}
		wantError(t, ValidateSandbox(cfg, Node{}), errdefs.ErrInvalidArgument, "sysctl")
	}
	for _, name := range []string{"net.ipv4.ip_forward", "kernel.domainname", "kernel.shmmax", "fs.mqueue.msg_max", "net/ipv4/ip_forward"} {
		cfg := typical(t).Sandbox
		cfg.Linux.Sysctls = map[string]string{name: "1"}
		*namespaces(cfg) = runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE, Ipc: runtimeapi.NamespaceMode_NODE}
		wantError(t, ValidateSandbox(cfg, Node{}), errdefs.ErrInvalidArgument, "node")
	}
	// A container joins namespaces that are set up already.
	in := typical(t)
	in.Sandbox.Linux.Sysctls = map[string]string{"net.ipv4.ip_forward": "1", "kernel.shmmax": "1"}
	if got := build(t, in).Spec.Linux.Sysctl; len(got) != 0 {
		t.Errorf("the spec sets %v", got)
	}
}

func TestAttack16HomeWithNewline(t *testing.T) { // CVE-2022-4318, CVE-2026-15809
	in := typical(t)
	in.Config.Linux.SecurityContext = nil
	for _, line := range []string{"root:x:0:0:r:/root\x00evil:/bin/sh\n", "root:x:0:0:r:/a\vb:/bin/sh\n", "root:x:0:0:r:rel:/bin/sh\n", "root:x:0:0:r:/\xff:\n"} {
		write(t, filepath.Join(in.Rootfs, "etc/passwd"), line)
		if home, _ := lookUpEnv(build(t, in).Spec.Process.Env, "HOME"); home != "/" {
			t.Errorf("HOME from %q is %q", line, home)
		}
	}
	// A variable with lines stays one variable.
	in.Config.Envs = []*runtimeapi.KeyValue{{Key: "HOME", Value: []byte("/x\nevil:x:0:0::/:/bin/sh")}}
	env := build(t, in).Spec.Process.Env
	if n := len(slices.DeleteFunc(slices.Clone(env), func(v string) bool { return !strings.HasPrefix(v, "HOME=") })); n != 1 {
		t.Errorf("HOME is there %d times in %q", n, env)
	}
}

func TestAttack17AnnotationSmuggling(t *testing.T) { // CVE-2023-6476, CVE-2024-3154
	for _, c := range []struct {
		glob, key string
		want      bool
	}{
		{"io.katacontainers.*", "io.katacontainers.config.x", true},
		{"io.katacontainers.*", "io.katacontainersx", false},
		{"cpu-load-balancing.crio.io", "cpu-load-balancing.crio.io.evil", false},
		{"exact", "exact/", false},
		{"*", "org.systemd.property.ExecStartPre", false},
		{"org.*", "org.systemd.property.ExecStartPre", false},
		{"org.systemd.property.CollectMode", "org.systemd.property.CollectMode", true},
		{"org.systemd.property.*", "org.systemd.property.CollectMode", true},
		{"*", "run.oci.hooks.stdin", false},
		{"run*", "run.oci.keep_original_groups", false},
		{"run.oci.*", "run.oci.keep_original_groups", true},
		{"io.kubernetes.cri.*", "io.kubernetes.cri.sandbox-id", false},
		{"*", "plain", true},
		{"[", "[", false},
	} {
		if got := admits(c.glob, c.key); got != c.want {
			t.Errorf("glob %q, key %q: %v, want %v", c.glob, c.key, got, c.want)
		}
	}
}

func TestAttack18LinksOfTheImage(t *testing.T) { // CVE-2024-5154, CVE-2025-0750
	secret := t.TempDir()
	write(t, filepath.Join(secret, "passwd"), "admin:x:0:0::/:\n")
	write(t, filepath.Join(secret, "group"), "admins:x:0:nobody\n")
	in := typical(t)
	in.Config.Linux.SecurityContext = nil
	etc := filepath.Join(in.Rootfs, "etc")
	if err := os.RemoveAll(etc); err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{secret, strings.Repeat("../", 30) + secret, "/proc/self/root" + secret, "/proc/1/root" + secret} {
		if err := os.Symlink(target, etc); err != nil {
			t.Fatal(err)
		}
		in.Image.User = "admin"
		refuse(t, in, errdefs.ErrInvalidArgument, "no such user")
		if err := os.Remove(etc); err != nil {
			t.Fatal(err)
		}
	}
	// The pod's files come as mounts, which the runtime makes beneath the
	// root; nothing is written through the image.
	for _, m := range build(t, withoutUser(in)).Spec.Mounts {
		if strings.HasPrefix(m.Destination, "/etc/") && m.Type != "bind" {
			t.Errorf("mount %v", m)
		}
	}
	if _, err := os.Lstat(etc); err == nil {
		t.Error("something was written into the image")
	}
}

func withoutUser(in Input) Input {
	in.Image.User = ""
	return in
}

func TestAttack19LogPath(t *testing.T) {
	for _, p := range []string{"../x", "/etc/passwd", "a/../../x", "a\nb", "a\x1b[2Jb", ".", "a/..", strings.Repeat("x/", 3000), "\xff"} {
		_, err := LogPath(&runtimeapi.ContainerConfig{LogPath: p}, &runtimeapi.PodSandboxConfig{LogDirectory: "/var/log/pods/p"})
		wantError(t, err, errdefs.ErrInvalidArgument, "log_path")
	}
}

func TestAttack21ProcSysAndSeccomp(t *testing.T) {
	masked := defaultMaskedPaths(t.TempDir())
	for _, p := range []string{"/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware", "/sys/devices/virtual/powercap", "/proc/interrupts"} {
		if !slices.Contains(masked, p) {
			t.Errorf("%s is not masked", p)
		}
	}
	in := typical(t)
	in.Sandbox.Linux.SecurityContext.Privileged = true
	security(in).Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"ALL"}}
	for _, rule := range build(t, in).Spec.Linux.Seccomp.Syscalls {
		if rule.Action != specs.ActAllow {
			continue
		}
		for _, call := range []string{"io_uring_setup", "io_uring_enter", "io_uring_register", "keyctl", "add_key", "request_key", "userfaultfd"} {
			if slices.Contains(rule.Names, call) {
				t.Errorf("the default profile allows %s", call)
			}
		}
	}
}

func TestAttack22WorkingDirectoryOfAnOpenFile(t *testing.T) { // CVE-2024-21626
	in := typical(t)
	in.Image.WorkingDir = "/proc/self/fd/8"
	refuse(t, in, errdefs.ErrInvalidArgument, "WORKDIR")
}

func TestAttack22BadInput(t *testing.T) {
	if _, err := Container(Input{}); err == nil {
		t.Error("an empty input is accepted")
	}
	for name, change := range map[string]func(*Input){
		"nil config":        func(in *Input) { in.Config = nil },
		"nil sandbox":       func(in *Input) { in.Sandbox = nil },
		"nil metadata":      func(in *Input) { in.Config.Metadata = nil },
		"nil mount":         func(in *Input) { in.Config.Mounts = []*runtimeapi.Mount{nil} },
		"nil device":        func(in *Input) { in.Config.Devices = []*runtimeapi.Device{nil} },
		"nil cdi device":    func(in *Input) { in.Config.CDIDevices = []*runtimeapi.CDIDevice{nil} },
		"nil variable":      func(in *Input) { in.Config.Envs = []*runtimeapi.KeyValue{nil} },
		"id in a path":      func(in *Input) { in.ID = "../../x" },
		"empty id":          func(in *Input) { in.ID = "" },
		"shares overflow":   func(in *Input) { in.Config.Linux.Resources.CpuShares = 1 << 62 },
		"quota overflow":    func(in *Input) { in.Config.Linux.Resources.CpuQuota = 1 << 62 },
		"wrong signal":      func(in *Input) { in.Config.StopSignal = -1 },
		"duplicate mounts":  func(in *Input) { in.Config.Mounts = append(in.Config.Mounts, in.Config.Mounts[0]) },
		"mount of nothing":  func(in *Input) { in.Config.Mounts[0].HostPath = "" },
		"argument too long": func(in *Input) { in.Config.Args = []string{strings.Repeat("a", 1<<20)} },
		"too many bytes":    func(in *Input) { in.Config.Args = slices.Repeat([]string{strings.Repeat("a", 1<<16)}, 200) },
		"too many strings":  func(in *Input) { in.Config.Args = make([]string, 1<<18) },
	} {
		t.Run(name, func(t *testing.T) {
			in := typical(t)
			change(&in)
			refuse(t, in, errdefs.ErrInvalidArgument)
		})
	}
}
