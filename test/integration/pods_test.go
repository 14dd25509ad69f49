package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

func TestPodIdentity(t *testing.T) {
	n := shared(t)
	p := runPod(t, n, func(c *cri.PodSandboxConfig) {
		c.Hostname = "some-host"
		c.DnsConfig = &cri.DNSConfig{Servers: []string{"10.9.8.7", "fd00::53"}, Searches: []string{"a.example", "b.example"}, Options: []string{"ndots:5"}}
		c.Linux.Sysctls = map[string]string{"net.ipv4.ip_local_port_range": "20000 30000", "kernel.shm_rmid_forced": "1"}
		c.Annotations = map[string]string{"some/thing": "line\nline", "": "empty"}
		c.Labels = map[string]string{"app": "x"}
	})
	c := p.idle()
	c.says(map[string]string{
		"hostname":             "some-host",
		"cat /etc/hostname":    "some-host",
		"cat /etc/resolv.conf": "search a.example b.example\nnameserver 10.9.8.7\nnameserver fd00::53\noptions ndots:5",
		"cat /proc/sys/net/ipv4/ip_local_port_range": "20000\t30000",
		"cat /proc/sys/kernel/shm_rmid_forced":       "1",
		"echo $$ >/dev/shm/x; cat /proc/1/comm":      "sleep",
	})
	if st := p.status(); st.Annotations["some/thing"] != "line\nline" || st.Labels["app"] != "x" {
		t.Errorf("status %v", st)
	}
	d := p.idle() // the pod's containers share IPC and network, not PIDs
	if d.run("test -e /dev/shm/x && echo shared") != "shared" || d.run("readlink /proc/self/ns/net") != c.run("readlink /proc/self/ns/net") ||
		d.run("readlink /proc/self/ns/pid") == c.run("readlink /proc/self/ns/pid") {
		t.Error("the pod's namespaces are not shared as they should be")
	}
	for _, sysctl := range []map[string]string{{"kernel.hostname": "x"}, {"vm.swappiness": "10"}, {"kernel/../vm/swappiness": "10"}, {"net.ipv4.ip_forward": "1\nvm.x=1"}} {
		_, err := n.Runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: podConfig(n, t, func(c *cri.PodSandboxConfig) { c.Linux.Sysctls = sysctl })})
		wantError(t, err, codes.InvalidArgument, "sysctl")
	}
}

func TestNodeNamespaces(t *testing.T) {
	n := shared(t)
	p := runPod(t, n, func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions = &cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_NODE, Ipc: cri.NamespaceMode_NODE}
	})
	c := p.idle(func(c *cri.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions = &cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_NODE, Ipc: cri.NamespaceMode_NODE}
	})
	for _, ns := range []string{"net", "pid", "ipc"} {
		own, err := os.Readlink("/proc/self/ns/" + ns)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.run("readlink /proc/self/ns/" + ns); got != own {
			t.Errorf("%s namespace %s, the node's is %s", ns, got, own)
		}
	}
}

