package plugin

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	v1beta1 "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"

	"cloister.dev/internal/tee"
)

// maxContainers bounds the containers of one request; kubelet asks for one.
const maxContainers = 256

// service answers kubelet's calls for one resource.
type service struct {
	v1beta1.UnimplementedDevicePluginServer
	e *endpoint
}

func (s *service) GetDevicePluginOptions(context.Context, *v1beta1.Empty) (*v1beta1.DevicePluginOptions, error) {
	return s.e.options(), nil
}

// options ask for a say in the choice of units only where there is a choice:
// kubelet sends all free ids with each such question.
func (e *endpoint) options() *v1beta1.DevicePluginOptions {
	return &v1beta1.DevicePluginOptions{GetPreferredAllocationAvailable: len(e.current().state.Parts) > 1}
}

// ListAndWatch sends the list, and sends it again whenever it changed. A slow
// kubelet gets the last list, not all of them.
func (s *service) ListAndWatch(_ *v1beta1.Empty, out grpc.ServerStreamingServer[v1beta1.ListAndWatchResponse]) error {
	e := s.e
	e.streams.Add(1)
	e.p.metrics.streams(e.name, 1)
	defer func() {
		e.streams.Add(-1)
		e.p.metrics.streams(e.name, -1)
		e.nudge()
	}()
	for {
		now := e.current()
		if err := out.SendMsg(now.encoded); err != nil {
			return err
		}
		e.p.log.Debug("told kubelet", "resource", e.name, "units", now.listed, "bytes", len(now.encoded))
		select {
		case <-now.outdated:
		case <-out.Context().Done():
			return nil
		}
	}
}

func (s *service) Allocate(ctx context.Context, r *v1beta1.AllocateRequest) (*v1beta1.AllocateResponse, error) {
	resp, err := s.allocate(ctx, r)
	s.e.p.metrics.allocated(s.e.name, err)
	if err != nil {
		s.e.p.log.Warn("allocation refused", "resource", s.e.name, "err", err)
		return nil, errgrpc.ToGRPC(err)
	}
	return resp, nil
}

func (s *service) allocate(ctx context.Context, r *v1beta1.AllocateRequest) (*v1beta1.AllocateResponse, error) {
	if n := len(r.GetContainerRequests()); n == 0 || n > maxContainers {
		return nil, fmt.Errorf("the request is for %d containers; it has to be 1…%d: %w", n, maxContainers, errdefs.ErrInvalidArgument)
	}
	resp := &v1beta1.AllocateResponse{}
	for _, c := range r.GetContainerRequests() {
		start := time.Now()
		ids := c.GetDevicesIds()
		if err := s.e.listed(ids); err != nil {
			return nil, err
		}
		grant, err := s.e.p.inv.Allocate(ctx, s.e.name, ids)
		if err != nil {
			return nil, err
		}
		answer := translate(grant)
		answer.CdiDevices = s.e.cdiDevices(ids)
		resp.ContainerResponses = append(resp.ContainerResponses, answer)
		s.e.p.log.Info("allocated", "resource", s.e.name, "units", len(ids), "ids", brief(ids),
			"devices", len(answer.GetDevices()), "mounts", len(answer.GetMounts()), "cdi", len(answer.GetCdiDevices()), "took", time.Since(start))
	}
	return resp, nil
}

// listed tells whether units were offered at all: those above the limit were not.
func (e *endpoint) listed(ids []string) error {
	now := e.current()
	if now.listed == now.state.Units() {
		return nil
	}
	for _, id := range ids {
		if !now.offers(id) {
			return fmt.Errorf("unit %q of %s was not offered, the limit is %d: %w", brief([]string{id}), e.name, now.listed, errdefs.ErrNotFound)
		}
	}
	return nil
}

