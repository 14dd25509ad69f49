package pod

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/containerd/nri/pkg/api"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/nri"
	"cloister.dev/internal/oci"
)

// What plugins are told. Where nothing else is said, a plugin's error is its
// own affair: it is noted, and what happens goes on.

// nriTime bounds what is done for plugins when nobody waits for it.
const nriTime = 30 * time.Second

func (s *Service) tell(what, id string, err error) {
	if err != nil {
		s.log.Warn("an NRI plugin failed", "event", what, "id", id, "err", err)
	}
}

// nriPod describes a sandbox. ips stand in for those that a record has not yet.
func (s *Service) nriPod(sb *sandbox, ips []netip.Addr, pid uint32) *api.PodSandbox {
	r := sb.record()
	cfg := r.Config
	p := &api.PodSandbox{
		Id: r.ID, Name: cfg.Metadata.Name, Uid: cfg.Metadata.Uid, Namespace: cfg.Metadata.Namespace,
		Labels: cfg.Labels, Annotations: cfg.Annotations, RuntimeHandler: r.Handler, Pid: pid,
		Linux: &api.LinuxPodSandbox{
			PodOverhead: nri.Resources(r.Overhead), PodResources: nri.Resources(r.Resources), CgroupParent: cfg.GetLinux().GetCgroupParent(),
		},
	}
	for _, ip := range ips {
		p.Ips = append(p.Ips, ip.String())
	}
	n := sandboxNamespaces(s.podDir(r.ID), sb)
	for _, kind := range n.pins() {
		if kind == "net" {
			p.Linux.Namespaces = append(p.Linux.Namespaces, &api.LinuxNamespace{Type: string(specs.NetworkNamespace), Path: n.path(kind)})
		} else {
			p.Linux.Namespaces = append(p.Linux.Namespaces, &api.LinuxNamespace{Type: kind, Path: n.path(kind)})
		}
	}
	return p
}

func (s *Service) describePod(sb *sandbox) *api.PodSandbox {
	return s.nriPod(sb, sb.record().IPs, sb.record().Pid)
}

// podOf describes the pod of a container; a pod that is gone has only its id.
func (s *Service) podOf(c *container) *api.PodSandbox {
	sb, err := s.index.sandbox(c.record().SandboxID)
	if err != nil {
		return &api.PodSandbox{Id: c.record().SandboxID}
	}
	return s.describePod(sb)
}

// describeContainer describes a container by its record and, when there is
// one, its specification.
func (s *Service) describeContainer(c *container, spec *specs.Spec) *api.Container {
	r := c.record()
	out := &api.Container{
		Id: r.ID, PodSandboxId: r.SandboxID, Name: r.Config.Metadata.Name, Labels: r.Config.Labels, Annotations: r.Config.Annotations,
		Pid: r.Pid, CreatedAt: r.CreatedAt.UnixNano(), ExitCode: r.ExitCode, StatusReason: r.Reason, StatusMessage: r.Message,
		Image: &api.Image{Name: imageName(r.Config), ConfigDigest: r.ImageID},
	}
	if !r.StartedAt.IsZero() {
		out.StartedAt = r.StartedAt.UnixNano()
	}
	switch r.Phase {
	case running:
		out.State = api.ContainerState_CONTAINER_RUNNING
	case exited, removing:
		out.State, out.FinishedAt = api.ContainerState_CONTAINER_STOPPED, r.FinishedAt.UnixNano()
	case creating, ready:
		out.State = api.ContainerState_CONTAINER_CREATED
	}
	if spec == nil {
		spec, _ = readSpec(r.Bundle) // a container that is being removed has none
	}
	if spec != nil {
		nri.DescribeSpec(out, spec)
	}
	nri.DescribeConfig(out, r.Config)
	return out
}

// adjust lets plugins change the specification of a container that is being
// made, or refuse it.
func (s *Service) adjust(ctx context.Context, sb *sandbox, c *container, spec *specs.Spec) error {
	if !s.o.NRI.Active() {
		return nil
	}
	c.announced = true
	r, err := s.o.NRI.Create(ctx, s.describePod(sb), s.describeContainer(c, spec))
	if err != nil {
		return err
	}
	if err := oci.Adjust(spec, r.GetAdjust(), s.o.Node); err != nil {
		return err
	}
	return s.followPlugins(ctx, r.GetUpdate(), r.GetEvict())
}