func TestMounts(t *testing.T) {
	n := shared(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
	below := filepath.Join(dir, "below")
	if err := os.Mkdir(below, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("below", below, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(below, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	p := runPod(t, n)
	c := p.idle(func(c *cri.ContainerConfig) {
		c.Mounts = []*cri.Mount{
			{ContainerPath: "/rw", HostPath: dir},
			{ContainerPath: "/ro", HostPath: dir, Readonly: true},
			{ContainerPath: "/made", HostPath: filepath.Join(dir, "made/here")},
			{ContainerPath: "/one/file", HostPath: filepath.Join(dir, "file"), Readonly: true},
		}
	})
	c.says(map[string]string{
		"cat /rw/file /one/file":                        "contentcontent",
		"touch /rw/new && echo yes":                     "yes",
		"touch /ro/new2 2>/dev/null || echo no":         "no",
		"touch /ro/below/x && echo only recursive does": "only recursive does",
		"touch /made/x && echo yes":                     "yes",
	})
	if _, err := os.Stat(filepath.Join(dir, "made/here/x")); err != nil {
		t.Error(err)
	}
	if !supports(t, n).GetRecursiveReadOnlyMounts() {
		t.Log("the default handler has no recursive read-only mounts")
		return
	}
	rro := p.idle(func(c *cri.ContainerConfig) {
		c.Mounts = []*cri.Mount{{ContainerPath: "/ro", HostPath: dir, Readonly: true, RecursiveReadOnly: true}}
	})
	if got := rro.run("touch /ro/below/x 2>/dev/null || echo no"); got != "no" {
		t.Errorf("below a recursively read-only mount can be written")
	}
}

// supports are the features of the default handler.
func supports(t *testing.T, n *testnode.Node) *cri.RuntimeHandlerFeatures {
	t.Helper()
	r, err := n.Runtime.Status(t.Context(), &cri.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range r.RuntimeHandlers {
		if h.Name == "" {
			return h.Features
		}
	}
	t.Fatal("the default handler is not listed")
	return nil
}

func TestMountPropagation(t *testing.T) {
	n := shared(t)
	dir := t.TempDir()
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	p := runPod(t, n, func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
	for propagation, seen := range map[cri.MountPropagation]bool{
		cri.MountPropagation_PROPAGATION_PRIVATE:           false,
		cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER: true,
		cri.MountPropagation_PROPAGATION_BIDIRECTIONAL:     true,
	} {
		c := p.idle(func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.Privileged = propagation == cri.MountPropagation_PROPAGATION_BIDIRECTIONAL
			c.Mounts = []*cri.Mount{{ContainerPath: "/mnt", HostPath: dir, Propagation: propagation}}
		})
		late := filepath.Join(dir, propagation.String())
		if err := os.Mkdir(late, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("late", late, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		if got := c.run("grep -c ' /mnt/" + propagation.String() + " ' /proc/mounts || true"); (got == "1") != seen {
			t.Errorf("%v: a later mount of the node is seen %s times", propagation, got)
		}
		if propagation == cri.MountPropagation_PROPAGATION_BIDIRECTIONAL {
			c.run("mkdir /mnt/inner && mount -t tmpfs inner /mnt/inner")
			if mounts(t, dir+"/inner ") != 1 {
				t.Error("a mount of the container is not seen on the node")
			}
		}
		c.remove()
	}
}

func TestImageVolume(t *testing.T) {
	n := shared(t)
	ref := push(t, hostileImage(t, nil, file{path: "/models/"}, file{path: "/models/small", data: []byte("weights")}, file{path: "/models/escape", link: "../../../../etc"}))
	if _, err := pull(t.Context(), n, ref); err != nil {
		t.Fatal(err)
	}
	p := runPod(t, n)
	volume := func(sub string) containerOption {
		return func(c *cri.ContainerConfig) {
			c.Mounts = []*cri.Mount{{ContainerPath: "/volume", Image: &cri.ImageSpec{Image: ref}, ImageSubPath: sub, Readonly: true}}
		}
	}
	if got := p.idle(volume("")).run("cat /volume/models/small; touch /volume/x 2>/dev/null || echo no"); got != "weightsno" {
		t.Errorf("whole image: %q", got)
	}
	if got := p.idle(volume("models")).run("cat /volume/small"); got != "weights" {
		t.Errorf("sub path: %q", got)
	}
	for _, sub := range []string{"no/such", "../models", "/models/../../etc"} {
		_, err := p.tryCreate(t.Context(), containerConfig(busybox, []string{"true"}, volume(sub)))
		wantOneOf(t, err, []codes.Code{codes.NotFound, codes.InvalidArgument, codes.FailedPrecondition}, "sub")
	}
	node, err := os.ReadFile("/etc/passwd")
	if err != nil {
		t.Fatal(err)
	}
	c, err := p.tryCreate(t.Context(), containerConfig(busybox, []string{"sleep", "1000"}, volume("models/escape")))
	if err == nil {
		c.start()
		if got := c.run("cat /volume/passwd"); got == strings.TrimSpace(string(node)) {
			t.Error("a link in an image leads out of it")
		}
	}
}

func TestUsers(t *testing.T) {
	n := shared(t)
	p := runPod(t, n)
	id := func(f func(*cri.LinuxContainerSecurityContext)) string {
		t.Helper()
		c := p.idle(func(c *cri.ContainerConfig) { f(c.Linux.SecurityContext) })
		defer c.remove()
		return c.run("echo $(id -u) $(id -g) $(id -G)")
	}
	for name, c := range map[string]struct {
		f    func(*cri.LinuxContainerSecurityContext)
		want string
	}{
		"user": {func(s *cri.LinuxContainerSecurityContext) { s.RunAsUser = &cri.Int64Value{Value: 1234} }, "1234 0 0"},
		"user and group": {func(s *cri.LinuxContainerSecurityContext) {
			s.RunAsUser, s.RunAsGroup = &cri.Int64Value{Value: 1234}, &cri.Int64Value{Value: 567}
		}, "1234 567 567"},
		"groups": {func(s *cri.LinuxContainerSecurityContext) {
			s.RunAsUser, s.RunAsGroup = &cri.Int64Value{Value: 1234}, &cri.Int64Value{Value: 567}
			s.SupplementalGroups, s.SupplementalGroupsPolicy = []int64{77, 88}, cri.SupplementalGroupsPolicy_Strict
		}, "1234 567 567 77 88"},
	} {
		if got := id(c.f); got != c.want {
			t.Errorf("%s: %q, not %q", name, got, c.want)
		}
	}
}

func TestSecurityContext(t *testing.T) {
	n := shared(t)
	p := runPod(t, n, func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
	plain := p.idle()
	plain.says(map[string]string{
		"cat /proc/kcore 2>/dev/null | head -c 1 | wc -c":              "0",
		"ls /proc/acpi /sys/firmware 2>/dev/null | grep -v : | wc -w":  "0",
		"touch /proc/sys/kernel/x 2>/dev/null || echo no":              "no",
		"mount -t tmpfs x /mnt 2>/dev/null || echo no":                 "no",
		"mknod /dev/x b 8 0 2>/dev/null; head -c1 /dev/x 2>&1 | wc -l": "1",
		"ls /dev | grep -c '^\\(sd\\|vd\\|loop\\|kmsg\\|mem\\)'||true": "0",
	})
	privileged := p.idle(func(c *cri.ContainerConfig) { c.Linux.SecurityContext.Privileged = true })
	if got := privileged.run("mkdir -p /m && mount -t tmpfs x /m && test -e /dev/kmsg && echo yes"); got != "yes" {
		t.Errorf("privileged: %q", got)
	}
	readonly := p.idle(func(c *cri.ContainerConfig) {
		s := c.Linux.SecurityContext
		s.ReadonlyRootfs, s.NoNewPrivs = true, true
		s.Capabilities = &cri.Capability{DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"NET_RAW"}}
		c.Devices = []*cri.Device{{HostPath: "/dev/null", ContainerPath: "/dev/other", Permissions: "rw"}}
	})
	readonly.says(map[string]string{
		"touch /x 2>/dev/null || echo no":                                        "no",
		"touch /dev/shm/x && echo yes":                                           "yes",
		"grep -E '^(NoNewPrivs|CapEff|CapInh):' /proc/1/status | tr -d '\\t\\n'": "CapInh:0000000000000000CapEff:0000000000002000NoNewPrivs:1",
		"echo x >/dev/other && echo yes":                                         "yes",
	})
	profile := filepath.Join(t.TempDir(), "no-mkdir.json")
	if err := os.WriteFile(profile, []byte(`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO"}]}`), 0o644); err != nil {
		t.Fatal(err)
	}
	filtered := p.idle(func(c *cri.ContainerConfig) {
		c.Linux.SecurityContext.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: profile}
	})
	if got := filtered.run("mkdir /tmp/x 2>/dev/null || echo no"); got != "no" {
		t.Errorf("seccomp: %q", got)
	}
}

func TestUserNamespace(t *testing.T) {
	n := shared(t)
	if !supports(t, n).GetUserNamespaces() {
		t.Skip("the default handler has no user namespaces")
	}
	options := &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER, UsernsOptions: &cri.UserNamespace{
		Mode: cri.NamespaceMode_POD,
		Uids: []*cri.IDMapping{{HostId: 200000, ContainerId: 0, Length: 65536}},
		Gids: []*cri.IDMapping{{HostId: 200000, ContainerId: 0, Length: 65536}},
	}}
	p := runPod(t, n, func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions = options })
	c := p.sh("echo hello; sleep 1000", func(c *cri.ContainerConfig) { c.Linux.SecurityContext.NamespaceOptions = options })
	c.waitLog("hello")
	c.says(map[string]string{
		"id -u":                               "0",
		"cat /proc/self/uid_map | tr -s ' '":  "0 200000 65536",
		"stat -c %u /etc/passwd /etc/hosts /": "0\n0\n0",
		"touch /x && stat -c %u /x":           "0",
		"touch /dev/shm/x && echo yes":        "yes",
	})
	for name, bad := range map[string][]*cri.IDMapping{
		"none":     nil,
		"two":      {{HostId: 200000, Length: 10}, {HostId: 300000, ContainerId: 10, Length: 10}},
		"overflow": {{HostId: 4294967290, Length: 65536}},
		"empty":    {{HostId: 200000}},
		"not root": {{HostId: 200000, ContainerId: 5, Length: 100}},
	} {
		_, err := n.Runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: podConfig(n, t, func(c *cri.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions = &cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: bad, Gids: options.UsernsOptions.Gids}}
		})})
		if err == nil {
			t.Errorf("mapping %s was taken", name)
			continue
		}
		wantError(t, err, codes.InvalidArgument)
	}
}
