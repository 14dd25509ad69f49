package shim

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"

	hostv1 "cloister.dev/api/host/v1"
)

// note is where a container's name in its sandbox's folder links to its
// bundle, from before an external shim is told of it until it is deleted
// there: what has to be cleaned up when that shim dies.
func (t Task) note() string { return filepath.Join(t.SandboxBundle, "task-"+t.ID) }

// prepareForeign gives a third-party shim its options and streams that the
// resident shim keeps.
func (t Task) prepareForeign(ctx context.Context, create *taskapi.CreateTaskRequest, r TaskRequest, log *hostv1.Log) error {
	if o := t.h.foreignOptions(r); o != nil {
		var err error
		if create.Options, err = typeurl.MarshalAnyToProto(o); err != nil {
			return fmt.Errorf("encode the handler's options: %w", err)
		}
	}
	if err := os.Symlink(r.Bundle, t.note()); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("note the container's bundle: %w", err)
	}
	return t.host(ctx, true, func(ctx context.Context, c *conn) error {
		// The end of a terminal's input is a byte, not the end of a stream.
		resp, err := c.host.OpenIO(ctx, &hostv1.OpenIORequest{Id: t.ID, Log: log, Stdin: r.Stdin, StdinOnce: r.StdinOnce && !r.Terminal, Terminal: r.Terminal})
		if err == nil {
			create.Stdin, create.Stdout, create.Stderr = resp.Stdin, resp.Stdout, resp.Stderr
		}
		return err
	})
}

// foreignOptions encodes a handler's options table for a shim that is not ours.
func (h *Handler) foreignOptions(t TaskRequest) proto.Message {
	r := h.Runtime
	if h.runsRunc() {
		return &runcoptions.Options{BinaryName: r.Binary, Root: h.runcRoot(), SystemdCgroup: r.SystemdCgroup, NoNewKeyring: r.NoNewKeyring,
			NoPivotRoot: r.NoPivotRoot, ShimCgroup: r.ShimCgroup, IoUid: cmp.Or(r.IOUid, t.IOUid), IoGid: cmp.Or(r.IOGid, t.IOGid)}
	}
	if r.ConfigPath == "" && r.ConfigBody == "" {
		return nil
	}
	return &runtimeoptions.Options{TypeUrl: r.OptionsType, ConfigPath: r.ConfigPath, ConfigBody: []byte(r.ConfigBody)}
}

// runcRoot is runc's state folder below an external shim. Several daemons, and a
// containerd, run side by side.
func (h *Handler) runcRoot() string {
	return cmp.Or(h.Runtime.Root, filepath.Join(h.client.o.State, "runc"))
}

// runsRunc tells whether the shim is containerd's for OCI runtimes.
func (h *Handler) runsRunc() bool {
	name, _, err := shimName(h.Runtime.Type)
	return err == nil && name == "runc" || strings.HasSuffix(h.Runtime.Path, "containerd-shim-runc-v2")
}

// releaseStdin makes the shim drop the writing end of the container's input
// that it opened itself: the end of the input is up to the resident shim, which
// has the other writing end and gives it up after the first client.
func (t Task) releaseStdin(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), repeatTime)
	t.h.client.probes.Go(func() { // some shims answer only when the input has ended
		defer cancel()
		if err := t.Exec("").CloseStdin(ctx); err != nil && !errdefs.IsNotFound(err) {
			t.h.client.log.Debug("shim keeps a container's input open", "container", t.ID, "err", err)
		}
	})
}

// foreignExit completes what an external shim told of an end, or finds it out
// when the shim has died.
func (t Task) foreignExit(ctx context.Context, e Exit, err error) (Exit, error) {
	if errors.Is(err, errGone) {
		return t.bury(ctx)
	}
	if err != nil {
		return Exit{}, err
	}
	// The shim's event may come late or never, the counter is there until
	// the container is deleted.
	e.OOM = e.Status != 0 && (t.oomKills(ctx) > 0 || t.tookOOM())
	return e, nil
}

func (t Task) tookOOM() bool {
	return t.h.client.o.Events != nil && t.h.client.o.Events.takeOOM(t.ID)
}

// oomKills counts how often the kernel killed in the container for want of
// memory; 0 when its shim cannot tell.
func (t Task) oomKills(ctx context.Context) uint64 {
	a, err := t.Stats(ctx)
	if err != nil || a == nil {
		return 0
	}
	var v1 cgroup1.Metrics
	var v2 cgroup2.Metrics
	switch {
	case a.MessageIs(&v1) && a.UnmarshalTo(&v1) == nil:
		return v1.GetMemoryOomControl().GetOomKill()
	case a.MessageIs(&v2) && a.UnmarshalTo(&v2) == nil:
		return v2.GetMemoryEvents().GetOomKill()
	}
	return 0
}