// brief keeps log lines short.
func brief(ids []string) string {
	const few = 4
	shown := make([]string, 0, few)
	for _, id := range ids[:min(len(ids), few)] {
		shown = append(shown, id[:min(len(id), 63)])
	}
	s := strings.Join(shown, ",")
	if len(ids) > few {
		s += ",…"
	}
	return s
}

func translate(g tee.Grant) *v1beta1.ContainerAllocateResponse {
	a := &v1beta1.ContainerAllocateResponse{Envs: g.Env}
	for _, d := range g.Devices {
		a.Devices = append(a.Devices, &v1beta1.DeviceSpec{HostPath: d.Host, ContainerPath: d.Container, Permissions: d.Access})
	}
	for _, m := range g.Mounts {
		a.Mounts = append(a.Mounts, &v1beta1.Mount{HostPath: m.Host, ContainerPath: m.Container, ReadOnly: m.ReadOnly})
	}
	return a
}

// PreStartContainer is not asked for; a kubelet that calls it anyway learns
// whether the units can still be used.
func (s *service) PreStartContainer(_ context.Context, r *v1beta1.PreStartContainerRequest) (*v1beta1.PreStartContainerResponse, error) {
	if err := s.e.p.inv.Usable(s.e.name, r.GetDevicesIds()); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &v1beta1.PreStartContainerResponse{}, nil
}

// GetPreferredAllocation keeps a container's units together.
func (s *service) GetPreferredAllocation(_ context.Context, r *v1beta1.PreferredAllocationRequest) (*v1beta1.PreferredAllocationResponse, error) {
	if n := len(r.GetContainerRequests()); n > maxContainers {
		return nil, errgrpc.ToGRPC(fmt.Errorf("the request is for %d containers: %w", n, errdefs.ErrInvalidArgument))
	}
	state := s.e.current().state
	resp := &v1beta1.PreferredAllocationResponse{}
	for _, c := range r.GetContainerRequests() {
		ids, err := prefer(state.Resource, c.GetAvailableDeviceIDs(), c.GetMustIncludeDeviceIDs(), int(c.GetAllocationSize()))
		if err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
		resp.ContainerResponses = append(resp.ContainerResponses, &v1beta1.ContainerPreferredAllocationResponse{DeviceIDs: ids})
	}
	return resp, nil
}

// prefer chooses size units: first those that must be among them, then more of
// their parts, then the smallest part that holds the rest, else the largest ones.
func prefer(r tee.Resource, available, must []string, size int) ([]string, error) {
	if size < len(must) || size > len(available) {
		return nil, fmt.Errorf("%d units of %s, of %d available with %d that must be among them: %w", size, r.Name, len(available), len(must), errdefs.ErrInvalidArgument)
	}
	chosen := slices.Clone(must)
	taken := make(map[string]bool, len(must))
	of := make([][]string, len(r.Parts))
	favoured := make([]bool, len(r.Parts))
	for _, id := range must {
		taken[id] = true
		if at, _, ok := r.Find(id); ok {
			favoured[at] = true
		}
	}
	for _, id := range available {
		if at, _, ok := r.Find(id); ok && !taken[id] {
			of[at] = append(of[at], id)
		}
	}
	order := make([]int, len(r.Parts))
	for n := range order {
		order[n] = n
	}
	slices.SortStableFunc(order, func(a, b int) int { return rank(of, favoured, a, b, size-len(must)) })
	for _, at := range order {
		n := min(size-len(chosen), len(of[at]))
		chosen = append(chosen, of[at][:n]...)
	}
	if len(chosen) < size {
		return nil, fmt.Errorf("%d of the available units do not belong to %s: %w", size-len(chosen), r.Name, errdefs.ErrNotFound)
	}
	return chosen, nil
}

// rank orders two parts for the choice of need more units.
func rank(of [][]string, favoured []bool, a, b, need int) int {
	score := func(n int) int { // lower is better
		have := len(of[n])
		switch {
		case favoured[n]:
			return -1 << 40
		case have >= need:
			return have - 1<<30
		}
		return -have
	}
	return score(a) - score(b)
}