// followPlugins updates and ends other containers as plugins ask for the sake
// of one.
func (s *Service) followPlugins(ctx context.Context, updates []*api.ContainerUpdate, evict []*api.ContainerEviction) error {
	for _, u := range s.NRIUpdate(ctx, updates) {
		return fmt.Errorf("an NRI plugin's update of container %.13s failed, the log says why", u.ContainerId)
	}
	for _, e := range evict {
		c, err := s.index.container(e.ContainerId)
		if err != nil {
			continue
		}
		s.log.Warn("an NRI plugin ends a container", "container", e.ContainerId, "reason", e.Reason)
		s.work.Go(func() {
			ctx, cancel := context.WithTimeout(s.ctx, killTime)
			defer cancel()
			if err := s.stopContainer(ctx, c, 0); err != nil {
				s.log.Warn("end a container for an NRI plugin", "container", c.record().ID, "err", err)
			}
		})
	}
	return nil
}

// NRIState is part of nri.Runtime.
func (s *Service) NRIState() ([]*api.PodSandbox, []*api.Container) {
	var pods []*api.PodSandbox
	var containers []*api.Container
	for _, sb := range s.index.allSandboxes() {
		if sb.phase() != ready {
			continue
		}
		pods = append(pods, s.describePod(sb))
		for _, c := range s.index.containersOf(sb.record().ID) {
			if p := c.phase(); p == ready || p == running {
				containers = append(containers, s.describeContainer(c, nil))
			}
		}
	}
	return pods, containers
}

// NRIUpdate is part of nri.Runtime.
func (s *Service) NRIUpdate(ctx context.Context, updates []*api.ContainerUpdate) []*api.ContainerUpdate {
	var failed []*api.ContainerUpdate
	for _, u := range updates {
		if u == nil {
			continue
		}
		if err := s.applyUpdate(ctx, u); err != nil && !u.IgnoreFailure {
			s.log.Warn("update a container for an NRI plugin", "container", u.ContainerId, "err", err)
			failed = append(failed, u)
		}
	}
	return failed
}

func (s *Service) applyUpdate(ctx context.Context, u *api.ContainerUpdate) error {
	ctx, cancel := context.WithTimeout(ctx, nriTime)
	defer cancel()
	c, err := s.lockedContainer(ctx, u.ContainerId)
	if err != nil {
		return err
	}
	defer c.op.unlock()
	if p := c.phase(); p != ready && p != running {
		return nil
	}
	spec, err := readSpec(c.record().Bundle)
	if err != nil {
		return err
	}
	res, err := oci.AdjustResources(spec, u.GetLinux().GetResources(), s.o.Node)
	if err != nil {
		return err
	}
	return s.setResources(ctx, c, spec, res, nil)
}

// adjustUpdate lets plugins change resources that a container is about to get.
func (s *Service) adjustUpdate(ctx context.Context, c *container, spec *specs.Spec, r *runtimeapi.LinuxContainerResources, res *specs.LinuxResources) (*specs.LinuxResources, error) {
	if !s.o.NRI.Active() {
		return res, nil
	}
	resp, err := s.o.NRI.Update(ctx, s.podOf(c), s.describeContainer(c, spec), nri.Resources(r))
	if err != nil {
		return nil, err
	}
	var others []*api.ContainerUpdate
	for _, u := range resp.GetUpdate() {
		if u == nil { // the place of this container, for which no plugin wants anything
			continue
		}
		if u.ContainerId != c.record().ID {
			others = append(others, u)
			continue
		}
		changed := *spec
		linux := *spec.Linux
		linux.Resources, changed.Linux = res, &linux
		if res, err = oci.AdjustResources(&changed, u.GetLinux().GetResources(), s.o.Node); err != nil {
			return nil, err
		}
	}
	return res, s.followPlugins(ctx, others, resp.GetEvict())
}

// tellEnd tells plugins of a container that has ended, before anybody who
// waits for its end.
func (s *Service) tellEnd(c *container) {
	if !s.o.NRI.Active() {
		return
	}
	ctx, cancel := context.WithTimeout(s.ctx, nriTime)
	defer cancel()
	r, err := s.o.NRI.Stop(ctx, s.podOf(c), s.describeContainer(c, nil))
	if err == nil {
		err = s.followPlugins(ctx, r.GetUpdate(), nil)
	}
	s.tell("StopContainer", c.record().ID, err)
}

// tellRemoval tells plugins of a container that is being removed.
func (s *Service) tellRemoval(ctx context.Context, c *container) {
	if s.o.NRI.Active() {
		s.tell("RemoveContainer", c.record().ID, s.o.NRI.Remove(ctx, s.podOf(c), s.describeContainer(c, nil)))
	}
}
