package vm

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	guestv1 "cloister.dev/api/guest/v1"
	"cloister.dev/internal/guest"
	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/vm/share"
)

// guestVersion is the version of config.json that every guest's runtime takes.
const guestVersion = "1.0.2"

// shareTask makes a task's files and disks visible to the machine and gives
// the request that launches it there.
func (s *sandbox) shareTask(ctx context.Context, t *backend.TaskSpec) (*guestv1.LaunchRequest, error) {
	if err := mountRootfs(t); err != nil {
		return nil, err
	}
	spec, err := readSpec(t)
	if err != nil {
		return nil, err
	}
	r := &guestv1.LaunchRequest{Task: t.ID}
	root := spec.Root.Path
	if !filepath.IsAbs(root) {
		root = filepath.Join(t.Bundle, root)
	}
	files := s.files()
	base := key(t.ID, "")
	if r.Rootfs, err = s.giveRoot(ctx, t.ID, root); err != nil {
		return nil, err
	}
	spec.Root.Path = filepath.Join(guest.ShareDir, base, "rootfs") // unless the guest has it otherwise
	r.Submounts = append(r.Submounts, spec.Root.Path)
	if r.Rootfs != nil {
		r.Submounts[0] = filepath.Join(guest.ShareDir, r.Rootfs.Writable)
	}
	mounted := mountPoints()
	for i := range spec.Mounts {
		source := spec.Mounts[i].Source
		if err := shareMount(files, base, i, &spec.Mounts[i]); err != nil {
			return nil, err
		}
		if spec.Mounts[i].Source == source || spec.Mounts[i].Source == guest.ShmDir {
			continue
		}
		r.Submounts = append(r.Submounts, spec.Mounts[i].Source)
		for _, point := range mounted {
			if rest, beneath := strings.CutPrefix(point, source+"/"); beneath && slices.Contains(spec.Mounts[i].Options, "rbind") {
				r.Submounts = append(r.Submounts, filepath.Join(spec.Mounts[i].Source, rest))
			}
		}
	}
	if err := s.limitTask(t.ID, spec.Linux.Resources); err != nil {
		return nil, err
	}
	volumes, err := takeDevices(spec.Linux)
	if err != nil {
		return nil, err
	}
	if r.Disks, err = s.plugVolumes(ctx, t.ID, volumes); err != nil {
		return nil, err
	}
	if err := s.adaptLinux(t, spec); err != nil {
		return nil, err
	}
	adaptProcess(spec.Process)
	spec.Version, spec.Hostname, spec.Domainname, spec.Hooks = guestVersion, "", "", nil
	r.Config, err = json.Marshal(spec)
	return r, err
}

// giveRoot gives the guest a root file system: what it is made of where the
// handler says so, or else as a shared folder.
func (s *sandbox) giveRoot(ctx context.Context, task, root string) (*guestv1.Rootfs, error) {
	if s.record().Mkfs != "" {
		r, found, err := s.plugRoot(ctx, task, root)
		if found || err != nil {
			return r, err
		}
		s.backend.log.Info("root file system is shared: it is no overlay of layers", "task", task, "rootfs", root)
	}
	if err := s.files().Add(key(task, "")+"/rootfs", root, share.Options{Recursive: true}); err != nil {
		return nil, fmt.Errorf("share the root file system: %w", err)
	}
	return nil, nil
}

// readSpec reads the configuration that a client wrote into the bundle.
func readSpec(t *backend.TaskSpec) (*specs.Spec, error) {
	b, err := os.ReadFile(filepath.Join(t.Bundle, "config.json"))
	if err != nil {
		return nil, fmt.Errorf("read the bundle: %w", err)
	}
	var spec specs.Spec
	if err := json.Unmarshal(b, &spec); err != nil {
		return nil, fmt.Errorf("read the bundle's config.json: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if spec.Root == nil || spec.Process == nil || spec.Linux == nil {
		return nil, fmt.Errorf("the bundle's config.json has no root, process or linux: %w", errdefs.ErrInvalidArgument)
	}
	return &spec, nil
}

// mountPoints lists where something is mounted, outermost first; without the
// list, mounts beneath shared folders only may get stricter than they are.
func mountPoints() []string {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	var points []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 {
			points = append(points, f[4])
		}
	}
	slices.Sort(points)
	return points
}

