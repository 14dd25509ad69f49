package pod

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/wrapperspb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/network"
	"cloister.dev/internal/oci"
	"cloister.dev/internal/osutil"
	"cloister.dev/internal/shim"
)

// RunSandbox makes a pod sandbox on the handler ("" is the default one) and
// gives its id. When the caller gives up, the work goes on, and a repeat with
// the same configuration gets its result.
func (s *Service) RunSandbox(ctx context.Context, cfg *runtimeapi.PodSandboxConfig, handler string) (string, error) {
	if err := oci.ValidateSandbox(cfg, s.o.Node); err != nil {
		return "", err
	}
	name, err := s.handlerName(cfg, handler)
	if err != nil {
		return "", err
	}
	h, err := s.o.Shims.Handler(ctx, name)
	if err != nil {
		return "", err
	}
	if userNamespace(cfg) != nil && !h.Supports().UserNamespaces {
		return "", fmt.Errorf("handler %q cannot run pods in a user namespace (%s): %w", h.Name, h.Supports().Version, errdefs.ErrInvalidArgument)
	}
	hash, err := hashOf(cfg, wrapperspb.String(handler))
	if err != nil {
		return "", err
	}
	id, err := s.create(ctx, sandboxObject, sandboxName(cfg.Metadata), hash, func(ctx context.Context, id string, stage func(string)) error {
		return s.makeSandbox(ctx, s.newSandbox(id, hash, cfg, handler, h), stage)
	})
	if err != nil {
		return "", err
	}
	if sb, err := s.index.sandbox(id); err != nil || sb.get().State != runtimeapi.PodSandboxState_SANDBOX_READY {
		return "", fmt.Errorf("pod sandbox %s was made before as %.13s and is stopped; remove it or raise the attempt number: %w",
			sandboxName(cfg.Metadata), id, errdefs.ErrAlreadyExists)
	}
	return id, nil
}

func (s *Service) newSandbox(id, hash string, cfg *runtimeapi.PodSandboxConfig, handler string, h *shim.Handler) *sandbox {
	sb := &sandbox{op: newOpLock(), handler: h}
	rec := &sb.rec
	ns := cfg.GetLinux().GetSecurityContext().GetNamespaceOptions()
	*rec = sandboxRecord{
		Name: sandboxName(cfg.Metadata), Hash: hash, HandlerName: h.Name, Runtime: h.Runtime, Whole: true, Phase: creating,
		Sysctls:  oci.Sysctls(cfg, s.o.Node),
		SharePID: ns.GetPid() == runtimeapi.NamespaceMode_POD,
		Sandbox: Sandbox{
			ID: id, Config: cfg, Handler: handler, CreatedAt: time.Now(), State: runtimeapi.PodSandboxState_SANDBOX_NOTREADY,
			Bundle: s.podDir(id), Overhead: cfg.GetLinux().GetOverhead(), Resources: cfg.GetLinux().GetResources(),
		},
	}
	if rec.CgroupParent = cfg.GetLinux().GetCgroupParent(); rec.CgroupParent == "" && !h.Runtime.SystemdCgroup {
		rec.CgroupParent = s.o.CgroupParent
	}
	if ns.GetNetwork() != runtimeapi.NamespaceMode_NODE {
		rec.NetNS, rec.NetworkUp = s.netNSPath(id), true
	}
	if u := userNamespace(cfg); u != nil {
		rec.UIDs, rec.GIDs = mappings(u.Uids), mappings(u.Gids)
	}
	first := *rec
	sb.snap.Store(&first)
	return sb
}

// makeSandbox does the steps of a creation. On error they are undone by what a
// recovery would do, which finds everything by the sandbox's id and keeps the
// record, and the intent in it, until nothing is left.
func (s *Service) makeSandbox(ctx context.Context, sb *sandbox, stage func(string)) (err error) {
	id := sb.record().ID
	var process, mount string // SELinux labels
	var undo osutil.Undo
	defer undo.Run(ctx, &err)

	if s.o.Node.SELinux {
		if process, mount, err = oci.SELinuxLabels(sb.record().Config.GetLinux().GetSecurityContext().GetSelinuxOptions()); err != nil {
			return err
		}
	}
	if err := s.changeSandbox(sb, func(r *sandboxRecord) { r.ProcessLabel, r.MountLabel = process, mount }); err != nil {
		return err
	}
	undo.Add("take the half-made pod down", func(ctx context.Context) error { return s.discardSandbox(ctx, sb) })

	stage("making namespaces")
	if err := s.makeFolder(sb); err != nil {
		return err
	}

	attached, err := s.attachNetwork(ctx, sb, stage)
	if err != nil {
		return err
	}

	stage("starting the sandbox on its shim")
	pid, err := s.startOnShim(ctx, sb)
	if err != nil {
		return err
	}
	release := s.o.NRI.Hold()
	defer release()
	if s.o.NRI.Active() {
		stage("asking plugins")
		pod := s.nriPod(sb, attached.IPs, pid)
		undo.Add("tell plugins that there will be no pod", func(ctx context.Context) error { return s.o.NRI.RemovePod(ctx, pod) })
		if err := s.o.NRI.RunPod(ctx, pod); err != nil {
			return err
		}
	}
	stage("writing the record")
	if err := s.changeSandbox(sb, func(r *sandboxRecord) {
		r.Phase, r.Pid, r.IPs, r.Network = ready, pid, attached.IPs, attached.Raw
	}); err != nil {
		return err
	}
	s.index.addSandbox(sb)
	undo.Release()
	stage("made")
	s.watchHolder(sb)
	s.emit(runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT, id, id)
	s.emit(runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT, id, id)
	return nil
}

