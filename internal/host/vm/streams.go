package vm

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	guestv1 "cloister.dev/api/guest/v1"
	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/vm/channel"
	"cloister.dev/internal/host/vm/machine"
)

// Suffixes of the names of a process's ports.
const (
	portIn       = ".i"
	portOut      = ".o"
	portErr      = ".e"
	portTerminal = ".t"
	portForward  = ".f"
)

// plug plugs the ports of a process in. console is our end of its terminal.
func (s *sandbox) plug(ctx context.Context, base string, st backend.Streams) (names *guestv1.Streams, console *os.File, err error) {
	defer func() {
		if err != nil {
			_ = s.unplug(context.WithoutCancel(ctx), base) // the error says enough
			if console != nil {
				console.Close()
			}
		}
	}()
	names = &guestv1.Streams{}
	if st.Terminal {
		ours, theirs, err := socketPair()
		if err != nil {
			return nil, nil, err
		}
		defer theirs.Close()
		names.Terminal = base + portTerminal
		return names, ours, s.addPort(ctx, machine.Port{Name: names.Terminal, Direction: machine.BothWays, File: theirs})
	}
	for _, p := range []struct {
		file *os.File
		name *string
		tail string
		kind machine.Direction
		mode int
	}{
		{st.Stdin, &names.Stdin, portIn, machine.ToGuest, unix.O_RDONLY},
		{st.Stdout, &names.Stdout, portOut, machine.FromGuest, unix.O_WRONLY},
		{st.Stderr, &names.Stderr, portErr, machine.FromGuest, unix.O_WRONLY},
	} {
		if p.file == nil {
			continue
		}
		*p.name = base + p.tail
		if err := s.plugFile(ctx, *p.name, p.kind, p.file, p.mode); err != nil {
			return nil, nil, err
		}
	}
	return names, nil, nil
}

func (s *sandbox) addPort(ctx context.Context, p machine.Port) error {
	err := s.machine().AddPort(ctx, p)
	if err == nil {
		return nil
	}
	if names, e := s.machine().Ports(ctx); e == nil && len(names) >= channel.MaxPorts-1 {
		return fmt.Errorf("the machine has no free stream, all %d are taken: a container needs two or three, a running exec up to three, a forwarded connection one: %w",
			len(names), errdefs.ErrResourceExhausted)
	}
	return fmt.Errorf("plug a stream into the machine: %w", err)
}

// plugFile plugs in a port on a second opening of a stream, for the machine
// alone: in one direction, so that it sees the end of a pipe, and never waiting.
func (s *sandbox) plugFile(ctx context.Context, name string, kind machine.Direction, f *os.File, mode int) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	fd := -1
	var e error
	if err := rc.Control(func(h uintptr) {
		fd, e = unix.Open(fmt.Sprintf("/proc/self/fd/%d", h), mode|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	}); err != nil {
		return err
	}
	if e != nil {
		return fmt.Errorf("open a stream for the machine: %w", e)
	}
	second := os.NewFile(uintptr(fd), name)
	defer second.Close()
	return s.addPort(ctx, machine.Port{Name: name, Direction: kind, File: second})
}

// unplug removes the ports of a process. Absent ones are success.
func (s *sandbox) unplug(ctx context.Context, base string) error {
	m := s.machine()
	names, err := m.Ports(ctx)
	if err != nil {
		return err
	}
	for _, n := range names {
		if len(n) == len(base)+len(portOut) && n[:len(base)] == base {
			if err := m.RemovePort(ctx, n); err != nil {
				return err
			}
		}
	}
	return nil
}
