package oci

import (
	"errors"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const shmSize = "size=65536k"

func standardMounts() []specs.Mount {
	return []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
	}
}

// setMounts puts the mounts in the order in which a runtime makes them: the
// standard ones, then the pod's, the image's and the container's by depth, so
// that none hides another.
func (b *builder) setMounts() error {
	asked, err := b.configMounts()
	if err != nil {
		return err
	}
	taken := map[string]bool{}
	for _, m := range asked {
		taken[m.Destination] = true
	}
	for _, m := range slices.Concat(b.fileMounts(), b.volumeMounts()) {
		if !taken[m.Destination] {
			taken[m.Destination] = true
			asked = append(asked, m)
		}
	}
	slices.SortStableFunc(asked, func(x, y specs.Mount) int { return depth(x.Destination) - depth(y.Destination) })

	var all []specs.Mount
	for _, m := range b.standard() {
		at := inContainer(m.Destination)
		if !taken[at] && !(taken["/dev"] && strings.HasPrefix(at, "/dev/")) {
			all = append(all, m)
		}
	}
	b.spec.Mounts = append(all, asked...)
	return nil
}

func depth(path string) int { return strings.Count(path, "/") }

// standard adapts the base mounts to the container's privileges and
// namespaces and adds the cgroup mount and, without a pod's, a /dev/shm.
func (b *builder) standard() []specs.Mount {
	privileged := b.sc.GetPrivileged()
	var list []specs.Mount
	for _, m := range b.spec.Mounts {
		if inContainer(m.Destination) == "/sys" && m.Type == "sysfs" {
			m = b.sysfs(m)
		}
		list = append(list, m)
	}
	if b.in.Files.Shm == "" {
		list = append(list, specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", shmSize}})
	}
	if slices.ContainsFunc(list, func(m specs.Mount) bool { return inContainer(m.Destination) == "/sys/fs/cgroup" }) {
		return list
	}
	access := "ro"
	if privileged || (b.in.Handler.CgroupWritable && b.in.Node.CgroupV2) {
		access = "rw"
	}
	options := []string{"nosuid", "noexec", "nodev", "relatime", access}
	if !slices.ContainsFunc(b.spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.CgroupNamespace }) {
		options = append(options, b.k.cgroupVF...)
	}
	return append(list, specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: options})
}

// sysfs is writable for privileged containers. It shows a network namespace,
// so in a user namespace on the node's network the kernel refuses a new
// instance, and the node's own is shown instead.
func (b *builder) sysfs(m specs.Mount) specs.Mount {
	if b.userNamespace() && b.in.Namespaces.Net == "" {
		access := "ro"
		if b.in.Handler.RecursiveReadOnly {
			access = "rro"
		}
		return specs.Mount{Destination: "/sys", Type: "bind", Source: "/sys", Options: []string{"rbind", access, "nosuid", "noexec", "nodev"}}
	}
	if b.sc.GetPrivileged() {
		m.Options = slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return o == "ro" })
		m.Options = append(m.Options, "rw")
	}
	return m
}

// fileMounts are the pod's files; like everything beneath it /etc becomes
// read-only with the root file system.
func (b *builder) fileMounts() []specs.Mount {
	access := "rw"
	if b.sc.GetReadonlyRootfs() {
		access = "ro"
	}
	var list []specs.Mount
	for _, f := range []struct{ at, source string }{
		{"/etc/hostname", b.in.Files.Hostname},
		{"/etc/hosts", b.in.Files.Hosts},
		{"/etc/resolv.conf", b.in.Files.ResolvConf},
	} {
		if f.source != "" {
			list = append(list, specs.Mount{Destination: f.at, Type: "bind", Source: f.source, Options: []string{"rbind", "rprivate", access}})
			b.relabel(f.source)
		}
	}
	if shm := b.in.Files.Shm; shm != "" {
		list = append(list, specs.Mount{Destination: "/dev/shm", Type: "bind", Source: shm, Options: []string{"rbind", "rprivate", "rw"}})
		if shm != "/dev/shm" {
			b.relabel(shm)
		}
	}
	return list
}

func (b *builder) volumeMounts() []specs.Mount {
	var list []specs.Mount
	for _, at := range slices.Sorted(maps.Keys(b.in.Volumes)) {
		source := b.in.Volumes[at]
		list = append(list, specs.Mount{Destination: inContainer(at), Type: "bind", Source: source, Options: []string{"rbind", "rprivate", "rw"}})
		b.relabel(source)
	}
	return list
}

func (b *builder) relabel(source string) {
	if b.in.Node.SELinux && b.spec.Linux.MountLabel != "" {
		b.res.Relabel = append(b.res.Relabel, source)
	}
}

// configMounts translates the mounts of the request.
func (b *builder) configMounts() ([]specs.Mount, error) {
	var list []specs.Mount
	table := &mountTable{read: b.k.mounts}
	for _, m := range b.in.Config.GetMounts() {
		made, err := b.configMount(m, table)
		if err != nil {
			return nil, err
		}
		list = append(list, made)
	}
	return list, nil
}

