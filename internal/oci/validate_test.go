package oci

import (
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func namespaces(in *runtimeapi.PodSandboxConfig) *runtimeapi.NamespaceOption {
	sc := in.GetLinux().GetSecurityContext()
	if sc.NamespaceOptions == nil {
		sc.NamespaceOptions = &runtimeapi.NamespaceOption{}
	}
	return sc.NamespaceOptions
}

func usernsOf(mode runtimeapi.NamespaceMode, ids ...*runtimeapi.IDMapping) *runtimeapi.UserNamespace {
	return &runtimeapi.UserNamespace{Mode: mode, Uids: ids, Gids: ids}
}

func TestValidateSandbox(t *testing.T) {
	const node, target, container = runtimeapi.NamespaceMode_NODE, runtimeapi.NamespaceMode_TARGET, runtimeapi.NamespaceMode_CONTAINER
	whole := &runtimeapi.IDMapping{HostId: 1 << 16, Length: 1 << 16}
	type cfg = runtimeapi.PodSandboxConfig
	for name, c := range map[string]struct {
		change func(*cfg)
		word   string // empty: valid
	}{
		"typical":            {change: func(*cfg) {}},
		"nothing but a name": {change: func(c *cfg) { c.Hostname, c.LogDirectory, c.Linux = "", "", nil }},
		"no metadata":        {func(c *cfg) { c.Metadata = nil }, "metadata"},
		"no name":            {func(c *cfg) { c.Metadata.Name = "" }, "name"},
		"name with slash":    {func(c *cfg) { c.Metadata.Name = "a/b" }, "name"},
		"uid climbs":         {func(c *cfg) { c.Metadata.Uid = ".." }, "uid"},
		"newline in name":    {func(c *cfg) { c.Metadata.Namespace = "a\nb" }, "namespace"},
		"10,000 characters":  {func(c *cfg) { c.Metadata.Name = strings.Repeat("n", 10000) }, "255"},
		"escape in name":     {func(c *cfg) { c.Metadata.Name = "a\x1b[31m" }, "name"},
		"hostname newline":   {func(c *cfg) { c.Hostname = "a\n127.0.0.1 b" }, "hostname"},
		"hostname long":      {func(c *cfg) { c.Hostname = strings.Repeat("h", 65) }, "hostname"},
		"log dir relative":   {func(c *cfg) { c.LogDirectory = "logs" }, "log_directory"},
		"log dir climbs":     {func(c *cfg) { c.LogDirectory = "/var/log/../../etc" }, "log_directory"},
		"cgroup climbs":      {func(c *cfg) { c.Linux.CgroupParent = "/a/../../b" }, "cgroup_parent"},
		"cgroup colon":       {func(c *cfg) { c.Linux.CgroupParent = "/a:b:c" }, "cgroup_parent"},
		"dns server":         {func(c *cfg) { c.DnsConfig = &runtimeapi.DNSConfig{Servers: []string{"ns.example"}} }, "servers"},
		"dns servers":        {change: func(c *cfg) { c.DnsConfig = &runtimeapi.DNSConfig{Servers: []string{"1.1.1.1", "fe80::1%eth0"}} }},
		"dns search newline": {func(c *cfg) { c.DnsConfig = &runtimeapi.DNSConfig{Searches: []string{"a\nnameserver 6.6.6.6"}} }, "searches"},
		"dns option two":     {func(c *cfg) { c.DnsConfig = &runtimeapi.DNSConfig{Options: []string{"ndots:5 rotate"}} }, "options"},
		"port negative":      {func(c *cfg) { c.PortMappings = []*runtimeapi.PortMapping{{HostPort: -1}} }, "host_port"},
		"port large":         {func(c *cfg) { c.PortMappings = []*runtimeapi.PortMapping{{HostPort: 65536}} }, "host_port"},
		"port zero":          {change: func(c *cfg) { c.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80}, {}} }},
		"port to nothing":    {func(c *cfg) { c.PortMappings = []*runtimeapi.PortMapping{{HostPort: 80}} }, "container_port"},
		"port nil":           {func(c *cfg) { c.PortMappings = []*runtimeapi.PortMapping{nil} }, "port_mappings"},
		"port protocol":      {func(c *cfg) { c.PortMappings = []*runtimeapi.PortMapping{{Protocol: 9}} }, "protocol"},
		"port address":       {func(c *cfg) { c.PortMappings = []*runtimeapi.PortMapping{{HostIp: "a"}} }, "host_ip"},
		"port twice": {func(c *cfg) {
			p := &runtimeapi.PortMapping{HostPort: 1, ContainerPort: 1}
			c.PortMappings = append(c.PortMappings, p, p)
		}, "twice"},
		"1 MB of labels":      {func(c *cfg) { c.Labels = map[string]string{"a": strings.Repeat("l", 1<<20)} }, "labels"},
		"1 MB of annotations": {func(c *cfg) { c.Annotations = map[string]string{"a": strings.Repeat("l", 1<<20)} }, "annotations"},
		"group without user":  {func(c *cfg) { c.Linux.SecurityContext.RunAsGroup = id(1) }, "run_as_group"},
		"user wraps":          {func(c *cfg) { c.Linux.SecurityContext.RunAsUser = id(1 << 32) }, "run_as_user"},
		"groups negative":     {func(c *cfg) { c.Linux.SecurityContext.SupplementalGroups = []int64{-1} }, "supplemental_groups"},
		"seccomp ref":         {func(c *cfg) { c.Linux.SecurityContext.Seccomp = &runtimeapi.SecurityProfile{LocalhostRef: "x"} }, "localhost_ref"},
		"selinux":             {func(c *cfg) { c.Linux.SecurityContext.SelinuxOptions = &runtimeapi.SELinuxOption{Level: "x"} }, "level"},
		"negative resources":  {func(c *cfg) { c.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuQuota: -5} }, "cpu_quota"},
		"negative overhead": {func(c *cfg) {
			c.Linux.Overhead = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: math.MinInt64}
		}, "overhead"},
		"network container": {func(c *cfg) { namespaces(c).Network = container }, "network"},
		"ipc target":        {func(c *cfg) { namespaces(c).Ipc = target }, "ipc"},
		"unknown mode":      {func(c *cfg) { namespaces(c).Pid = 42 }, "pid"},
		"target id path":    {func(c *cfg) { namespaces(c).TargetId = "../x" }, "target_id"},
		"all of the node":   {change: func(c *cfg) { *namespaces(c) = runtimeapi.NamespaceOption{Network: node, Pid: node, Ipc: node} }},
		"userns":            {change: func(c *cfg) { namespaces(c).UsernsOptions = usernsOf(0, whole) }},
		"userns node":       {change: func(c *cfg) { namespaces(c).UsernsOptions = usernsOf(node) }},
		"userns mode":       {func(c *cfg) { namespaces(c).UsernsOptions = usernsOf(container, whole) }, "mode"},
		"userns node maps":  {func(c *cfg) { namespaces(c).UsernsOptions = usernsOf(node, whole) }, "mappings"},
		"userns no maps":    {func(c *cfg) { namespaces(c).UsernsOptions = usernsOf(0) }, "exactly one"},
		"userns two maps":   {func(c *cfg) { namespaces(c).UsernsOptions = usernsOf(0, whole, whole) }, "exactly one"},
		"userns not root": {func(c *cfg) {
			namespaces(c).UsernsOptions = usernsOf(0, &runtimeapi.IDMapping{ContainerId: 5, Length: 9})
		}, "container_id"},
		"userns empty map": {func(c *cfg) { namespaces(c).UsernsOptions = usernsOf(0, &runtimeapi.IDMapping{}) }, "length"},
		"userns nil map":   {func(c *cfg) { namespaces(c).UsernsOptions = usernsOf(0, nil) }, "uids"},
		"userns overflow": {func(c *cfg) {
			namespaces(c).UsernsOptions = usernsOf(0, &runtimeapi.IDMapping{HostId: math.MaxUint32, Length: 2})
		}, "largest"},
		"userns and node pid": {func(c *cfg) {
			*namespaces(c) = runtimeapi.NamespaceOption{UsernsOptions: usernsOf(0, whole), Pid: node}
		}, "pid"},
		"userns and node ipc": {func(c *cfg) {
			*namespaces(c) = runtimeapi.NamespaceOption{UsernsOptions: usernsOf(0, whole), Ipc: node}
		}, "ipc"},
		"userns and node net": {change: func(c *cfg) {
			*namespaces(c) = runtimeapi.NamespaceOption{UsernsOptions: usernsOf(0, whole), Network: node}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := typical(t).Sandbox
			c.change(cfg)
			err := ValidateSandbox(cfg, Node{})
			if c.word == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantError(t, err, errdefs.ErrInvalidArgument, c.word)
		})
	}
	wantError(t, ValidateSandbox(nil, Node{}), errdefs.ErrInvalidArgument, "config")
}

