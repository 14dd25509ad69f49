package shim

import (
	"context"
	"errors"
	"fmt"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"

	hostv1 "cloister.dev/api/host/v1"
)

// SandboxRequest is what a shim is told of a new sandbox.
type SandboxRequest struct {
	ID            string
	Bundle        string // the sandbox's folder
	NetNS         string // path of the pinned namespace, empty: the node's
	UserNS        string
	Cgroup        string // of processes that hold the sandbox
	SharePID      bool
	Annotations   map[string]string
	ForeignConfig proto.Message // options for shims that are not ours
}

// StartSandbox creates and starts a sandbox on the handler's shim and gives
// the pid of its holder, 0 when there is none. On error nothing is left.
func (h *Handler) StartSandbox(ctx context.Context, r SandboxRequest) (pid uint32, err error) {
	d, err := h.open(ctx, r)
	if err != nil {
		return 0, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.ShutdownSandbox(context.WithoutCancel(ctx), r.ID, r.Bundle))
		}
	}()
	create := &sandboxapi.CreateSandboxRequest{SandboxID: r.ID, BundlePath: r.Bundle, NetnsPath: r.NetNS, Annotations: r.Annotations}
	if h.Runtime.resident() {
		create.Options, err = typeurl.MarshalAnyToProto(&hostv1.SandboxOptions{SharePid: r.SharePID, UserNamespace: r.UserNS, CgroupPath: r.Cgroup})
	} else if r.ForeignConfig != nil {
		create.Options, err = typeurl.MarshalAnyToProto(r.ForeignConfig)
	}
	if err != nil {
		return 0, fmt.Errorf("encode sandbox options: %w", err)
	}
	err = d.call(ctx, false, func(ctx context.Context, c *conn) error {
		if _, err := c.sandbox.CreateSandbox(ctx, create); err != nil {
			return err
		}
		resp, err := c.sandbox.StartSandbox(ctx, &sandboxapi.StartSandboxRequest{SandboxID: r.ID})
		if err == nil {
			pid = resp.Pid
		}
		return err
	})
	if !h.Runtime.resident() && errdefs.IsNotImplemented(err) {
		if r.SharePID {
			return 0, fmt.Errorf("handler %q: its shim has no Sandbox API, so pods cannot share a PID namespace there: %w", h.Name, errdefs.ErrNotImplemented)
		}
		return 0, nil // a task shim: the sandbox is the shim process itself
	}
	if err != nil {
		return 0, fmt.Errorf("start sandbox on handler %q: %w", h.Name, err)
	}
	return pid, nil
}

// StopSandbox ends the sandbox's own processes. An absent sandbox is success.
func (h *Handler) StopSandbox(ctx context.Context, id, bundle string) error {
	d, err := h.connection(ctx, id, bundle)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	err = d.call(ctx, h.Runtime.resident(), func(ctx context.Context, c *conn) error {
		_, err := c.sandbox.StopSandbox(ctx, &sandboxapi.StopSandboxRequest{SandboxID: id, TimeoutSecs: 10})
		return err
	})
	return ignoreAbsent(err, h)
}

// WaitSandbox blocks until the sandbox's holder has ended.
func (h *Handler) WaitSandbox(ctx context.Context, id, bundle string) error {
	d, err := h.connection(ctx, id, bundle)
	if err != nil {
		return err
	}
	return d.call(ctx, true, func(ctx context.Context, c *conn) error {
		_, err := c.sandbox.WaitSandbox(ctx, &sandboxapi.WaitSandboxRequest{SandboxID: id})
		return err
	})
}

// ShutdownSandbox makes the shim forget the sandbox; an external shim ends.
// An absent sandbox is success.
func (h *Handler) ShutdownSandbox(ctx context.Context, id, bundle string) error {
	if !h.Runtime.resident() {
		return h.client.endExternal(ctx, h, id, bundle)
	}
	err := h.client.container.call(ctx, true, func(ctx context.Context, c *conn) error {
		_, err := c.sandbox.ShutdownSandbox(ctx, &sandboxapi.ShutdownSandboxRequest{SandboxID: id})
		return err
	})
	return ignoreAbsent(err, h)
}

func ignoreAbsent(err error, h *Handler) error {
	if err == nil || errdefs.IsNotFound(err) || (!h.Runtime.resident() && (errdefs.IsNotImplemented(err) || errdefs.IsUnavailable(err))) {
		return nil
	}
	return err
}

// open gives the connection for a new sandbox, starting an external shim.
func (h *Handler) open(ctx context.Context, r SandboxRequest) (*dialer, error) {
	if h.Runtime.resident() {
		return &h.client.container.dialer, nil
	}
	return h.client.startExternal(ctx, h, r)
}

// connection gives the connection for an existing sandbox.
func (h *Handler) connection(ctx context.Context, sandboxID, bundle string) (*dialer, error) {
	if h.Runtime.resident() {
		return &h.client.container.dialer, nil
	}
	return h.client.findExternal(ctx, sandboxID, bundle)
}
