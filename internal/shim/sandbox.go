package shim

import (
	"context"
	"errors"
	"fmt"
	"time"

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

	// What a sandbox with a kernel of its own is told.
	HostNetwork, HostPID, HostIPC    bool // namespaces of the node that it wants
	Hostname                         string
	Sysctls                          map[string]string
	CPUQuota, CPUPeriod, MemoryLimit int64 // sums of the containers' limits
}

// cleanTime bounds the clean-up after a failed start.
const cleanTime = 30 * time.Second

// StartSandbox creates and starts a sandbox on the handler's shim and gives
// the pid of its holder, 0 when there is none. On error nothing is left.
func (h *Handler) StartSandbox(ctx context.Context, r SandboxRequest) (pid uint32, err error) {
	defer func() {
		if err != nil {
			clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTime)
			defer cancel()
			err = errors.Join(err, h.ShutdownSandbox(clean, r.ID, r.Bundle))
		}
	}()
	ours := &hostv1.SandboxOptions{SharePid: r.SharePID, UserNamespace: r.UserNS, CgroupPath: r.Cgroup,
		HostNetwork: r.HostNetwork, HostPid: r.HostPID, HostIpc: r.HostIPC, Hostname: r.Hostname, Sysctls: r.Sysctls,
		CpuQuota: r.CPUQuota, CpuPeriod: r.CPUPeriod, MemoryLimit: r.MemoryLimit}
	if ours.Extra, err = h.Runtime.extra(); err != nil {
		return 0, fmt.Errorf("encode the handler's options: %w", err)
	}
	if h.Runtime.resident() {
		pid, err = r.start(ctx, &h.home().dialer, ours)
	} else {
		var e *external
		if e, err = h.client.startExternal(ctx, h, r.ID, r.Bundle); err != nil {
			return 0, err
		}
		pid, err = r.start(ctx, &e.dialer, r.ForeignConfig)
		if errdefs.IsNotImplemented(err) { // a task shim: the sandbox is the shim process itself
			pid, err = 0, nil
			if r.SharePID {
				pid, err = h.holdElsewhere(ctx, r, ours)
			}
		}
	}
	if err != nil {
		return 0, fmt.Errorf("start sandbox on handler %q: %w", h.Name, err)
	}
	return pid, nil
}

// holdElsewhere lets the resident shim hold the PID namespace that the
// containers of an external task shim share.
func (h *Handler) holdElsewhere(ctx context.Context, r SandboxRequest, o proto.Message) (pid uint32, err error) {
	if !h.runsRunc() {
		return 0, fmt.Errorf("its shim has no Sandbox API, so pods cannot share a PID namespace there: %w", errdefs.ErrNotImplemented)
	}
	return r.start(ctx, &h.client.container.dialer, o)
}

// start creates and starts the sandbox on one shim.
func (r SandboxRequest) start(ctx context.Context, d *dialer, options proto.Message) (pid uint32, err error) {
	create := &sandboxapi.CreateSandboxRequest{SandboxID: r.ID, BundlePath: r.Bundle, NetnsPath: r.NetNS, Annotations: r.Annotations}
	if options != nil {
		if create.Options, err = typeurl.MarshalAnyToProto(options); err != nil {
			return 0, fmt.Errorf("encode sandbox options: %w", err)
		}
	}
	err = d.call(ctx, false, func(ctx context.Context, c *conn) error {
		// Not to be cut off: the clean-up that follows could overtake it.
		prepare, cancel := context.WithTimeout(context.WithoutCancel(ctx), prepareTime)
		defer cancel()
		if _, err := c.sandbox.CreateSandbox(prepare, create); err != nil {
			return err
		}
		resp, err := c.sandbox.StartSandbox(ctx, &sandboxapi.StartSandboxRequest{SandboxID: r.ID})
		if err == nil {
			pid = resp.Pid
		}
		return err
	})
	return pid, err
}

