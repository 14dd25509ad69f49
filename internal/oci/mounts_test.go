package oci

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	slave  = runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
	shared = runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL
)

func mountsAt(s *specs.Spec) []string {
	var at []string
	for _, m := range s.Mounts {
		at = append(at, m.Destination)
	}
	return at
}

func findMount(t *testing.T, s *specs.Spec, at string) specs.Mount {
	t.Helper()
	i := slices.IndexFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination == at })
	if i < 0 {
		t.Fatalf("no mount at %s in %v", at, mountsAt(s))
	}
	return s.Mounts[i]
}

func TestMountOrder(t *testing.T) {
	want := []string{
		"/proc", "/dev", "/dev/pts", "/dev/mqueue", "/sys", "/sys/fs/cgroup",
		"/cfg", "/a", "/etc/hosts", "/dev/termination-log", "/etc/hostname", "/etc/resolv.conf", "/dev/shm", "/srv/cache",
		"/var/lib/app/data",
	}
	if got := mountsAt(build(t, typical(t)).Spec); !slices.Equal(got, want) {
		t.Errorf("mounts are\n%v, want\n%v", got, want)
	}
}

func TestMountsOfTheRequestWin(t *testing.T) {
	in := typical(t)
	in.Config.Mounts = []*runtimeapi.Mount{
		{ContainerPath: "/dev", HostPath: "/dev"},
		{ContainerPath: "/etc/resolv.conf/", HostPath: "/no/such/resolv"},
		{ContainerPath: "/srv/cache", HostPath: "/no/such/cache"},
		{ContainerPath: "/sys/fs/cgroup", HostPath: "/sys/fs/cgroup"},
	}
	s := build(t, in).Spec
	for _, at := range []string{"/dev/pts", "/dev/mqueue"} {
		if slices.Contains(mountsAt(s), at) {
			t.Errorf("%s is mounted beneath a /dev of the request", at)
		}
	}
	for at, source := range map[string]string{"/etc/resolv.conf": "/no/such/resolv", "/srv/cache": "/no/such/cache", "/dev": "/dev", "/sys/fs/cgroup": "/sys/fs/cgroup"} {
		if m := findMount(t, s, at); m.Source != source {
			t.Errorf("mount %v, want source %s", m, source)
		}
	}
	if got := mountsAt(s); len(got) != len(slices.Compact(slices.Sorted(slices.Values(got)))) {
		t.Errorf("a path is mounted twice: %v", got)
	}
}

func TestFilesAreReadOnlyWithTheRoot(t *testing.T) {
	in := typical(t)
	in.Config.Mounts = nil
	security(in).ReadonlyRootfs = true
	in.Files.Shm = ""
	s := build(t, in).Spec
	for _, at := range []string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"} {
		if m := findMount(t, s, at); !slices.Contains(m.Options, "ro") {
			t.Errorf("mount %v, want ro", m)
		}
	}
	if m := findMount(t, s, "/dev/shm"); m.Type != "tmpfs" {
		t.Errorf("mount %v, want a tmpfs where the pod has none", m)
	}
}

func TestPropagation(t *testing.T) {
	for name, c := range map[string]struct {
		path      string
		mode      runtimeapi.MountPropagation
		option    string // empty: refused
		rootfs    string
		twice     bool
		errorWord string
	}{
		"private":                 {path: "/private/x", option: "rprivate"},
		"slave of shared":         {path: "/x", mode: slave, option: "rslave", rootfs: "rslave"},
		"slave of slave":          {path: "/slave/x", mode: slave, option: "rslave", rootfs: "rslave"},
		"slave of private":        {path: "/private/x", mode: slave, errorWord: "HOST_TO_CONTAINER"},
		"shared of shared":        {path: "/x", mode: shared, option: "rshared", rootfs: "rshared"},
		"shared stays with slave": {path: "/x", mode: shared, option: "rshared", rootfs: "rshared", twice: true},
		"shared of slave":         {path: "/slave", mode: shared, errorWord: "BIDIRECTIONAL"},
		"shared of private":       {path: "/private", mode: shared, errorWord: "/private"},
		"name alike":              {path: "/privateer", mode: shared, option: "rshared", rootfs: "rshared"},
	} {
		t.Run(name, func(t *testing.T) {
			in := typical(t)
			in.Config.Mounts = []*runtimeapi.Mount{{ContainerPath: "/m", HostPath: c.path, Propagation: c.mode}}
			if c.twice {
				in.Config.Mounts = append(in.Config.Mounts, &runtimeapi.Mount{ContainerPath: "/n", HostPath: c.path, Propagation: slave})
			}
			if c.option == "" {
				refuse(t, in, errdefs.ErrFailedPrecondition, c.errorWord, "make-rshared")
				return
			}
			s := build(t, in).Spec
			if m := findMount(t, s, "/m"); !slices.Contains(m.Options, c.option) || s.Linux.RootfsPropagation != c.rootfs {
				t.Errorf("mount %v with root propagation %q", m, s.Linux.RootfsPropagation)
			}
		})
	}
}

