package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	guestv1 "cloister.dev/api/guest/v1"
	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/container"
	"cloister.dev/internal/host/proc"
	"cloister.dev/internal/host/vm/image"
)

// Agent serves the host's calls.
type Agent struct {
	log     *slog.Logger
	backend *container.Backend
	ports   *ports
	reaper  *proc.Reaper
	began   time.Time

	setup    setup
	ready    func() error   // does makeReady once
	contents image.Contents // once ready

	mu    sync.Mutex
	tasks map[string]*task
}

// task is a container of the pod.
type task struct {
	spec backend.TaskSpec
	op   sync.Mutex // held while the container is changed
	held []held     // guarded by op

	// Agent.mu guards the rest.
	processes map[string]*process // by exec id, "" is init
}

// process is a process of a task, until the host forgets it.
type process struct {
	backend.Process
	relay   *relay
	console *os.File
	pidfd   *os.File
	ended   chan struct{} // closed when exit is known
	exit    proc.Exit
	flush   sync.Once
}

// commandTime bounds what a call may take that the host does not wait for any
// more; such a call is not broken off, because half done it would help nobody.
const commandTime = 2 * time.Minute

func lasting(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), commandTime)
}

func (a *Agent) task(id string) (*task, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if t := a.tasks[id]; t != nil {
		return t, nil
	}
	return nil, fmt.Errorf("task %q: %w", id, errdefs.ErrNotFound)
}

func (a *Agent) process(id, exec string) (*task, *process, error) {
	t, err := a.task(id)
	if err != nil {
		return nil, nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if p := t.processes[exec]; p != nil {
		return t, p, nil
	}
	return nil, nil, fmt.Errorf("process %q of task %q: %w", exec, id, errdefs.ErrNotFound)
}

// Launch is part of the service.
func (a *Agent) Launch(ctx context.Context, r *guestv1.LaunchRequest) (*guestv1.LaunchResponse, error) {
	ctx, cancel := lasting(ctx)
	defer cancel()
	if !filepath.IsLocal(r.Task) || filepath.Base(r.Task) != r.Task {
		return nil, fmt.Errorf("task %q is no name: %w", r.Task, errdefs.ErrInvalidArgument)
	}
	dir := filepath.Join(tasksDir, r.Task)
	if err := a.ready(); err != nil {
		return nil, err
	}
	t := &task{processes: map[string]*process{}, spec: backend.TaskSpec{ID: r.Task, Bundle: dir, Dir: dir,
		Terminal: r.Streams.GetTerminal() != "", RunOnStart: r.Run, Runtime: backend.Runtime{Binary: a.contents.Runtime, Root: runDir + "/runtime"}}}
	t.op.Lock()
	defer t.op.Unlock()
	a.mu.Lock()
	if a.tasks[r.Task] != nil {
		a.mu.Unlock()
		return nil, fmt.Errorf("task %q: %w", r.Task, errdefs.ErrAlreadyExists)
	}
	a.tasks[r.Task] = t
	a.mu.Unlock()
	p, err := a.launch(ctx, t, r)
	if err != nil {
		a.mu.Lock()
		delete(a.tasks, r.Task)
		a.mu.Unlock()
		err = errors.Join(err, removeTask(dir))
		letGo(t.held)
		return nil, err
	}
	return &guestv1.LaunchResponse{Pid: uint32(p.Pid)}, nil
}

func (a *Agent) launch(ctx context.Context, t *task, r *guestv1.LaunchRequest) (*process, error) {
	if err := os.MkdirAll(t.spec.Dir, 0o700); err != nil {
		return nil, err
	}
	t.held = hold(r.Submounts, a.log)
	config, err := a.adapt(ctx, t.spec.Dir, r)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(t.spec.Bundle, "config.json"), config, 0o600); err != nil {
		return nil, err
	}
	start := a.backend.Create
	if r.Run {
		start = a.backend.Start
	}
	p, err := a.run(ctx, t, "", r.Streams, func(s backend.Streams, exited func(proc.Exit)) (backend.Started, error) {
		return start(ctx, &t.spec, s, exited)
	})
	if err != nil {
		return nil, err
	}
	// Named for those that join it; gone with the task's folder.
	_ = os.Symlink(fmt.Sprintf("/proc/%d/ns/pid", p.Pid), TaskPIDNamespace(t.spec.ID))
	return p, nil
}

