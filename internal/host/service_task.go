package host

import (
	"context"
	"fmt"
	"os"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/proc"
)

// taskService is containerd's Task v3 API. With an exec id a call means that
// process, without one the task's init.
type taskService struct{ h *Host }

func (s taskService) Create(ctx context.Context, r *taskapi.CreateTaskRequest) (*taskapi.CreateTaskResponse, error) {
	rec, err := s.h.newTaskRecord(r)
	if err != nil {
		return nil, err
	}
	pid, err := s.h.createTask(ctx, rec)
	if err != nil {
		return nil, err
	}
	s.h.log.Info("task created", "task", r.ID, "pid", pid)
	return &taskapi.CreateTaskResponse{Pid: uint32(pid)}, nil
}

func (s taskService) Start(ctx context.Context, r *taskapi.StartRequest) (*taskapi.StartResponse, error) {
	t, err := s.h.task(r.ID)
	if err != nil {
		return nil, err
	}
	var pid int
	if r.ExecID == "" {
		pid, err = t.start(ctx)
	} else {
		var x *execution
		if x, err = t.exec(r.ExecID); err == nil {
			pid, err = x.start(ctx)
		}
	}
	if err != nil {
		return nil, err
	}
	s.h.log.Info("process started", "task", r.ID, "exec", r.ExecID, "pid", pid)
	return &taskapi.StartResponse{Pid: uint32(pid)}, nil
}

func (s taskService) Exec(_ context.Context, r *taskapi.ExecProcessRequest) (*emptypb.Empty, error) {
	if err := checkID("exec", r.ExecID); err != nil {
		return nil, err
	}
	t, err := s.h.task(r.ID)
	if err != nil {
		return nil, err
	}
	if len(r.Spec.GetValue()) == 0 {
		return nil, fmt.Errorf("exec %s: no process given: %w", r.ExecID, errdefs.ErrInvalidArgument)
	}
	process, err := execProcess(r.Spec.GetValue(), r.Terminal)
	if err != nil {
		return nil, err
	}
	if err := t.addExec(r.ExecID, process, clientIO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal}); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

func (s taskService) Delete(ctx context.Context, r *taskapi.DeleteRequest) (*taskapi.DeleteResponse, error) {
	t, err := s.h.task(r.ID)
	if err != nil {
		return nil, err
	}
	var init backend.Process
	var exit *proc.Exit
	if r.ExecID == "" {
		rec, err := t.delete(ctx)
		if err != nil {
			return nil, err
		}
		init, exit = rec.Init, rec.Exit
	} else {
		x, err := t.exec(r.ExecID)
		if err != nil {
			return nil, err
		}
		rec, err := x.delete(ctx)
		if err != nil {
			return nil, err
		}
		init, exit = rec.Init, rec.Exit
	}
	s.h.log.Debug("process deleted", "task", r.ID, "exec", r.ExecID)
	resp := &taskapi.DeleteResponse{Pid: uint32(init.Pid), ExitedAt: timestamppb.Now()}
	if exit != nil {
		resp.ExitStatus, resp.ExitedAt = uint32(exit.Status), timestamppb.New(exit.At)
	}
	return resp, nil
}

