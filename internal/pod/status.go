package pod

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"runtime"
	"strings"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/shim"
)

// SandboxStatus gives a sandbox in CRI's form.
func SandboxStatus(v Sandbox) *runtimeapi.PodSandboxStatus {
	st := &runtimeapi.PodSandboxStatus{
		Id: v.ID, Metadata: v.Config.Metadata, State: v.State, CreatedAt: v.CreatedAt.UnixNano(),
		Labels: v.Config.Labels, Annotations: v.Config.Annotations, RuntimeHandler: v.Handler,
		Linux: &runtimeapi.LinuxPodSandboxStatus{Namespaces: &runtimeapi.Namespace{
			Options: v.Config.GetLinux().GetSecurityContext().GetNamespaceOptions(),
		}},
		Network: &runtimeapi.PodSandboxNetworkStatus{},
	}
	for i, ip := range v.IPs {
		if i == 0 {
			st.Network.Ip = ip.String()
			continue
		}
		st.Network.AdditionalIps = append(st.Network.AdditionalIps, &runtimeapi.PodIP{Ip: ip.String()})
	}
	return st
}

// ContainerStatus gives a container in CRI's form.
func ContainerStatus(v Container) *runtimeapi.ContainerStatus {
	st := &runtimeapi.ContainerStatus{
		Id: v.ID, Metadata: v.Config.Metadata, State: v.State, CreatedAt: v.CreatedAt.UnixNano(),
		ExitCode: v.ExitCode, Image: v.Config.Image, ImageRef: v.ImageID, ImageId: v.ImageID,
		Reason: v.Reason, Message: v.Message, Labels: v.Config.Labels, Annotations: v.Config.Annotations,
		Mounts: v.Mounts, LogPath: v.LogPath, Resources: v.Resources, User: v.User, StopSignal: v.StopSignal,
	}
	if !v.StartedAt.IsZero() {
		st.StartedAt = v.StartedAt.UnixNano()
	}
	if !v.FinishedAt.IsZero() {
		st.FinishedAt = v.FinishedAt.UnixNano()
	}
	return st
}

// Status tells whether the daemon and its network can run pods, and what each
// handler offers.
func (s *Service) Status(ctx context.Context, verbose bool) (*runtimeapi.StatusResponse, error) {
	resp := &runtimeapi.StatusResponse{Status: &runtimeapi.RuntimeStatus{}, Features: &runtimeapi.RuntimeFeatures{SupplementalGroupsPolicy: true}}
	resp.Status.Conditions = s.conditions(ctx)
	def, err := s.o.Shims.Default(ctx)
	if err == nil {
		resp.RuntimeHandlers = append(resp.RuntimeHandlers, handlerStatus("", def.Supports()))
	}
	for _, h := range s.o.Shims.Handlers() {
		f, err := h.Features(ctx)
		if err != nil {
			return nil, err
		}
		if f.Works {
			resp.RuntimeHandlers = append(resp.RuntimeHandlers, handlerStatus(h.Name, f))
		}
	}
	if verbose {
		if resp.Info, err = s.statusInfo(ctx); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

func (s *Service) conditions(ctx context.Context) []*runtimeapi.RuntimeCondition {
	runtimeReady := &runtimeapi.RuntimeCondition{Type: runtimeapi.RuntimeReady, Status: true}
	if _, err := s.o.Shims.Default(ctx); err != nil {
		runtimeReady.Status, runtimeReady.Reason, runtimeReady.Message = false, "NoRuntimeWorks", err.Error()
	}
	networkReady := &runtimeapi.RuntimeCondition{Type: runtimeapi.NetworkReady, Status: true}
	if err := s.o.Network.Ready(); err != nil {
		networkReady.Status, networkReady.Reason, networkReady.Message = false, "NetworkPluginNotReady", err.Error()
	}
	all := []*runtimeapi.RuntimeCondition{runtimeReady, networkReady}
	if s.o.Conditions != nil {
		for _, c := range s.o.Conditions() {
			all = append(all, &runtimeapi.RuntimeCondition{Type: c.Type, Status: c.OK, Reason: c.Reason, Message: c.Message})
		}
	}
	return all
}

func (s *Service) statusInfo(ctx context.Context) (map[string]string, error) {
	handlers := map[string]any{}
	for _, h := range s.o.Shims.Handlers() {
		f, err := h.Features(ctx)
		if err != nil {
			return nil, err
		}
		handlers[h.Name] = map[string]any{"type": h.Runtime.Type, "works": f.Works, "reason": f.Reason, "path": f.Path,
			"version": f.Version, "ociVersion": f.OCIVersion, "probeMillis": f.Millis}
	}
	var config map[string]any
	if s.o.VerboseInfo != nil {
		config = s.o.VerboseInfo()
	}
	info := map[string]string{}
	for key, v := range map[string]any{"config": config, "handlers": handlers, "golang": runtime.Version(), "goroutines": runtime.NumGoroutine()} {
		b, err := json.Marshal(v)
		if err != nil {
			return nil, fmt.Errorf("encode the verbose status: %w", err)
		}
		info[key] = strings.Trim(string(b), `"`)
	}
	return info, nil
}

func handlerStatus(name string, f shim.Features) *runtimeapi.RuntimeHandler {
	return &runtimeapi.RuntimeHandler{Name: name, Features: &runtimeapi.RuntimeHandlerFeatures{
		RecursiveReadOnlyMounts: f.RecursiveReadOnly,
		UserNamespaces:          f.UserNamespaces && f.IDMappedMounts,
	}}
}

// CgroupDriver tells kubelet who names cgroups. All handlers of a node must
// agree, so the default one speaks for them.
func (s *Service) CgroupDriver(ctx context.Context) (runtimeapi.CgroupDriver, error) {
	h, err := s.o.Shims.Default(ctx)
	if err != nil {
		return 0, err
	}
	if h.Runtime.SystemdCgroup {
		return runtimeapi.CgroupDriver_SYSTEMD, nil
	}
	return runtimeapi.CgroupDriver_CGROUPFS, nil
}

// UpdatePodCIDR is told the node's pod ranges by kubelet, separated by commas,
// and passes them on to a network that wants them.
func (s *Service) UpdatePodCIDR(cidrs string) error {
	if cidrs == "" {
		return nil
	}
	var ranges []netip.Prefix
	for c := range strings.SplitSeq(cidrs, ",") {
		p, err := netip.ParsePrefix(strings.TrimSpace(c))
		if err != nil {
			return fmt.Errorf("pod_cidr %.200q: %w: %w", cidrs, err, errdefs.ErrInvalidArgument)
		}
		ranges = append(ranges, p.Masked())
	}
	if s.o.PodRanges == nil {
		s.log.Debug("kubelet's pod range is not used: the network's own configuration rules", "cidr", cidrs)
		return nil
	}
	return s.o.PodRanges(ranges)
}
