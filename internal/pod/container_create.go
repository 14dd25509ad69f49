package pod

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/image"
	"cloister.dev/internal/oci"
	"cloister.dev/internal/osutil"
)

// CreateContainer makes a container in the sandbox and gives its id: root file
// system, volumes and specification, no process yet. When the caller gives up
// the work goes on, and a repeat with the same configuration gets its result.
func (s *Service) CreateContainer(ctx context.Context, sandboxID string, cfg *runtimeapi.ContainerConfig, sandboxCfg *runtimeapi.PodSandboxConfig) (string, error) {
	sb, err := s.index.sandbox(sandboxID)
	if err != nil {
		return "", err
	}
	pod := sb.get()
	if pod.State != runtimeapi.PodSandboxState_SANDBOX_READY {
		return "", fmt.Errorf("pod sandbox %.13s is not ready (it was stopped), run a new one: %w", pod.ID, errdefs.ErrFailedPrecondition)
	}
	if err := sb.usable(ctx); err != nil {
		return "", err
	}
	if err := oci.ValidateContainer(cfg, pod.Config, s.o.Node); err != nil {
		return "", err
	}
	img, err := s.image(ctx, sb, cfg.GetImage().GetImage())
	if err != nil {
		return "", fmt.Errorf("image of container %q: %w", cfg.Metadata.Name, err)
	}
	hash, err := hashOf(cfg)
	if err != nil {
		return "", err
	}
	sb.handler.Expect()
	return s.create(ctx, "container", containerName(pod.ID, cfg.Metadata), hash, func(ctx context.Context, id string, stage func(string)) error {
		return s.makeContainer(ctx, sb, img, s.newContainer(sb, id, hash, cfg, img), stage)
	})
}

// image finds the image that a name means in the sandbox: handlers may have
// their images for another platform, or unpacked elsewhere.
func (s *Service) image(ctx context.Context, sb *sandbox, name string) (image.Image, error) {
	return s.o.Images.GetFor(ctx, name, sb.handler.Runtime.Snapshotter, sb.handler.Runtime.Platform)
}

func (s *Service) newContainer(sb *sandbox, id, hash string, cfg *runtimeapi.ContainerConfig, img image.Image) *container {
	pod := sb.get()
	c := &container{op: newOpLock(), handler: sb.handler, ended: newMilestone(), deleted: newMilestone()}
	c.rec = containerRecord{
		Name: containerName(pod.ID, cfg.Metadata), Hash: hash, Phase: creating,
		Container: Container{
			ID: id, SandboxID: pod.ID, Config: cfg, ImageID: img.ID, State: runtimeapi.ContainerState_CONTAINER_CREATED,
			CreatedAt: time.Now(), Handler: pod.Handler, Bundle: s.containerDir(id), Mounts: cfg.Mounts,
			Resources: &runtimeapi.ContainerResources{Linux: cfg.GetLinux().GetResources()},
		},
	}
	first := c.rec
	c.snap.Store(&first)
	return c
}

// makeContainer does the steps of a creation. It holds the container's
// operation lock: who finds the container waits until it is whole.
func (s *Service) makeContainer(ctx context.Context, sb *sandbox, img image.Image, c *container, stage func(string)) (err error) {
	if err := c.op.lock(ctx); err != nil {
		return err
	}
	defer c.op.unlock()
	var undo osutil.Undo
	defer undo.Run(ctx, &err)

	logPath, err := oci.LogPath(c.record().Config, sb.record().Config)
	if err != nil {
		return err
	}
	if err := s.changeContainer(c, func(r *containerRecord) { r.LogPath = logPath }); err != nil {
		return err
	}
	undo.Add("take the half-made container down", func(ctx context.Context) error {
		err := s.discardContainer(ctx, c)
		if err != nil { // its lock is ours until we return
			s.work.Go(func() {
				s.inBackground(c.op, c.record().ID, func(ctx context.Context) error { return s.discardContainer(ctx, c) })
			})
		}
		return err
	})

	in, err := s.makeFiles(ctx, sb, img, c, stage)
	if err != nil {
		return err
	}
	stage("writing the specification")
	release := s.o.NRI.Hold()
	defer release()
	res, err := s.writeSpec(ctx, sb, c, in)
	if err != nil {
		return err
	}
	err = s.changeContainer(c, func(r *containerRecord) {
		r.Phase, r.User, r.StopSignal, r.Signal = ready, res.User, oci.CRISignal(res.StopSignal), res.StopSignal
	})
	if err != nil {
		return err
	}
	// Who stops the sandbox either finds the container in the index, or has
	// changed the sandbox's state before.
	s.index.addContainer(c)
	if sb.get().State != runtimeapi.PodSandboxState_SANDBOX_READY {
		return fmt.Errorf("pod sandbox %.13s was stopped meanwhile: %w", sb.record().ID, errdefs.ErrFailedPrecondition)
	}
	undo.Release()
	stage("made")
	if s.o.NRI.Active() {
		s.tell("PostCreateContainer", c.record().ID, s.o.NRI.PostCreate(ctx, s.describePod(sb), s.describeContainer(c, res.Spec)))
	}
	s.emit(runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT, c.record().ID, sb.record().ID)
	return nil
}