func (s taskService) Wait(ctx context.Context, r *taskapi.WaitRequest) (*taskapi.WaitResponse, error) {
	t, err := s.h.task(r.ID)
	if err != nil {
		return nil, err
	}
	ended := t.ended
	exit := func() *proc.Exit { return t.record().Exit }
	if r.ExecID != "" {
		x, err := t.exec(r.ExecID)
		if err != nil {
			return nil, err
		}
		ended = x.ended
		exit = func() *proc.Exit { return x.record().Exit }
	}
	select {
	case <-ended.happened():
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	e := exit()
	if e == nil {
		return nil, fmt.Errorf("task %s, exec %q: deleted, it never ran: %w", r.ID, r.ExecID, errdefs.ErrNotFound)
	}
	return &taskapi.WaitResponse{ExitStatus: uint32(e.Status), ExitedAt: timestamppb.New(e.At)}, nil
}

func (s taskService) State(_ context.Context, r *taskapi.StateRequest) (*taskapi.StateResponse, error) {
	t, err := s.h.task(r.ID)
	if err != nil {
		return nil, err
	}
	rec := t.record()
	resp := &taskapi.StateResponse{ID: r.ID, Bundle: rec.Spec.Bundle, ExecID: r.ExecID, Terminal: rec.Spec.Terminal}
	c := rec.IO.Client
	p, ph, exit := rec.Init, rec.Phase, rec.Exit
	settled := t.ended.has()
	if r.ExecID != "" {
		x, err := t.exec(r.ExecID)
		if err != nil {
			return nil, err
		}
		xr := x.record()
		p, ph, exit, c, settled = xr.Init, xr.Phase, xr.Exit, &xr.IO, x.ended.has()
		resp.Terminal = xr.IO.Terminal
	}
	if c != nil {
		resp.Stdin, resp.Stdout, resp.Stderr = c.Stdin, c.Stdout, c.Stderr
	}
	resp.Pid = uint32(p.Pid)
	switch {
	case exit != nil && settled:
		resp.Status = tasktypes.Status_STOPPED
		resp.ExitStatus, resp.ExitedAt = uint32(exit.Status), timestamppb.New(exit.At)
	case r.ExecID == "" && rec.Paused:
		resp.Status = tasktypes.Status_PAUSED
	case ph == phaseStarted:
		resp.Status = tasktypes.Status_RUNNING
	default:
		resp.Status = tasktypes.Status_CREATED
	}
	return resp, nil
}

func (s taskService) Kill(ctx context.Context, r *taskapi.KillRequest) (*emptypb.Empty, error) {
	t, err := s.h.task(r.ID)
	if err != nil {
		return nil, err
	}
	rec, err := t.made(ctx)
	if err != nil {
		return nil, err
	}
	p, exit := rec.Init, rec.Exit
	if r.ExecID != "" {
		x, err := t.exec(r.ExecID)
		if err != nil {
			return nil, err
		}
		xr, err := x.made(ctx)
		if err != nil {
			return nil, err
		}
		p, exit = xr.Init, xr.Exit
	}
	if exit != nil {
		return nil, fmt.Errorf("process %d of task %s has ended: %w", p.Pid, r.ID, errdefs.ErrNotFound)
	}
	if p.Pid == 0 {
		return nil, fmt.Errorf("task %s was not started: %w", r.ID, errdefs.ErrFailedPrecondition)
	}
	if err := s.h.backend.Signal(ctx, &rec.Spec, p, int(r.Signal), r.All); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// made gives the record once no start is under way: what is being started can
// be killed as soon as it is there.
func (t *task) made(ctx context.Context) (taskRecord, error) {
	rec := t.record()
	if rec.Phase != phaseStarting || rec.Exit != nil {
		return rec, nil
	}
	unlock, err := t.lock(ctx)
	if err != nil {
		return rec, err
	}
	defer unlock()
	return t.record(), nil
}

// made gives the record once no start is under way.
func (x *execution) made(ctx context.Context) (execRecord, error) {
	rec := x.record()
	if rec.Phase != phaseStarting || rec.Exit != nil {
		return rec, nil
	}
	select {
	case x.op <- struct{}{}:
		defer func() { <-x.op }()
		return x.record(), nil
	case <-ctx.Done():
		return rec, fmt.Errorf("wait for the start of exec %s: %w", rec.ID, ctx.Err())
	}
}

func (s taskService) Pids(ctx context.Context, r *taskapi.PidsRequest) (*taskapi.PidsResponse, error) {
	rec, err := s.running(r.ID)
	if err != nil {
		return nil, err
	}
	pids, err := s.h.backend.Pids(ctx, &rec.Spec, rec.Init)
	if err != nil {
		return nil, err
	}
	resp := &taskapi.PidsResponse{}
	for _, p := range pids {
		resp.Processes = append(resp.Processes, &tasktypes.ProcessInfo{Pid: uint32(p)})
	}
	return resp, nil
}

func (s taskService) running(id string) (taskRecord, error) {
	t, err := s.h.task(id)
	if err != nil {
		return taskRecord{}, err
	}
	return t.running()
}

func (s taskService) Pause(ctx context.Context, r *taskapi.PauseRequest) (*emptypb.Empty, error) {
	return s.change(ctx, r.ID, s.h.backend.Pause, func(r *taskRecord) { r.Paused = true })
}

func (s taskService) Resume(ctx context.Context, r *taskapi.ResumeRequest) (*emptypb.Empty, error) {
	return s.change(ctx, r.ID, s.h.backend.Resume, func(r *taskRecord) { r.Paused = false })
}

func (s taskService) change(ctx context.Context, id string, act func(context.Context, *backend.TaskSpec) error, note func(*taskRecord)) (*emptypb.Empty, error) {
	t, err := s.h.task(id)
	if err != nil {
		return nil, err
	}
	unlock, err := t.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	rec, err := t.running()
	if err != nil {
		return nil, err
	}
	if err := act(ctx, &rec.Spec); err != nil {
		return nil, err
	}
	t.update(note)
	return &emptypb.Empty{}, nil
}

func (s taskService) Update(ctx context.Context, r *taskapi.UpdateTaskRequest) (*emptypb.Empty, error) {
	if len(r.Resources.GetValue()) == 0 {
		return nil, fmt.Errorf("update task %s: no resources given: %w", r.ID, errdefs.ErrInvalidArgument)
	}
	return s.change(ctx, r.ID, func(ctx context.Context, t *backend.TaskSpec) error {
		return s.h.backend.Update(ctx, t, r.Resources.Value)
	}, func(*taskRecord) {})
}

func (s taskService) Stats(ctx context.Context, r *taskapi.StatsRequest) (*taskapi.StatsResponse, error) {
	rec, err := s.running(r.ID)
	if err != nil {
		return nil, err
	}
	a, err := s.h.backend.Stats(ctx, &rec.Spec, rec.Init)
	if err != nil {
		return nil, err
	}
	return &taskapi.StatsResponse{Stats: a}, nil
}

func (s taskService) ResizePty(ctx context.Context, r *taskapi.ResizePtyRequest) (*emptypb.Empty, error) {
	t, err := s.h.task(r.ID)
	if err != nil {
		return nil, err
	}
	rec := t.record()
	p := rec.Init
	t.mu.Lock()
	term := t.term
	t.mu.Unlock()
	if r.ExecID != "" {
		x, err := t.exec(r.ExecID)
		if err != nil {
			return nil, err
		}
		p = x.record().Init
		x.mu.Lock()
		term = x.term
		x.mu.Unlock()
	}
	switch b, elsewhere := s.h.backend.(backend.TerminalResizer); {
	case elsewhere:
		return &emptypb.Empty{}, b.ResizeTerminal(ctx, &rec.Spec, p, r.Width, r.Height)
	case r.ExecID == "" && t.io != nil:
		return &emptypb.Empty{}, t.io.resize(r.Width, r.Height)
	}
	return &emptypb.Empty{}, term.resize(r.Width, r.Height)
}

// CloseIO ends a task's standard input. A process with the client's FIFO sees
// the end when the client closes it.
func (s taskService) CloseIO(_ context.Context, r *taskapi.CloseIORequest) (*emptypb.Empty, error) {
	t, err := s.h.task(r.ID)
	if err != nil {
		return nil, err
	}
	if r.Stdin && r.ExecID == "" && t.io != nil {
		t.io.closeStdin()
	}
	return &emptypb.Empty{}, nil
}

func (s taskService) Connect(_ context.Context, r *taskapi.ConnectRequest) (*taskapi.ConnectResponse, error) {
	resp := &taskapi.ConnectResponse{ShimPid: uint32(os.Getpid()), Version: s.h.version}
	if t, err := s.h.task(r.ID); err == nil {
		resp.TaskPid = uint32(t.record().Init.Pid)
	}
	return resp, nil
}

// Shutdown does not end a resident shim: it serves others.
func (s taskService) Shutdown(context.Context, *taskapi.ShutdownRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

func (s taskService) Checkpoint(context.Context, *taskapi.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return nil, fmt.Errorf("checkpoint: %w", errdefs.ErrNotImplemented)
}