// StopSandbox ends the sandbox's own processes. An absent sandbox is success.
func (h *Handler) StopSandbox(ctx context.Context, id, bundle string) error {
	stop := func(ctx context.Context, c *conn) error {
		_, err := c.sandbox.StopSandbox(ctx, &sandboxapi.StopSandboxRequest{SandboxID: id, TimeoutSecs: 10})
		return err
	}
	if !h.Runtime.resident() {
		if err := h.onExternal(ctx, id, bundle, stop); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsNotImplemented(err) {
			return err
		}
		if !h.runsRunc() {
			return nil
		}
	}
	return ignoreAbsent(h.home().call(ctx, true, stop))
}

// WaitSandbox blocks until the sandbox's holder has ended; on an external
// shim without one, until the shim has.
func (h *Handler) WaitSandbox(ctx context.Context, id, bundle string) error {
	wait := func(ctx context.Context, c *conn) error {
		_, err := c.sandbox.WaitSandbox(ctx, &sandboxapi.WaitSandboxRequest{SandboxID: id})
		return err
	}
	if h.Runtime.resident() {
		return h.home().call(ctx, true, wait)
	}
	err := h.onExternal(ctx, id, bundle, wait)
	if errors.Is(err, errGone) {
		return nil
	}
	if !errdefs.IsNotImplemented(err) {
		return err
	}
	if h.runsRunc() {
		if err := h.client.container.call(ctx, true, wait); !errdefs.IsNotFound(err) {
			return err
		}
	}
	e, err := h.client.findExternal(id, bundle)
	if err != nil {
		return err
	}
	return e.wait(ctx)
}

// ShutdownSandbox makes the shim forget the sandbox; an external shim ends.
// An absent sandbox is success.
func (h *Handler) ShutdownSandbox(ctx context.Context, id, bundle string) error {
	if !h.Runtime.resident() {
		if err := h.client.endExternal(ctx, h, id, bundle); err != nil || !h.runsRunc() {
			return err
		}
	}
	return ignoreAbsent(h.home().call(ctx, true, func(ctx context.Context, c *conn) error {
		_, err := c.sandbox.ShutdownSandbox(ctx, &sandboxapi.ShutdownSandboxRequest{SandboxID: id})
		return err
	}))
}

func ignoreAbsent(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// onExternal calls the external shim of an existing sandbox. Every call that
// goes there may be repeated: a connection breaks when the shim ends, and then
// the repeat finds that out.
func (h *Handler) onExternal(ctx context.Context, id, bundle string, f func(context.Context, *conn) error) error {
	e, err := h.client.findExternal(id, bundle)
	if err != nil {
		return err
	}
	return e.call(ctx, true, f)
}

// connection gives the connection for an existing sandbox.
func (h *Handler) connection(sandboxID, bundle string) (*dialer, error) {
	if h.Runtime.resident() {
		return &h.home().dialer, nil
	}
	e, err := h.client.findExternal(sandboxID, bundle)
	if err != nil {
		return nil, err
	}
	return &e.dialer, nil
}

// Forward makes the sandbox's shim connect a port on the loopback address in
// the sandbox's machine with the unix socket at path.
func (h *Handler) Forward(ctx context.Context, id string, port uint16, path string) error {
	return h.home().call(ctx, false, func(ctx context.Context, c *conn) error {
		_, err := c.host.Forward(ctx, &hostv1.ForwardRequest{SandboxId: id, Port: uint32(port), Socket: path})
		return err
	})
}

// Machines lists the virtual machines of the node, with their consoles when
// one is asked for.
func (c *Client) Machines(ctx context.Context, sandbox string, console bool) ([]*hostv1.Machine, error) {
	var all []*hostv1.Machine
	err := c.machine.call(ctx, true, func(ctx context.Context, cn *conn) error {
		resp, err := cn.host.Machines(ctx, &hostv1.MachinesRequest{SandboxId: sandbox, Console: console})
		all = resp.GetMachines()
		return err
	})
	return all, err
}

// RunInMachine runs a program of the guest; without arguments it gives the
// guest's figures.
func (c *Client) RunInMachine(ctx context.Context, sandbox string, args []string) (*hostv1.RunInMachineResponse, error) {
	var out *hostv1.RunInMachineResponse
	err := c.machine.call(ctx, false, func(ctx context.Context, cn *conn) (err error) {
		out, err = cn.host.RunInMachine(ctx, &hostv1.RunInMachineRequest{SandboxId: sandbox, Args: args})
		return err
	})
	return out, err
}