// bury ends a container that its shim, which may have died, does not know any
// more, and tells how it ended, which is known when the shim lived to write that
// down. errdefs.ErrNotFound: the shim had not been told of the container.
func (t Task) bury(ctx context.Context) (Exit, error) {
	bundle, err := os.Readlink(t.note())
	if errors.Is(err, fs.ErrNotExist) {
		return Exit{}, fmt.Errorf("container %s: %w", t.ID, errGone)
	}
	if err != nil {
		return Exit{}, fmt.Errorf("find the bundle of container %s: %w", t.ID, err)
	}
	now := time.Now()
	r, err := t.h.client.runDelete(ctx, t.h, t.ID, bundle)
	if err == nil && t.h.runsRunc() {
		err = t.sweep(ctx, bundle)
	}
	if err != nil {
		return Exit{}, fmt.Errorf("clean up container %s after its shim: %w", t.ID, err)
	}
	e := Exit{Status: r.ExitStatus, At: r.ExitedAt.AsTime()}
	if !e.At.Before(now) {
		// A shim that knows nothing makes up SIGKILL at this moment.
		e.Status, e.Unknown = 255, true
	}
	return e, nil
}

// sweep lets the resident shim, which can, remove what a runc has left that was
// killed with its shim while it made the container: runc itself does not know
// such a container.
func (t Task) sweep(ctx context.Context, bundle string) error {
	rt := t.h.Runtime
	options, err := typeurl.MarshalAnyToProto(&hostv1.TaskOptions{BinaryName: rt.Binary, SystemdCgroup: rt.SystemdCgroup,
		Root: filepath.Join(t.h.runcRoot(), containerdNamespace), SandboxId: t.SandboxID, RunOnStart: true})
	if err != nil {
		return err
	}
	return t.host(ctx, true, func(ctx context.Context, c *conn) error {
		_, err := c.task.Create(ctx, &taskapi.CreateTaskRequest{ID: t.ID, Bundle: bundle, Options: options})
		if err != nil && !errdefs.IsAlreadyExists(errgrpc.ToNative(err)) { // an answer was lost
			return err
		}
		_, err = c.task.Delete(ctx, &taskapi.DeleteRequest{ID: t.ID})
		return err
	})
}

// foreignState asks an external shim. What it calls created belongs to a start
// that was cut off, like a task of ours that has no process yet: whether the OCI
// runtime did its part the shim does not know.
func (t Task) foreignState(ctx context.Context) (State, error) {
	var r *taskapi.StateResponse
	err := t.call(ctx, true, func(ctx context.Context, c *conn) (err error) {
		r, err = c.task.State(ctx, &taskapi.StateRequest{ID: t.ID})
		return err
	})
	if errors.Is(err, errGone) {
		e, err := t.bury(ctx)
		if err == nil {
			return State{Exited: true, Exit: e}, nil
		}
		if !errdefs.IsNotFound(err) {
			return State{}, err
		}
	}
	if errdefs.IsNotFound(err) {
		// Streams may have been made for it.
		return State{}, errors.Join(err, t.closeStreams(ctx))
	}
	if err != nil || r.Status == tasktypes.Status_CREATED {
		return State{}, err
	}
	s := State{Pid: r.Pid, Exited: r.Status == tasktypes.Status_STOPPED, Exit: Exit{Status: r.ExitStatus, At: r.ExitedAt.AsTime()}}
	return s, nil
}

// deleteForeign takes the container off an external shim, or cleans up after
// that shim's death, and then ends its streams.
func (t Task) deleteForeign(ctx context.Context) error {
	err := t.call(ctx, true, func(ctx context.Context, c *conn) error {
		_, err := c.task.Delete(ctx, &taskapi.DeleteRequest{ID: t.ID})
		return err
	})
	if errdefs.IsNotFound(err) {
		// Its shim has died, or was cut off while it made the container and has
		// left what there is of it.
		_, err = t.bury(ctx)
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	t.tookOOM() // nobody will ask for it any more
	if err := t.closeStreams(ctx); err != nil {
		return err
	}
	if err := os.Remove(t.note()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget the container's bundle: %w", err)
	}
	return nil
}

func (t Task) closeStreams(ctx context.Context) error {
	err := t.host(ctx, true, func(ctx context.Context, c *conn) error {
		_, err := c.host.CloseIO(ctx, &hostv1.CloseIORequest{Id: t.ID})
		return err
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("end the streams of container %s: %w", t.ID, err)
	}
	return nil
}