// discardSandbox takes down a sandbox that its client never got, in the
// background when that fails at first.
func (s *Service) discardSandbox(ctx context.Context, sb *sandbox) error {
	err := s.takeDown(ctx, sb)
	if err != nil {
		s.inBackground(sb.op, sb.record().ID, func(ctx context.Context) error { return s.takeDown(ctx, sb) })
	}
	return err
}

// attachNetwork gives a pod that has a network of its own its interface.
func (s *Service) attachNetwork(ctx context.Context, sb *sandbox, stage func(string)) (attached *network.Result, err error) {
	if !sb.record().NetworkUp {
		return &network.Result{}, nil
	}
	stage("attaching the network")
	err = timed(s.o.Observer.Network, "attach", func() (err error) {
		attached, err = s.o.Network.Attach(ctx, s.networkRequest(sb))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("attach pod %s to the network: %w", sb.record().Name, err)
	}
	return attached, nil
}

func (s *Service) startOnShim(ctx context.Context, sb *sandbox) (pid uint32, err error) {
	err = timed(s.o.Observer.Shim, "start sandbox", func() error {
		pid, err = sb.handler.StartSandbox(ctx, s.shimRequest(sb))
		return err
	})
	return pid, err
}

// usable tells why nothing can be started in the sandbox any more, if so.
// After it, the handler's features are known, of a recovered sandbox too.
func (sb *sandbox) usable(ctx context.Context) error {
	if sb.handler.Usable() {
		_, err := sb.handler.Features(ctx)
		return err
	}
	return fmt.Errorf("handler %q of pod sandbox %.13s is not configured any more, it can only be stopped and removed: %w",
		sb.handler.Name, sb.record().ID, errdefs.ErrFailedPrecondition)
}

// makeFolder makes what of the sandbox lives in its folder: namespaces, shm
// and the files under /etc.
func (s *Service) makeFolder(sb *sandbox) error {
	dir := s.podDir(sb.record().ID)
	if err := mountFolder(dir, rootOf(sb.record().GIDs)); err != nil {
		return err
	}
	n := sandboxNamespaces(dir, sb)
	if err := n.pin(); err != nil {
		return err
	}
	uid, gid := rootOf(sb.record().UIDs), rootOf(sb.record().GIDs)
	if n.ipc {
		if err := mountShm(filepath.Join(dir, "shm"), uid, gid, sb.record().MountLabel); err != nil {
			return err
		}
	}
	return writeFiles(dir, sb.record().Config, uid, gid)
}

func sandboxNamespaces(dir string, sb *sandbox) namespaces {
	o := sb.record().Config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	node := runtimeapi.NamespaceMode_NODE
	return namespaces{
		dir: filepath.Join(dir, "ns"), netPath: sb.record().NetNS,
		net:  o.GetNetwork() != node,
		uts:  o.GetNetwork() != node, // the node's network goes with the node's name
		ipc:  o.GetIpc() != node,
		user: len(sb.record().UIDs) > 0, uids: sb.record().UIDs, gids: sb.record().GIDs,
		hostname: hostname(sb.record().Config),
		sysctls:  sb.record().Sysctls,
	}
}

func (s *Service) shimRequest(sb *sandbox) shim.SandboxRequest {
	n := sandboxNamespaces(s.podDir(sb.record().ID), sb)
	r := shim.SandboxRequest{ID: sb.record().ID, Bundle: s.podDir(sb.record().ID), NetNS: sb.record().NetNS, SharePID: sb.record().SharePID,
		Annotations: sb.record().Config.Annotations, ForeignConfig: sb.record().Config}
	if n.user {
		r.UserNS = n.path("user")
	}
	if parent := sb.record().Config.GetLinux().GetCgroupParent(); parent != "" && sb.record().SharePID && !sb.handler.Runtime.SystemdCgroup && !s.o.Node.CgroupDisabled {
		r.Cgroup = filepath.Join(parent, sb.record().ID)
	}
	if sb.handler.Machine() {
		s.describeMachine(sb, n, &r)
	}
	return r
}

// describeMachine adds what a pod with a kernel of its own has to do inside it.
func (s *Service) describeMachine(sb *sandbox, n namespaces, r *shim.SandboxRequest) {
	rec := sb.record()
	o := rec.Config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	r.HostNetwork, r.HostIPC, r.HostPID = !n.net, !n.ipc, o.GetPid() == runtimeapi.NamespaceMode_NODE
	r.Hostname, r.Sysctls = n.hostname, rec.Sysctls
	if parent := oci.ParentCgroup(rec.CgroupParent); parent != "" {
		r.Cgroup = filepath.Join(parent, rec.ID)
	}
	limits := rec.Resources
	r.CPUQuota, r.CPUPeriod, r.MemoryLimit = limits.GetCpuQuota(), limits.GetCpuPeriod(), limits.GetMemoryLimitInBytes()
}

// watchHolder turns the sandbox not ready when the process that it depends on
// ends, the holder of its shared PID namespace, a shim of its own or a virtual
// machine: nothing can be started in it any more.
func (s *Service) watchHolder(sb *sandbox) {
	if h := sb.handler; h == nil || !h.External() && !h.Machine() && (sb.get().Pid == 0 || !sb.record().SharePID) {
		return
	}
	s.work.Go(func() {
		err := sb.handler.WaitSandbox(s.ctx, sb.record().ID, s.podDir(sb.record().ID))
		if err != nil {
			if s.ctx.Err() == nil {
				s.log.Warn("cannot watch the sandbox's holder", "sandbox", sb.record().ID, "err", err)
			}
			return
		}
		if sb.get().State != runtimeapi.PodSandboxState_SANDBOX_READY {
			return
		}
		s.log.Warn("the process that the pod depends on ended", "sandbox", sb.record().ID)
		if err := s.changeSandbox(sb, func(r *sandboxRecord) {
			if r.Phase == ready {
				r.Phase = stopping
			}
		}); err != nil {
			s.log.Error("note the end of a sandbox", "sandbox", sb.record().ID, "err", err)
		}
	})
}

func (s *Service) networkRequest(sb *sandbox) network.Request {
	cfg := sb.record().Config
	r := network.Request{
		ID: sb.record().ID, Handler: sb.handler.Name, Namespace: cfg.Metadata.Namespace, Name: cfg.Metadata.Name, UID: cfg.Metadata.Uid, NetNS: sb.record().NetNS,
		CgroupPath: cfg.GetLinux().GetCgroupParent(), Labels: cfg.Labels, Annotations: cfg.Annotations, Cached: sb.record().Network,
		Bandwidth: bandwidth(cfg.Annotations),
	}
	for _, p := range cfg.PortMappings {
		if p.HostPort == 0 {
			continue
		}
		m := network.PortMapping{Protocol: protocol(p.Protocol), ContainerPort: uint16(p.ContainerPort), HostPort: uint16(p.HostPort)}
		m.HostIP, _ = netip.ParseAddr(p.HostIp) // validated; empty means all addresses
		r.Ports = append(r.Ports, m)
	}
	if d := cfg.DnsConfig; d != nil {
		r.DNS = &network.DNS{Servers: d.Servers, Searches: d.Searches, Options: d.Options}
	}
	return r
}

func protocol(p runtimeapi.Protocol) string {
	switch p {
	case runtimeapi.Protocol_UDP:
		return "udp"
	case runtimeapi.Protocol_SCTP:
		return "sctp"
	default:
		return "tcp"
	}
}

func userNamespace(cfg *runtimeapi.PodSandboxConfig) *runtimeapi.UserNamespace {
	u := cfg.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions()
	if u == nil || u.Mode != runtimeapi.NamespaceMode_POD {
		return nil
	}
	return u
}

func mappings(ms []*runtimeapi.IDMapping) []idMapping {
	var out []idMapping
	for _, m := range ms {
		out = append(out, idMapping{Container: m.ContainerId, Host: m.HostId, Length: m.Length})
	}
	return out
}

// rootOf gives the node's id of the namespace's root, itself 0 without one.
func rootOf(ms []idMapping) uint32 {
	for _, m := range ms {
		if m.Container == 0 {
			return m.Host
		}
	}
	return 0
}