func TestReadOnlyMounts(t *testing.T) {
	in := typical(t)
	m := &runtimeapi.Mount{ContainerPath: "/m", HostPath: "/no/such", Readonly: true, RecursiveReadOnly: true, MountOptions: []string{"noexec"}}
	in.Config.Mounts = []*runtimeapi.Mount{m}
	if got := findMount(t, build(t, in).Spec, "/m").Options; !slices.Equal(got, []string{"rbind", "rprivate", "rro", "noexec"}) {
		t.Errorf("options are %v", got)
	}
	in.Handler.RecursiveReadOnly = false
	refuse(t, in, errdefs.ErrFailedPrecondition, "recursive")
	in.Handler.RecursiveReadOnly = true
	m.Propagation = slave
	refuse(t, in, errdefs.ErrInvalidArgument, "PRIVATE")
	m.Propagation, m.Readonly = 0, false
	refuse(t, in, errdefs.ErrInvalidArgument, "readonly")
}

func TestIDMappedMounts(t *testing.T) {
	in := withUserNamespace(typical(t))
	ids := in.Namespaces.UIDs
	in.Config.Mounts = []*runtimeapi.Mount{{ContainerPath: "/m", HostPath: "/no/such", UidMappings: ids, GidMappings: ids}}
	if m := findMount(t, build(t, in).Spec, "/m"); len(m.UIDMappings) != 1 || m.GIDMappings[0].HostID != 100000 {
		t.Errorf("mount %v", m)
	}
	in.Handler.IDMappedMounts = false
	refuse(t, in, errdefs.ErrFailedPrecondition, "id-mapped")
}

func TestImageMounts(t *testing.T) {
	in := typical(t)
	in.Config.Mounts = []*runtimeapi.Mount{{ContainerPath: "/img/", Image: &runtimeapi.ImageSpec{Image: "sha256:1"}}}
	refuse(t, in, errdefs.ErrFailedPrecondition, "not mounted")
	in.ImageVolumes = map[string]string{"/img": "/var/lib/cloister/images/1"}
	m := findMount(t, build(t, in).Spec, "/img")
	if m.Source != "/var/lib/cloister/images/1" || !slices.Contains(m.Options, "ro") || slices.Contains(m.Options, "noexec") {
		t.Errorf("mount %v", m)
	}
}

func TestHostPathLinksAreFollowed(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink("/usr", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	in := typical(t)
	in.Config.Mounts = []*runtimeapi.Mount{{ContainerPath: "/m", HostPath: filepath.Join(dir, "link")}}
	if m := findMount(t, build(t, in).Spec, "/m"); m.Source != "/usr" {
		t.Errorf("mount %v, want source /usr", m)
	}
}

func TestCgroupMount(t *testing.T) {
	in := typical(t)
	in.Node.CgroupV2, in.Handler.CgroupWritable = true, true
	if m := findMount(t, build(t, in).Spec, "/sys/fs/cgroup"); !slices.Contains(m.Options, "rw") {
		t.Errorf("mount %v, want rw", m)
	}
	in.Sandbox.Linux.SecurityContext.Privileged = true
	security(in).Privileged = true
	k := testKernel()
	k.cgroupVF = []string{"nsdelegate"}
	res, err := container(in, k)
	if err != nil {
		t.Fatal(err)
	}
	if m := findMount(t, res.Spec, "/sys/fs/cgroup"); !slices.Contains(m.Options, "nsdelegate") {
		t.Errorf("mount %v strips the node's nsdelegate", m)
	}
}

func TestMountInfo(t *testing.T) {
	m, ok := parseMountInfo(`36 35 98:0 /mnt1 /mnt\0402 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue`)
	if !ok || m.path != "/mnt 2" || !m.shared || !m.slave || m.fsType != "ext3" || !slices.Contains(m.superOptions, "errors=continue") {
		t.Errorf("got %+v, %v", m, ok)
	}
	for _, bad := range []string{"", " - ", "1 2 3 - x", "a b c d e"} {
		if m, ok := parseMountInfo(bad); ok {
			t.Errorf("%q became %+v", bad, m)
		}
	}
	mounts, err := readMountInfo()
	if err != nil || len(mounts) == 0 {
		t.Fatalf("this machine's mounts: %v, %v", mounts, err)
	}
	if on, ok := mountOf(mounts, "/proc/self"); !ok || on.path != "/proc" {
		t.Errorf("/proc/self is on %+v, %v", on, ok)
	}
	covered := []mountPoint{{path: "/m"}, {path: "/m", shared: true}, {path: "/"}}
	if on, _ := mountOf(covered, "/m/x"); !on.shared {
		t.Errorf("the covered mount won: %+v", on)
	}
	got := cgroup2Options([]mountPoint{{path: "/sys/fs/cgroup", fsType: "cgroup2", superOptions: []string{"rw", "nsdelegate", "memory_recursiveprot"}}})
	if len(got) != 2 {
		t.Errorf("options are %v", got)
	}
}

func FuzzMountInfo(f *testing.F) {
	f.Add(`36 35 98:0 /mnt1 /mnt\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`)
	f.Add(`1 2 3 4 \777 6 7 - 8 9`)
	f.Fuzz(func(t *testing.T, line string) {
		if m, ok := parseMountInfo(line); ok && m.path == "" {
			t.Errorf("%q has no mount point", line)
		}
	})
}
