package shim

import (
	"cmp"
	"context"
	"syscall"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	hostv1 "cloister.dev/api/host/v1"
)

// Task is one container on its sandbox's shim.
type Task struct {
	ID, SandboxID string
	SandboxBundle string
	h             *Handler
}

// Task gives the face of a container; it asks the shim nothing.
func (h *Handler) Task(id, sandboxID, sandboxBundle string) Task {
	return Task{ID: id, SandboxID: sandboxID, SandboxBundle: sandboxBundle, h: h}
}

// TaskRequest is what a shim is told of a new container, whose bundle holds
// config.json and the mounted root file system.
type TaskRequest struct {
	Bundle       string
	Terminal     bool
	Stdin        bool
	StdinOnce    bool
	LogPath      string // empty: no log
	LogMaxLine   int64
	IOUid, IOGid uint32
	TargetTask   string // whose PID namespace it joins, empty: none's
}

// Exit is how a process ended.
type Exit struct {
	Status  uint32 // 128+n for signal n
	At      time.Time
	OOM     bool
	Unknown bool   // nobody could tell the status any more
	Reason  string // a sentence for people, where the status does not tell
}

// State is what a shim says of a container.
type State struct {
	Pid    uint32
	Exited bool
	Exit   Exit
}

func (t Task) call(ctx context.Context, repeatable bool, f func(context.Context, *conn) error) error {
	d, err := t.h.connection(t.SandboxID, t.SandboxBundle)
	if err != nil {
		return err
	}
	return d.call(ctx, repeatable, f)
}

// host calls the resident shim, which keeps the streams of every container.
func (t Task) host(ctx context.Context, repeatable bool, f func(context.Context, *conn) error) error {
	return t.h.home().call(ctx, repeatable, f)
}

// Start runs the container and gives its pid. On error nothing of it is left
// on the shim.
func (t Task) Start(ctx context.Context, r TaskRequest) (pid uint32, err error) {
	create := &taskapi.CreateTaskRequest{ID: t.ID, Bundle: r.Bundle, Terminal: r.Terminal}
	log := &hostv1.Log{Path: r.LogPath, MaxLineBytes: r.LogMaxLine}
	rt := t.h.Runtime
	if rt.resident() {
		create.Options, err = typeurl.MarshalAnyToProto(&hostv1.TaskOptions{
			BinaryName: rt.Binary, Root: rt.Root, SystemdCgroup: rt.SystemdCgroup, NoNewKeyring: rt.NoNewKeyring,
			Log: log, Stdin: r.Stdin, StdinOnce: r.StdinOnce, RunOnStart: true,
			IoUid: cmp.Or(rt.IOUid, r.IOUid), IoGid: cmp.Or(rt.IOGid, r.IOGid), NoPivotRoot: rt.NoPivotRoot, NoCgroup: rt.NoCgroup,
			SandboxId: t.SandboxID, TargetTask: r.TargetTask})
	} else {
		err = t.prepareForeign(ctx, create, r, log)
	}
	if err == nil {
		err = t.call(ctx, false, func(ctx context.Context, c *conn) error {
			if _, err := c.task.Create(ctx, create); err != nil {
				return err
			}
			resp, err := c.task.Start(ctx, &taskapi.StartRequest{ID: t.ID})
			if err == nil {
				pid = resp.Pid
			}
			return err
		})
	}
	if err != nil {
		// The answer may be all that was lost, and the container run.
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTime)
		defer cancel()
		if e := t.Discard(clean); e != nil {
			t.h.client.log.Warn("task left after a failed start", "container", t.ID, "err", e)
		}
		return 0, err
	}
	if create.Stdin != "" && r.StdinOnce && !r.Terminal {
		t.releaseStdin(ctx)
	}
	return pid, nil
}

// Wait blocks until the container has ended. When its shim does not know it,
// the error is errdefs.ErrNotFound.
func (t Task) Wait(ctx context.Context) (Exit, error) {
	var e Exit
	err := t.call(ctx, true, func(ctx context.Context, c *conn) error {
		resp, err := c.task.Wait(ctx, &taskapi.WaitRequest{ID: t.ID})
		if err != nil {
			return err
		}
		e = Exit{Status: resp.ExitStatus, At: resp.ExitedAt.AsTime()}
		return nil
	})
	if !t.h.Runtime.resident() {
		return t.foreignExit(ctx, e, err)
	}
	if err != nil {
		return Exit{}, err
	}
	s, err := t.State(ctx)
	if err != nil {
		return e, err
	}
	return s.Exit, nil
}