// discardContainer takes down a container that its client never got. When it
// fails, the record stays for a repeat.
func (s *Service) discardContainer(ctx context.Context, c *container) error {
	if c.removed() {
		return nil
	}
	if c.announced {
		s.tellRemoval(ctx, c)
	}
	if c.phase() == ready { // others may have found it already
		if err := s.changeContainer(c, func(r *containerRecord) { r.Phase = removing }); err != nil {
			return err
		}
		c.ended.pass()
		c.deleted.pass()
	}
	if err := s.releaseFiles(ctx, c); err != nil {
		return err
	}
	return s.dropContainer(c)
}

// makeFiles prepares all files that the specification refers to.
func (s *Service) makeFiles(ctx context.Context, sb *sandbox, img image.Image, c *container, stage func(string)) (in oci.Input, err error) {
	stage("making the root file system")
	rootfs, err := s.makeRootfs(ctx, sb, c, img)
	if err != nil {
		return in, err
	}
	stage("preparing volumes")
	if in, err = s.specInput(sb, c, img, rootfs); err != nil {
		return in, err
	}
	if in.Volumes, err = s.makeVolumes(sb, c, img, rootfs); err != nil {
		return in, err
	}
	if in.ImageVolumes, err = s.makeImageVolumes(ctx, sb, c); err != nil {
		return in, err
	}
	in.Config, err = prepareMounts(c.record().Config)
	return in, err
}

func (s *Service) writeSpec(ctx context.Context, sb *sandbox, c *container, in oci.Input) (*oci.Result, error) {
	res, err := oci.Container(in)
	if err != nil {
		return nil, err
	}
	if err := s.adjust(ctx, sb, c, res.Spec); err != nil {
		return nil, err
	}
	for _, w := range res.Warnings {
		s.log.Warn("container is not all that was asked for", "container", c.record().ID, "reason", w)
	}
	if err := relabel(res); err != nil {
		return nil, err
	}
	spec, err := json.Marshal(res.Spec)
	if err != nil {
		return nil, fmt.Errorf("encode the specification: %w", err)
	}
	if err := os.WriteFile(filepath.Join(c.record().Bundle, "config.json"), spec, 0o600); err != nil {
		return nil, fmt.Errorf("write the specification: %w", err)
	}
	return res, nil
}

// makeRootfs prepares and mounts the container's root file system in its
// bundle, where the specification's user is looked up and the OCI runtime
// finds it.
func (s *Service) makeRootfs(ctx context.Context, sb *sandbox, c *container, img image.Image) (string, error) {
	rootfs := filepath.Join(c.record().Bundle, "rootfs")
	err := makeClosed(c.record().Bundle, rootOf(sb.record().GIDs))
	if err == nil {
		err = os.Mkdir(rootfs, 0o711)
	}
	if err != nil {
		return "", fmt.Errorf("make the container's bundle: %w", err)
	}
	o := image.RootfsOptions{Snapshotter: sb.handler.Runtime.Snapshotter, Volatile: true,
		UIDs: imageMappings(sb.record().UIDs), GIDs: imageMappings(sb.record().GIDs)}
	mounts, err := s.o.Images.PrepareRootfs(ctx, c.record().ID, img, o)
	if err != nil {
		return "", fmt.Errorf("root file system of container %q from image %s: %w", c.record().Config.Metadata.Name, img.ID, err)
	}
	if err := mount.All(mounts, rootfs); err != nil {
		return "", fmt.Errorf("mount the root file system: %w", err)
	}
	return rootfs, nil
}