func TestValidateContainer(t *testing.T) {
	type cfg = runtimeapi.ContainerConfig
	mount := func(m *runtimeapi.Mount) func(*cfg) {
		return func(c *cfg) { c.Mounts = append(c.Mounts, m) }
	}
	img := &runtimeapi.ImageSpec{Image: "i"}
	for name, c := range map[string]struct {
		change func(*cfg)
		word   string // empty: valid
	}{
		"typical":              {change: func(*cfg) {}},
		"no linux":             {change: func(c *cfg) { c.Linux = nil }},
		"no metadata":          {func(c *cfg) { c.Metadata = nil }, "metadata"},
		"name path":            {func(c *cfg) { c.Metadata.Name = "../x" }, "name"},
		"no image":             {func(c *cfg) { c.Image = nil }, "image"},
		"long image":           {func(c *cfg) { c.Image.Image = strings.Repeat("i", 10000) }, "image"},
		"image newline":        {func(c *cfg) { c.Image.Image = "a\nb" }, "image"},
		"labels":               {func(c *cfg) { c.Labels = map[string]string{"a": strings.Repeat("l", 1<<20)} }, "labels"},
		"log path":             {func(c *cfg) { c.LogPath = "../x" }, "log_path"},
		"signal":               {func(c *cfg) { c.StopSignal = 4711 }, "stop_signal"},
		"env key":              {func(c *cfg) { c.Envs = []*runtimeapi.KeyValue{{Key: "A=B"}} }, "envs"},
		"env empty key":        {func(c *cfg) { c.Envs = []*runtimeapi.KeyValue{{}} }, "envs"},
		"env nil":              {func(c *cfg) { c.Envs = []*runtimeapi.KeyValue{nil} }, "envs"},
		"env NUL":              {func(c *cfg) { c.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte{0}}} }, "NUL"},
		"env not text":         {func(c *cfg) { c.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte{0xff}}} }, "UTF-8"},
		"mount nil":            {mount(nil), "mounts"},
		"mount without path":   {mount(&runtimeapi.Mount{HostPath: "/x"}), "container_path"},
		"mount over root":      {mount(&runtimeapi.Mount{ContainerPath: "/.", HostPath: "/x"}), "root file system"},
		"mount climbs":         {mount(&runtimeapi.Mount{ContainerPath: "/a/../../b", HostPath: "/x"}), "container_path"},
		"mount twice":          {mount(&runtimeapi.Mount{ContainerPath: "/cfg//", HostPath: "/x"}), "two mounts"},
		"mount of nothing":     {mount(&runtimeapi.Mount{ContainerPath: "/x"}), "host_path or image"},
		"mount empty image":    {mount(&runtimeapi.Mount{ContainerPath: "/x", Image: &runtimeapi.ImageSpec{}}), "host_path or image"},
		"mount relative":       {mount(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "x"}), "host_path"},
		"mount host climbs":    {mount(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/x/../../etc"}), "host_path"},
		"mount both":           {mount(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/x", Image: img}), "either"},
		"mount image":          {change: mount(&runtimeapi.Mount{ContainerPath: "/x", Image: img, ImageSubPath: "a/b"})},
		"mount sub path":       {mount(&runtimeapi.Mount{ContainerPath: "/x", Image: img, ImageSubPath: "a/../../b"}), "image_sub_path"},
		"mount sub path alone": {mount(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/x", ImageSubPath: "a"}), "image_sub_path"},
		"mount image shared":   {mount(&runtimeapi.Mount{ContainerPath: "/x", Image: img, Propagation: shared}), "propagation"},
		"mount propagation":    {mount(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/x", Propagation: 9}), "propagation"},
		"mount option":         {mount(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/x", MountOptions: []string{"rw"}}), "mount_options"},
		"mount mapping":        {mount(&runtimeapi.Mount{ContainerPath: "/x", HostPath: "/x", UidMappings: []*runtimeapi.IDMapping{nil}}), "uidMappings"},
		"masked relative":      {func(c *cfg) { c.Linux.SecurityContext.MaskedPaths = []string{"proc"} }, "masked_paths"},
		"readonly climbs":      {func(c *cfg) { c.Linux.SecurityContext.ReadonlyPaths = []string{"/a/../b"} }, "readonly_paths"},
		"target without id":    {func(c *cfg) { c.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_TARGET }, "target_id"},
		"other userns": {func(c *cfg) {
			c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = usernsOf(0, &runtimeapi.IDMapping{Length: 1})
		}, "userns_options"},
		"privileged": {func(c *cfg) { c.Linux.SecurityContext.Privileged = true }, "privileged"},
		"too many mounts": {func(c *cfg) {
			for i := range 5000 {
				mount(&runtimeapi.Mount{ContainerPath: fmt.Sprint("/m", i), HostPath: "/x"})(c)
			}
		}, "too many"},
	} {
		t.Run(name, func(t *testing.T) {
			in := typical(t)
			c.change(in.Config)
			err := ValidateContainer(in.Config, in.Sandbox, in.Node)
			if c.word == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantError(t, err, errdefs.ErrInvalidArgument, c.word)
		})
	}
	in := typical(t)
	wantError(t, ValidateContainer(nil, in.Sandbox, in.Node), errdefs.ErrInvalidArgument, "config")
	wantError(t, ValidateContainer(in.Config, nil, in.Node), errdefs.ErrInvalidArgument, "sandbox_config")
	_, err := Container(Input{})
	wantError(t, err, errdefs.ErrInvalidArgument, "config")
}

func TestSecretsStayOutOfErrors(t *testing.T) {
	in := typical(t)
	in.Config.Envs = []*runtimeapi.KeyValue{{Key: "TOKEN", Value: []byte("s3cret\x00")}}
	_, err := container(in, testKernel())
	wantError(t, err, errdefs.ErrInvalidArgument, "TOKEN")
	in.Config.Envs[0].Value = []byte(strings.Repeat("s3cret", 40000))
	_, long := container(in, testKernel())
	wantError(t, long, errdefs.ErrInvalidArgument, "TOKEN", "131071")
	for _, e := range []error{err, long} {
		if strings.Contains(e.Error(), "s3cret") {
			t.Errorf("error tells the secret: %v", e)
		}
	}
}

func TestSysctls(t *testing.T) {
	cfg := typical(t).Sandbox
	node := Node{UnprivilegedPorts: true, UnprivilegedICMP: true}
	if got := Sysctls(cfg, node); got[portStart] != "0" || got[pingRange] != "0 2147483647" {
		t.Errorf("sysctls are %v, want the defaults", got)
	}
	if got := Sysctls(cfg, Node{}); len(got) != 0 {
		t.Errorf("sysctls are %v, want none", got)
	}
	cfg.Linux.Sysctls = map[string]string{
		"net/ipv4/ip_unprivileged_port_start": "80", "kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "100",
		"kernel.domainname": "d", "net/ipv4/conf/eth0.100/forwarding": "1",
	}
	if err := ValidateSandbox(cfg, node); err != nil {
		t.Fatal(err)
	}
	all := Sysctls(cfg, node)
	if all[portStart] != "80" {
		t.Errorf("sysctls are %v, want the request's port", all)
	}
	net, ipc, uts := SplitSysctls(all)
	if len(net) != 3 || len(ipc) != 2 || len(uts) != 1 || len(net)+len(ipc)+len(uts) != len(all) {
		t.Errorf("split is %v, %v, %v", net, ipc, uts)
	}
	if p := SysctlPath("net/ipv4/conf/eth0.100/forwarding"); p != "/proc/sys/net/ipv4/conf/eth0.100/forwarding" {
		t.Error(p)
	}
	if p := SysctlPath("kernel.shm_rmid_forced"); p != "/proc/sys/kernel/shm_rmid_forced" {
		t.Error(p)
	}
	cfg.Linux.Sysctls = nil
	namespaces(cfg).UsernsOptions = usernsOf(0, &runtimeapi.IDMapping{Length: 1 << 16})
	if got := Sysctls(cfg, node); len(got) != 1 || got[portStart] != "0" {
		t.Errorf("sysctls in a user namespace are %v, want no ping group range", got)
	}
	namespaces(cfg).Network = runtimeapi.NamespaceMode_NODE
	if got := Sysctls(cfg, node); len(got) != 0 {
		t.Errorf("sysctls on the node's network are %v, want none", got)
	}
}

func FuzzSysctl(f *testing.F) {
	for _, s := range []string{"net.ipv4.ip_forward", "kernel/shmmax", "net.ipv4.conf.eth0@if1.x", "../x", "net..x", "net.ipv4/../x"} {
		f.Add(s, "1")
	}
	f.Add("kernel.shm_rmid_forced", "1+kernel.core_pattern=|/evil")
	f.Fuzz(func(t *testing.T, name, value string) {
		cfg := &runtimeapi.PodSandboxConfig{Linux: &runtimeapi.LinuxPodSandboxConfig{Sysctls: map[string]string{name: value}}}
		if checkSysctls(cfg) != nil {
			return
		}
		for n, v := range Sysctls(cfg, Node{}) {
			path := SysctlPath(n)
			if path != filepath.Clean(path) || strings.ContainsAny(v, "\n\x00+") {
				t.Errorf("%q=%q sets %s", name, value, path)
			}
			if !strings.HasPrefix(path, "/proc/sys/net/") && !strings.HasPrefix(path, "/proc/sys/kernel/") && !strings.HasPrefix(path, "/proc/sys/fs/mqueue/") {
				t.Errorf("%q sets %s", name, path)
			}
		}
		net, ipc, uts := SplitSysctls(Sysctls(cfg, Node{}))
		if len(net)+len(ipc)+len(uts) != 1 {
			t.Errorf("%q belongs to no namespace", name)
		}
	})
}

func TestLogPath(t *testing.T) {
	for _, c := range []struct{ dir, path, want string }{
		{"/var/log/p", "c/0.log", "/var/log/p/c/0.log"}, {"/var/log/p/", "./0.log", "/var/log/p/0.log"}, {"", "x", ""}, {"/d", "", ""},
	} {
		got, err := LogPath(&runtimeapi.ContainerConfig{LogPath: c.path}, &runtimeapi.PodSandboxConfig{LogDirectory: c.dir})
		if err != nil || got != c.want {
			t.Errorf("%q in %q is %q, %v, want %q", c.path, c.dir, got, err, c.want)
		}
	}
	if got, err := LogPath(nil, nil); err != nil || got != "" {
		t.Errorf("nothing is %q, %v", got, err)
	}
}

func FuzzLogPath(f *testing.F) {
	for _, s := range []string{"c/0.log", "../x", "/etc/passwd", "a/../../b", "a\nb", ".", "..", "a/..", "\x1b[2J"} {
		f.Add("/var/log/pods/p", s)
	}
	f.Fuzz(func(t *testing.T, dir, path string) {
		got, err := LogPath(&runtimeapi.ContainerConfig{LogPath: path}, &runtimeapi.PodSandboxConfig{LogDirectory: dir})
		if err != nil || got == "" {
			return
		}
		if !beneath(got, filepath.Clean(dir)) || got == filepath.Clean(dir) || !printable(got) || len(got) > maxPath {
			t.Errorf("%q in %q is %q", path, dir, got)
		}
	})
}

func TestImageVolumes(t *testing.T) {
	in := map[string]struct{}{"/data/": {}, "data": {}, "/a//b": {}, "/sys/fs/cgroup": {}, "/dev/x": {}, "/procession": {}}
	got, err := ImageVolumes(imagespec.ImageConfig{Volumes: in})
	if err != nil || !slices.Equal(got, []string{"/a/b", "/data", "/dev/x", "/procession", "/sys/fs/cgroup"}) {
		t.Errorf("volumes are %v, %v", got, err)
	}
	many := map[string]struct{}{}
	for i := range 1000 {
		many[fmt.Sprint("/", i)] = struct{}{}
	}
	_, err = ImageVolumes(imagespec.ImageConfig{Volumes: many})
	wantError(t, err, errdefs.ErrInvalidArgument, "1000")
}

func FuzzImageVolumes(f *testing.F) {
	for _, s := range []string{"/data", "/../../x", "data", "/", "", "/proc/self", "/a/..", "/a\x00b", "//"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, volume string) {
		got, err := ImageVolumes(imagespec.ImageConfig{Volumes: map[string]struct{}{volume: {}}})
		if err != nil {
			return
		}
		for _, v := range got {
			if v != filepath.Clean(v) || !filepath.IsAbs(v) || v == "/" || beneath(v, "/proc") || hasDotDot(volume) {
				t.Errorf("%q became %q", volume, v)
			}
		}
	})
}

func FuzzAnnotationGlob(f *testing.F) {
	f.Add("io.katacontainers.*", "io.katacontainers.x")
	f.Add("*", "org.systemd.property.ExecStart")
	f.Add("[", "io.kubernetes.cri.sandbox-id")
	f.Fuzz(func(t *testing.T, glob, key string) {
		if !admits(glob, key) {
			return
		}
		if strings.HasPrefix(key, "io.kubernetes.cri.") || (strings.HasPrefix(key, "org.systemd.") && !strings.HasPrefix(glob, "org.systemd.")) {
			t.Errorf("%q admits %q", glob, key)
		}
	})
}