// State asks the shim for the container; errdefs.ErrNotFound when it knows none.
func (t Task) State(ctx context.Context) (State, error) {
	if !t.h.Runtime.resident() {
		return t.foreignState(ctx)
	}
	var s State
	err := t.call(ctx, true, func(ctx context.Context, c *conn) error {
		r, err := c.host.Inspect(ctx, &hostv1.InspectRequest{Id: t.ID})
		if err == nil {
			s = State{Pid: r.Pid, Exited: r.Exited, Exit: Exit{Status: r.ExitStatus, At: r.ExitedAt.AsTime(), OOM: r.OomKilled, Unknown: r.StatusUnknown, Reason: r.Reason}}
		}
		return err
	})
	return s, err
}

// Kill signals the container's first process, or all. An ended container is
// success.
func (t Task) Kill(ctx context.Context, signal syscall.Signal, all bool) error {
	err := t.call(ctx, true, func(ctx context.Context, c *conn) error {
		_, err := c.task.Kill(ctx, &taskapi.KillRequest{ID: t.ID, Signal: uint32(signal), All: all})
		return err
	})
	return ignoreAbsent(err)
}

// Delete takes the ended container off the shim. An absent one is success.
func (t Task) Delete(ctx context.Context) error {
	if !t.h.Runtime.resident() {
		return t.deleteForeign(ctx)
	}
	return ignoreAbsent(t.call(ctx, true, func(ctx context.Context, c *conn) error {
		_, err := c.task.Delete(ctx, &taskapi.DeleteRequest{ID: t.ID})
		return err
	}))
}

// Discard takes the container off the shim whatever it is doing, killing it
// when it runs. An absent one is success.
func (t Task) Discard(ctx context.Context) error {
	if err := t.Kill(ctx, syscall.SIGKILL, true); err == nil {
		err := t.call(ctx, true, func(ctx context.Context, c *conn) error {
			_, err := c.task.Wait(ctx, &taskapi.WaitRequest{ID: t.ID})
			return err
		})
		if ignoreAbsent(err) != nil {
			return err
		}
	}
	return t.Delete(ctx) // which tells whether it could not be killed
}

// Pids lists the container's processes.
func (t Task) Pids(ctx context.Context) ([]uint32, error) {
	var pids []uint32
	err := t.call(ctx, true, func(ctx context.Context, c *conn) error {
		r, err := c.task.Pids(ctx, &taskapi.PidsRequest{ID: t.ID})
		pids = nil
		for _, p := range r.GetProcesses() {
			pids = append(pids, p.Pid)
		}
		return err
	})
	return pids, err
}

// Update changes the container's resources.
func (t Task) Update(ctx context.Context, r *specs.LinuxResources) error {
	a, err := specAny("LinuxResources", r)
	if err != nil {
		return err
	}
	return t.call(ctx, true, func(ctx context.Context, c *conn) error {
		_, err := c.task.Update(ctx, &taskapi.UpdateTaskRequest{ID: t.ID, Resources: a})
		return err
	})
}

// Stats gives the container's cgroup metrics as containerd's shims encode
// them (io.containerd.cgroups.v1.Metrics or v2).
func (t Task) Stats(ctx context.Context) (*anypb.Any, error) {
	var a *anypb.Any
	err := t.call(ctx, true, func(ctx context.Context, c *conn) error {
		r, err := c.task.Stats(ctx, &taskapi.StatsRequest{ID: t.ID})
		a = r.GetStats()
		return err
	})
	return a, err
}

// ReopenLog makes the container's log continue in a new file of the same name.
func (t Task) ReopenLog(ctx context.Context) error {
	return t.host(ctx, true, func(ctx context.Context, c *conn) error {
		_, err := c.host.ReopenLog(ctx, &hostv1.ReopenLogRequest{Id: t.ID})
		return err
	})
}

// Attach connects FIFOs that the caller made to the container's streams.
func (t Task) Attach(ctx context.Context, stdin, stdout, stderr string) error {
	return t.host(ctx, false, func(ctx context.Context, c *conn) error {
		_, err := c.host.Attach(ctx, &hostv1.AttachRequest{Id: t.ID, Stdin: stdin, Stdout: stdout, Stderr: stderr})
		return err
	})
}