func (b *builder) configMount(m *runtimeapi.Mount, table *mountTable) (specs.Mount, error) {
	out := specs.Mount{Destination: inContainer(m.GetContainerPath()), Type: "bind"}
	if m.GetImage().GetImage() != "" {
		source, err := b.imageSource(m)
		if err != nil {
			return out, err
		}
		out.Source = source
		out.Options = append([]string{"rbind", "rprivate", "ro", "nosuid", "nodev"}, m.GetMountOptions()...)
		return b.idMap(out, m)
	}
	source, err := resolved(m.GetHostPath())
	if err != nil {
		return out, err
	}
	out.Source = source
	propagation, err := b.propagation(m, source, table)
	if err != nil {
		return out, err
	}
	access := "rw"
	switch wanted := b.in.Handler.ReadOnlyMounts; {
	case m.GetRecursiveReadOnly() && !b.in.Handler.RecursiveReadOnly:
		return out, impossible("recursive_read_only of mount", m.GetContainerPath(), "the runtime handler cannot make recursive read-only mounts; use a newer runtime or a plain read-only mount")
	case m.GetRecursiveReadOnly():
		access = "rro"
	case m.GetReadonly() && wanted == ROEnabled && !b.in.Handler.RecursiveReadOnly:
		return out, impossible("readonly of mount", m.GetContainerPath(), "treat_ro_mounts_as_rro is Enabled and the runtime handler cannot make recursive read-only mounts; use a newer runtime or IfPossible")
	case m.GetReadonly() && (wanted == ROEnabled || wanted == ROIfPossible && b.in.Handler.RecursiveReadOnly):
		access = "rro"
	case m.GetReadonly():
		access = "ro"
	}
	out.Options = append([]string{"rbind", propagation, access}, m.GetMountOptions()...)
	if m.GetSelinuxRelabel() && b.in.Node.SELinux {
		if err := checkRelabel(source); err != nil {
			return out, err
		}
		b.relabel(source)
	}
	return b.idMap(out, m)
}

func (b *builder) imageSource(m *runtimeapi.Mount) (string, error) {
	for _, key := range []string{m.GetContainerPath(), inContainer(m.GetContainerPath())} {
		if source := b.in.ImageVolumes[key]; source != "" {
			return source, nil
		}
	}
	return "", impossible("image of mount", m.GetContainerPath(), "the image is not mounted on this node; pull it and try again")
}

// idMap adds the request's mappings; a runtime that cannot do them would show
// files with the owners that they have on the node.
func (b *builder) idMap(out specs.Mount, m *runtimeapi.Mount) (specs.Mount, error) {
	if len(m.GetUidMappings()) == 0 && len(m.GetGidMappings()) == 0 {
		return out, nil
	}
	if !b.in.Handler.IDMappedMounts {
		return out, impossible("uidMappings of mount", m.GetContainerPath(), "the runtime handler cannot make id-mapped mounts; use a newer runtime or a pod without user namespace")
	}
	out.UIDMappings, out.GIDMappings = idMappings(m.GetUidMappings()), idMappings(m.GetGidMappings())
	return out, nil
}

// resolved follows the symbolic links of a host path; one that is not there is
// the caller's to make or to refuse.
func resolved(path string) (string, error) {
	real, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		return filepath.Clean(path), nil
	}
	if err != nil {
		return "", impossible("host_path", path, "cannot follow it: "+err.Error())
	}
	return real, nil
}

// mountTable reads the node's mounts when the first mount needs them.
type mountTable struct {
	read func() ([]mountPoint, error)
	list []mountPoint
	done bool
}

func (t *mountTable) of(path string) (mountPoint, error) {
	if !t.done {
		list, err := t.read()
		if err != nil {
			return mountPoint{}, err
		}
		t.list, t.done = list, true
	}
	m, ok := mountOf(t.list, path)
	if !ok {
		return mountPoint{}, impossible("host_path", path, "it lies on no mount of this node's mount namespace")
	}
	return m, nil
}

// propagation translates the mode and sets that of the root file system, which
// must let through what the mount lets through. A source whose own mount
// propagates nothing would make the request silently void.
func (b *builder) propagation(m *runtimeapi.Mount, source string, table *mountTable) (string, error) {
	mode := m.GetPropagation()
	if mode == runtimeapi.MountPropagation_PROPAGATION_PRIVATE {
		return "rprivate", nil
	}
	on, err := table.of(source)
	if err != nil {
		return "", err
	}
	if mode == runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL {
		if !on.shared {
			return "", impossible("host_path", m.GetHostPath(), "BIDIRECTIONAL propagation needs a shared mount and "+show(on.path)+" is not one; run mount --make-rshared on it")
		}
		b.spec.Linux.RootfsPropagation = "rshared"
		return "rshared", nil
	}
	if !on.shared && !on.slave {
		return "", impossible("host_path", m.GetHostPath(), "HOST_TO_CONTAINER propagation needs a shared or slave mount and "+show(on.path)+" is neither; run mount --make-rshared on it")
	}
	if b.spec.Linux.RootfsPropagation != "rshared" {
		b.spec.Linux.RootfsPropagation = "rslave"
	}
	return "rslave", nil
}

// checkRelabel refuses folders of the system: with a container's label on them
// the node would no longer start (CVE-2021-43816).
func checkRelabel(source string) error {
	system := []string{
		"/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib64", "/opt",
		"/proc", "/root", "/run", "/sbin", "/srv", "/sys", "/tmp", "/usr", "/var",
		"/usr/bin", "/usr/lib", "/usr/lib64", "/usr/sbin", "/usr/local", "/var/lib",
		"/var/log", "/var/run", "/var/lib/kubelet",
	}
	if slices.Contains(system, source) || beneath(source, "/proc") || beneath(source, "/sys") || beneath(source, "/dev") || beneath(source, "/boot") {
		return invalid("selinux_relabel of host_path", source, "a folder of the system is not relabelled; mount a folder of its own")
	}
	return nil
}