// run makes a process with its streams and notes it.
func (a *Agent) run(ctx context.Context, t *task, exec string, s *guestv1.Streams, start func(backend.Streams, func(proc.Exit)) (backend.Started, error)) (*process, error) {
	relay, child, err := a.prepare(ctx, s)
	if err != nil {
		return nil, err
	}
	p := &process{relay: relay, ended: make(chan struct{})}
	exited := func(e proc.Exit) {
		p.exit = e
		close(p.ended)
	}
	st, err := start(child, exited)
	child.Close()
	if err != nil {
		relay.close()
		return nil, err
	}
	p.Process, p.console, p.pidfd = st.Process, st.Console, st.Pidfd
	if st.Console != nil {
		if err := relay.terminal(ctx, a.ports, s.GetTerminal(), st.Console); err != nil {
			a.log.Warn("terminal not connected", "task", t.spec.ID, "exec", exec, "err", err)
		}
	}
	a.mu.Lock()
	t.processes[exec] = p
	a.mu.Unlock()
	return p, nil
}

// Start is part of the service.
func (a *Agent) Start(ctx context.Context, r *guestv1.TaskRequest) (*emptypb.Empty, error) {
	return a.change(ctx, r.Task, func(ctx context.Context, t *task) error {
		_, err := a.backend.Start(ctx, &t.spec, backend.Streams{}, func(proc.Exit) {})
		return err
	})
}

// change does something to a task while nothing else is done to it.
func (a *Agent) change(ctx context.Context, id string, f func(context.Context, *task) error) (*emptypb.Empty, error) {
	ctx, cancel := lasting(ctx)
	defer cancel()
	t, err := a.task(id)
	if err != nil {
		return nil, err
	}
	t.op.Lock()
	defer t.op.Unlock()
	return &emptypb.Empty{}, f(ctx, t)
}

// Exec is part of the service.
func (a *Agent) Exec(ctx context.Context, r *guestv1.ExecRequest) (*guestv1.LaunchResponse, error) {
	ctx, cancel := lasting(ctx)
	defer cancel()
	t, err := a.task(r.Task)
	if err != nil {
		return nil, err
	}
	if r.Exec == "" || filepath.Base(r.Exec) != r.Exec {
		return nil, fmt.Errorf("exec %q is no name: %w", r.Exec, errdefs.ErrInvalidArgument)
	}
	p, err := a.run(ctx, t, r.Exec, r.Streams, func(s backend.Streams, exited func(proc.Exit)) (backend.Started, error) {
		return a.backend.Exec(ctx, &t.spec, r.Exec, r.Process, s, exited)
	})
	if err != nil {
		return nil, err
	}
	return &guestv1.LaunchResponse{Pid: uint32(p.Pid)}, nil
}

// drainTime bounds how long an end is kept back because the host does not
// take the output.
const drainTime = 3 * time.Second

// Wait is part of the service.
func (a *Agent) Wait(ctx context.Context, r *guestv1.ProcessRequest) (*guestv1.WaitResponse, error) {
	_, p, err := a.process(r.Task, r.Exec)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.ended:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	p.flush.Do(func() {
		fctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
		defer cancel()
		p.relay.flush(fctx)
	})
	return &guestv1.WaitResponse{Status: int32(p.exit.Status), AtNanos: p.exit.At.UnixNano(), Unknown: p.exit.Unknown}, nil
}

// Forget is part of the service.
func (a *Agent) Forget(_ context.Context, r *guestv1.ProcessRequest) (*emptypb.Empty, error) {
	t, p, err := a.process(r.Task, r.Exec)
	if errdefs.IsNotFound(err) {
		return &emptypb.Empty{}, nil
	}
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	delete(t.processes, r.Exec)
	a.mu.Unlock()
	p.release()
	return &emptypb.Empty{}, nil
}