func (s *Service) specInput(sb *sandbox, c *container, img image.Image, rootfs string) (oci.Input, error) {
	ns, err := s.containerNamespaces(sb, c)
	if err != nil {
		return oci.Input{}, err
	}
	dir := s.podDir(sb.record().ID)
	f := sb.handler.Supports()
	rt := sb.handler.Runtime
	in := oci.Input{
		ID: c.record().ID, SandboxID: sb.record().ID, Sandbox: sb.get().Config, Config: c.record().Config,
		Image: img.Config, ImageName: imageName(c.record().Config), Rootfs: rootfs, Node: s.o.Node,
		CgroupParent: sb.record().CgroupParent,
		SandboxLabel: sb.record().ProcessLabel,
		Namespaces:   ns,
		Files: oci.Files{ResolvConf: filepath.Join(dir, "resolv.conf"), Hostname: filepath.Join(dir, "hostname"),
			Hosts: filepath.Join(dir, "hosts"), Shm: filepath.Join(dir, "shm")},
		Handler: oci.Handler{Name: sb.handler.Name, OCIVersion: f.OCIVersion, SystemdCgroup: rt.SystemdCgroup,
			RecursiveReadOnly: f.RecursiveReadOnly, IDMappedMounts: f.IDMappedMounts,
			PrivilegedWithoutHostDevices: rt.NoHostDevices, PrivilegedAllDevices: rt.AllDevices, CgroupWritable: rt.CgroupWritable, PodAnnotations: rt.PodAnnotations,
			ContainerAnnotations: rt.CtrAnnotations, BaseSpec: rt.BaseSpec,
			ReadOnlyMounts: rt.ReadOnlyMounts, Rlimits: rt.Rlimits},
	}
	if in.Namespaces.IPC == "" {
		in.Files.Shm = "/dev/shm"
	}
	return in, nil
}

func (s *Service) containerNamespaces(sb *sandbox, c *container) (oci.Namespaces, error) {
	n := sandboxNamespaces(s.podDir(sb.record().ID), sb)
	o := c.record().Config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	var ns oci.Namespaces
	if n.net {
		ns.Net = n.path("net")
	}
	if n.ipc {
		ns.IPC = n.path("ipc")
	}
	if n.uts {
		ns.UTS = n.path("uts")
	}
	if n.user {
		ns.User = n.path("user")
		u := userNamespace(sb.record().Config)
		ns.UIDs, ns.GIDs = u.Uids, u.Gids
	}
	switch o.GetPid() {
	case runtimeapi.NamespaceMode_POD:
		if pid := sb.get().Pid; pid != 0 {
			ns.PID = fmt.Sprintf("/proc/%d/ns/pid", pid)
		} else {
			ns.PrivatePID = true
		}
	case runtimeapi.NamespaceMode_CONTAINER:
		ns.PrivatePID = true
	case runtimeapi.NamespaceMode_TARGET:
		t, err := s.index.container(o.GetTargetId())
		if err != nil {
			return ns, fmt.Errorf("target of the PID namespace: %w", err)
		}
		v := t.get()
		if v.SandboxID != sb.record().ID {
			return ns, fmt.Errorf("target %.13s of the PID namespace is in another pod: %w", v.ID, errdefs.ErrInvalidArgument)
		}
		if v.State != runtimeapi.ContainerState_CONTAINER_RUNNING || v.Pid == 0 {
			return ns, fmt.Errorf("target %.13s of the PID namespace does not run: %w", v.ID, errdefs.ErrFailedPrecondition)
		}
		ns.PID = fmt.Sprintf("/proc/%d/ns/pid", v.Pid)
	case runtimeapi.NamespaceMode_NODE: // what an empty path stands for
	}
	return ns, nil
}

// imageName is how the client called the image, for annotations and status.
func imageName(cfg *runtimeapi.ContainerConfig) string {
	if n := cfg.GetImage().GetUserSpecifiedImage(); n != "" {
		return n
	}
	return cfg.GetImage().GetImage()
}

func imageMappings(ms []idMapping) []specs.LinuxIDMapping {
	var out []specs.LinuxIDMapping
	for _, m := range ms {
		out = append(out, specs.LinuxIDMapping{ContainerID: m.Container, HostID: m.Host, Size: m.Length})
	}
	return out
}
