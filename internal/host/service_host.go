package host

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	hostv1 "cloister.dev/api/host/v1"
)

// hostService is Cloister's own API.
type hostService struct{ h *Host }

func (s hostService) Info(context.Context, *hostv1.InfoRequest) (*hostv1.InfoResponse, error) {
	return &hostv1.InfoResponse{Version: s.h.version, Backend: s.h.backend.Name(), Pid: uint32(os.Getpid())}, nil
}

func (s hostService) Probe(ctx context.Context, r *hostv1.ProbeRequest) (*hostv1.ProbeResponse, error) {
	return s.h.backend.Probe(ctx, r)
}

func (s hostService) Inspect(_ context.Context, r *hostv1.InspectRequest) (*hostv1.InspectResponse, error) {
	t, err := s.h.task(r.Id)
	if err != nil {
		return nil, err
	}
	rec := t.record()
	p, exit, ended := rec.Init, rec.Exit, t.ended.has()
	if r.ExecId != "" {
		x, err := t.exec(r.ExecId)
		if err != nil {
			return nil, err
		}
		xr := x.record()
		p, exit, ended = xr.Init, xr.Exit, x.ended.has()
	}
	resp := &hostv1.InspectResponse{Pid: uint32(p.Pid), LogPath: rec.IO.LogPath, OomKilled: rec.OOM && r.ExecId == ""}
	if exit != nil && ended {
		resp.Exited, resp.ExitStatus, resp.ExitedAt = true, uint32(exit.Status), timestamppb.New(exit.At)
		resp.StatusUnknown, resp.Reason = exit.Unknown, exit.Reason
	}
	return resp, nil
}

// io finds the streams that this process owns, of a task or of a pump.
func (s hostService) io(id string) (*taskIO, error) {
	s.h.mu.Lock()
	t, p := s.h.tasks[id], s.h.pumps[id]
	s.h.mu.Unlock()
	switch {
	case t != nil && t.io != nil:
		return t.io, nil
	case t != nil:
		return nil, fmt.Errorf("task %q has its client's streams: %w", id, errdefs.ErrFailedPrecondition)
	case p != nil:
		return p.opened()
	}
	return nil, fmt.Errorf("task %q: %w", id, errdefs.ErrNotFound)
}

func (s hostService) ReopenLog(_ context.Context, r *hostv1.ReopenLogRequest) (*emptypb.Empty, error) {
	io, err := s.io(r.Id)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, io.reopenLog()
}

func (s hostService) Attach(ctx context.Context, r *hostv1.AttachRequest) (*emptypb.Empty, error) {
	io, err := s.io(r.Id)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, io.attach(ctx, clientIO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr})
}

// Machines is what a backend has whose sandboxes are virtual machines.
type Machines interface {
	// Forward connects a port on the sandbox's loopback address with the unix
	// socket on which the client listens.
	Forward(ctx context.Context, sandbox string, port uint16, socket string) error
	Machines(ctx context.Context, r *hostv1.MachinesRequest) (*hostv1.MachinesResponse, error)
	RunInMachine(ctx context.Context, r *hostv1.RunInMachineRequest) (*hostv1.RunInMachineResponse, error)
}

func (s hostService) machines() (Machines, error) {
	if m, ok := s.h.backend.(Machines); ok {
		return m, nil
	}
	return nil, fmt.Errorf("the sandboxes of backend %s are no virtual machines: %w", s.h.backend.Name(), errdefs.ErrNotImplemented)
}

func (s hostService) Forward(ctx context.Context, r *hostv1.ForwardRequest) (*emptypb.Empty, error) {
	m, err := s.machines()
	if err != nil {
		return nil, err
	}
	if r.Port == 0 || r.Port > 0xffff {
		return nil, fmt.Errorf("port %d does not exist: %w", r.Port, errdefs.ErrInvalidArgument)
	}
	return &emptypb.Empty{}, m.Forward(ctx, r.SandboxId, uint16(r.Port), r.Socket)
}

func (s hostService) Machines(ctx context.Context, r *hostv1.MachinesRequest) (*hostv1.MachinesResponse, error) {
	m, err := s.machines()
	if err != nil {
		return nil, err
	}
	return m.Machines(ctx, r)
}

func (s hostService) RunInMachine(ctx context.Context, r *hostv1.RunInMachineRequest) (*hostv1.RunInMachineResponse, error) {
	m, err := s.machines()
	if err != nil {
		return nil, err
	}
	return m.RunInMachine(ctx, r)
}
