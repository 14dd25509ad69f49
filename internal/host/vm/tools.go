package vm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/containerd/errdefs"

	guestv1 "cloister.dev/api/guest/v1"
	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/host/vm/channel"
	"cloister.dev/internal/host/vm/machine"
)

// Forward is part of host.Machines.
func (b *Backend) Forward(ctx context.Context, id string, port uint16, socket string) error {
	s, err := b.sandbox(ctx, id)
	if err != nil {
		return err
	}
	var d net.Dialer
	client, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return fmt.Errorf("connect to the client's socket: %w", err)
	}
	stream, name, err := s.dialGuest(ctx, port)
	if err != nil {
		client.Close()
		return err
	}
	b.workers.Go(func() {
		stop := context.AfterFunc(b.ctx, func() { stream.Close(); client.Close() })
		defer stop()
		channel.Join(client.(*net.UnixConn), channel.NewDuplex(stream)) //nolint:forcetypeassert // dialled as unix
		ctx, cancel := context.WithTimeout(context.WithoutCancel(b.ctx), stopTime)
		defer cancel()
		if err := s.machine().RemovePort(ctx, name); err != nil && !ended(s.machine()) {
			b.log.Warn("port of a forwarded connection not unplugged", "sandbox", id, "err", err)
		}
	})
	return nil
}

// dialGuest connects to a port in the machine.
func (s *sandbox) dialGuest(ctx context.Context, port uint16) (stream *os.File, name string, err error) {
	name = unique() + portForward
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, "", err
	}
	defer theirs.Close()
	if err := s.addPort(ctx, machine.Port{Name: name, Direction: machine.BothWays, File: theirs}); err != nil {
		ours.Close()
		return nil, "", err
	}
	err = s.call(ctx, func(ctx context.Context, g guestv1.GuestService) error {
		_, err := g.Dial(ctx, &guestv1.DialRequest{PortName: name, Port: uint32(port)})
		return err
	})
	if err != nil {
		ours.Close()
		return nil, "", errors.Join(err, s.machine().RemovePort(context.WithoutCancel(ctx), name))
	}
	return ours, name, nil
}

// Machines is part of host.Machines.
func (b *Backend) Machines(ctx context.Context, r *hostv1.MachinesRequest) (*hostv1.MachinesResponse, error) {
	b.mu.Lock()
	var all []*sandbox
	for id, s := range b.sandboxes {
		if r.SandboxId == "" || r.SandboxId == id {
			all = append(all, s)
		}
	}
	b.mu.Unlock()
	resp := &hostv1.MachinesResponse{}
	for _, s := range all {
		rec, m := s.record(), s.machine()
		if m == nil {
			continue
		}
		d := &hostv1.Machine{SandboxId: s.id, Pid: uint32(rec.Machine.Pid), MachineType: rec.Machine.Type, Accel: rec.Accel, Kernel: rec.Kernel,
			Cpus: rec.Machine.Size.CPUs, Memory: rec.Machine.Size.Memory, BootMillis: rec.BootTook.Milliseconds()}
		switch {
		case ended(m):
			d.State = "ended"
		case rec.Up:
			d.State = "running"
		default:
			d.State = "booting"
		}
		if r.Console {
			d.Console = []byte(lastLines(m.Console(ctx), 1000))
		}
		resp.Machines = append(resp.Machines, d)
	}
	if r.SandboxId != "" && len(resp.Machines) == 0 {
		return nil, fmt.Errorf("the machine of sandbox %q: %w", r.SandboxId, errdefs.ErrNotFound)
	}
	return resp, nil
}

// RunInMachine is part of host.Machines.
func (b *Backend) RunInMachine(ctx context.Context, r *hostv1.RunInMachineRequest) (*hostv1.RunInMachineResponse, error) {
	s, err := b.sandbox(ctx, r.SandboxId)
	if err != nil {
		return nil, err
	}
	resp := &hostv1.RunInMachineResponse{}
	err = s.call(ctx, func(ctx context.Context, g guestv1.GuestService) error {
		if len(r.Args) == 0 { // the machine's figures
			m, err := g.Metrics(ctx, nil)
			resp.Stdout = m.GetText()
			return err
		}
		out, err := g.Run(ctx, &guestv1.RunRequest{Args: r.Args})
		if err == nil {
			resp.Status, resp.Stdout, resp.Stderr = out.Status, out.Stdout, out.Stderr
		}
		return err
	})
	return resp, err
}
