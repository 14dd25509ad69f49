package shim

import (
	"context"
	"encoding/json"
	"fmt"
	"syscall"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"
)

// Exec is one more process of a container.
type Exec struct {
	Task
	ExecID string
}

// prepareTime bounds the call that tells a shim of an exec or a sandbox to come.
const prepareTime = 10 * time.Second

// Exec names a process of the container; it asks the shim nothing.
func (t Task) Exec(id string) Exec { return Exec{Task: t, ExecID: id} }

// Start runs p with the given FIFOs, made by the caller, as its streams. When
// ctx ends first, Delete, or Kill and then Delete, undo it.
func (e Exec) Start(ctx context.Context, p *specs.Process, stdin, stdout, stderr string) error {
	spec, err := specAny("Process", p)
	if err != nil {
		return err
	}
	return e.call(ctx, false, func(ctx context.Context, c *conn) error {
		// Not to be cut off: a shim may look at an abandoned call after the
		// Delete that follows it.
		prepare, cancel := context.WithTimeout(context.WithoutCancel(ctx), prepareTime)
		defer cancel()
		if _, err := c.task.Exec(prepare, &taskapi.ExecProcessRequest{ID: e.ID, ExecID: e.ExecID, Terminal: p.Terminal,
			Stdin: stdin, Stdout: stdout, Stderr: stderr, Spec: spec}); err != nil {
			return err
		}
		_, err := c.task.Start(ctx, &taskapi.StartRequest{ID: e.ID, ExecID: e.ExecID})
		return err
	})
}

// specAny encodes a part of an OCI specification as containerd's clients do.
func specAny(kind string, part any) (*anypb.Any, error) {
	b, err := json.Marshal(part)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", kind, err)
	}
	return &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/" + kind, Value: b}, nil
}

// Wait blocks until the process has ended.
func (e Exec) Wait(ctx context.Context) (Exit, error) {
	var x Exit
	err := e.call(ctx, true, func(ctx context.Context, c *conn) error {
		r, err := c.task.Wait(ctx, &taskapi.WaitRequest{ID: e.ID, ExecID: e.ExecID})
		if err == nil {
			x = Exit{Status: r.ExitStatus, At: r.ExitedAt.AsTime()}
		}
		return err
	})
	return x, err
}

// Kill signals the process. An ended one is success.
func (e Exec) Kill(ctx context.Context, signal syscall.Signal) error {
	err := e.call(ctx, true, func(ctx context.Context, c *conn) error {
		_, err := c.task.Kill(ctx, &taskapi.KillRequest{ID: e.ID, ExecID: e.ExecID, Signal: uint32(signal)})
		return err
	})
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// Delete takes the ended process off the shim. An absent one is success.
func (e Exec) Delete(ctx context.Context) error {
	err := e.call(ctx, true, func(ctx context.Context, c *conn) error {
		_, err := c.task.Delete(ctx, &taskapi.DeleteRequest{ID: e.ID, ExecID: e.ExecID})
		return err
	})
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// Resize sets the size of the process's terminal; with an empty exec id that
// of the container itself.
func (e Exec) Resize(ctx context.Context, width, height uint16) error {
	return e.call(ctx, true, func(ctx context.Context, c *conn) error {
		_, err := c.task.ResizePty(ctx, &taskapi.ResizePtyRequest{ID: e.ID, ExecID: e.ExecID, Width: uint32(width), Height: uint32(height)})
		return err
	})
}

// CloseStdin closes the process's standard input.
func (e Exec) CloseStdin(ctx context.Context) error {
	return e.call(ctx, true, func(ctx context.Context, c *conn) error {
		_, err := c.task.CloseIO(ctx, &taskapi.CloseIORequest{ID: e.ID, ExecID: e.ExecID, Stdin: true})
		return err
	})
}