// shareMount makes a mount's source one that the guest has.
func shareMount(files *share.FS, base string, i int, m *specs.Mount) error {
	recursive, bind := slices.Contains(m.Options, "rbind"), m.Type == "bind"
	if !recursive && !bind && !slices.Contains(m.Options, "bind") {
		return nil
	}
	for _, o := range m.Options {
		if o == "shared" || o == "rshared" {
			return fmt.Errorf("mount %s: mounts made in a virtual machine cannot appear on the node (Bidirectional propagation): use a handler that shares the node's kernel: %w",
				m.Destination, errdefs.ErrInvalidArgument)
		}
	}
	m.Options = slices.DeleteFunc(m.Options, func(o string) bool { return o == "slave" || o == "rslave" })
	if m.Destination == "/dev/shm" {
		m.Source = guest.ShmDir
		return nil
	}
	name := fmt.Sprintf("%s/mount-%d", base, i)
	readOnly, beneath := slices.Contains(m.Options, "ro"), slices.Contains(m.Options, "rro")
	if err := files.Add(name, m.Source, share.Options{ReadOnly: readOnly || beneath, ReadOnlyBeneath: beneath, Recursive: recursive}); err != nil {
		return fmt.Errorf("share %s: %w", m.Source, err)
	}
	m.Source = filepath.Join(guest.ShareDir, name)
	return nil
}

// unshareTask takes a task's files and disks away from the machine.
func (s *sandbox) unshareTask(ctx context.Context, t *backend.TaskSpec) error {
	if err := s.releaseDisks(ctx, t.ID); err != nil {
		return err
	}
	files := s.files()
	if files == nil {
		return nil
	}
	if err := files.Remove(key(t.ID, "")); err != nil {
		return fmt.Errorf("unshare the files of task %s: %w", t.ID, err)
	}
	return s.forgetLimits(t.ID)
}

// adaptLinux takes out what means something on the node's kernel only.
func (s *sandbox) adaptLinux(t *backend.TaskSpec, spec *specs.Spec) error {
	l := spec.Linux
	l.CgroupsPath = "/pod/" + key(t.ID, "")
	l.Sysctl, l.IntelRdt, l.MountLabel, l.UIDMappings, l.GIDMappings = nil, nil, "", nil, nil
	var kept []specs.LinuxNamespace
	for _, n := range l.Namespaces {
		switch {
		case n.Type == specs.PIDNamespace && n.Path == "", n.Type == specs.MountNamespace:
			n.Path = ""
		case n.Type == specs.PIDNamespace && t.TargetTask != "":
			n.Path = guest.TaskPIDNamespace(t.TargetTask)
		case n.Type == specs.PIDNamespace && s.record().SharePID:
			n.Path = guest.PodPIDNamespace
		case n.Type == specs.PIDNamespace && n.Path == fmt.Sprintf("/proc/%d/ns/pid", s.record().Machine.Pid):
			n.Path = "" // QEMU holds the sandbox, but no namespace of it
		case n.Type == specs.PIDNamespace:
			return fmt.Errorf("the PID namespace %s is not in the machine: %w", n.Path, errdefs.ErrInvalidArgument)
		default: // the pod's namespaces are those of the machine
			continue
		}
		kept = append(kept, n)
	}
	// Guests have cgroup v2, where a container sees its own cgroup alone,
	// whatever the node has.
	l.Namespaces = append(kept, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	if l.Resources != nil {
		adaptResources(l.Resources)
	}
	return nil
}

// adaptResources takes out what names the node's processors, memory nodes and
// devices.
func adaptResources(r *specs.LinuxResources) {
	r.BlockIO, r.Network, r.HugepageLimits, r.Rdma = nil, nil, nil, nil
	if r.CPU != nil {
		r.CPU.Cpus, r.CPU.Mems, r.CPU.RealtimePeriod, r.CPU.RealtimeRuntime = "", "", nil, nil
	}
	for k := range r.Unified {
		if strings.HasPrefix(k, "cpuset.") || strings.HasPrefix(k, "io.") || strings.HasPrefix(k, "hugetlb.") {
			delete(r.Unified, k)
		}
	}
}

// adaptProcess takes out labels of security modules that the guest has not.
func adaptProcess(p *specs.Process) { p.ApparmorProfile, p.SelinuxLabel = "", "" }

// guestProcess adapts the process of an exec; what cannot be read is the
// guest's runtime's to refuse.
func guestProcess(b []byte) []byte {
	var p specs.Process
	if json.Unmarshal(b, &p) != nil {
		return b
	}
	adaptProcess(&p)
	out, err := json.Marshal(&p)
	if err != nil {
		return b
	}
	return out
}

// guestResources adapts an update.
func guestResources(b []byte) []byte {
	var r specs.LinuxResources
	if json.Unmarshal(b, &r) != nil {
		return b
	}
	adaptResources(&r)
	out, err := json.Marshal(&r)
	if err != nil {
		return b
	}
	return out
}