func (p *process) release() {
	p.relay.close()
	for _, f := range []*os.File{p.console, p.pidfd} {
		if f != nil {
			f.Close()
		}
	}
}

// Settle is part of the service.
func (a *Agent) Settle(ctx context.Context, r *guestv1.TaskRequest) (*guestv1.SettleResponse, error) {
	resp := &guestv1.SettleResponse{}
	_, err := a.change(ctx, r.Task, func(ctx context.Context, t *task) (err error) {
		resp.Oom, err = a.backend.Settle(ctx, &t.spec, a.init(t))
		return err
	})
	return resp, err
}

func (a *Agent) init(t *task) backend.Process {
	a.mu.Lock()
	defer a.mu.Unlock()
	if p := t.processes[""]; p != nil {
		return p.Process
	}
	return backend.Process{}
}

// Delete is part of the service.
func (a *Agent) Delete(ctx context.Context, r *guestv1.TaskRequest) (*emptypb.Empty, error) {
	_, err := a.change(ctx, r.Task, func(ctx context.Context, t *task) error {
		if err := a.backend.Delete(ctx, &t.spec); err != nil {
			return err
		}
		a.mu.Lock()
		processes := t.processes
		t.processes = nil
		delete(a.tasks, r.Task)
		a.mu.Unlock()
		for _, p := range processes {
			p.release()
		}
		err := removeTask(t.spec.Dir)
		letGo(t.held)
		// What the kernel remembers of the container's files keeps them busy on
		// the host; that it cannot be forgotten harms nobody.
		_ = os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0)
		return err
	})
	if errdefs.IsNotFound(err) {
		err = nil
	}
	return &emptypb.Empty{}, err
}

// Signal is part of the service.
func (a *Agent) Signal(ctx context.Context, r *guestv1.SignalRequest) (*emptypb.Empty, error) {
	t, p, err := a.process(r.Task, r.Exec)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, a.backend.Signal(ctx, &t.spec, p.Process, int(r.Signal), r.All)
}

// Pause is part of the service.
func (a *Agent) Pause(ctx context.Context, r *guestv1.TaskRequest) (*emptypb.Empty, error) {
	return a.change(ctx, r.Task, func(ctx context.Context, t *task) error { return a.backend.Pause(ctx, &t.spec) })
}

// Resume is part of the service.
func (a *Agent) Resume(ctx context.Context, r *guestv1.TaskRequest) (*emptypb.Empty, error) {
	return a.change(ctx, r.Task, func(ctx context.Context, t *task) error { return a.backend.Resume(ctx, &t.spec) })
}

// Update is part of the service.
func (a *Agent) Update(ctx context.Context, r *guestv1.UpdateRequest) (*emptypb.Empty, error) {
	return a.change(ctx, r.Task, func(ctx context.Context, t *task) error { return a.backend.Update(ctx, &t.spec, r.Resources) })
}

// Pids is part of the service.
func (a *Agent) Pids(ctx context.Context, r *guestv1.TaskRequest) (*guestv1.PidsResponse, error) {
	resp := &guestv1.PidsResponse{}
	_, err := a.change(ctx, r.Task, func(ctx context.Context, t *task) error {
		init := a.init(t)
		pids, err := a.backend.Pids(ctx, &t.spec, init)
		for _, pid := range pids {
			resp.Pids = append(resp.Pids, uint32(pid))
		}
		return err
	})
	return resp, err
}

// Stats is part of the service.
func (a *Agent) Stats(ctx context.Context, r *guestv1.TaskRequest) (*anypb.Any, error) {
	t, err := a.task(r.Task)
	if err != nil {
		return nil, err
	}
	return a.backend.Stats(ctx, &t.spec, a.init(t))
}

// Resize is part of the service.
func (a *Agent) Resize(_ context.Context, r *guestv1.ResizeRequest) (*emptypb.Empty, error) {
	_, p, err := a.process(r.Task, r.Exec)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, resize(p.console, r.Width, r.Height)
}
