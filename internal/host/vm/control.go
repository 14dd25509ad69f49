package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/status"

	guestv1 "cloister.dev/api/guest/v1"
	"cloister.dev/internal/host/vm/channel"
	"cloister.dev/internal/host/vm/machine"
)

// control is one connection for calls.
type control struct {
	client *ttrpc.Client
	guest  guestv1.GuestService
	port   string
	closed chan struct{}
}

func (c *control) close() {
	if c != nil {
		c.client.Close()
	}
}

func (c *control) alive() bool {
	if c == nil {
		return false
	}
	select {
	case <-c.closed:
		return false
	default:
		return true
	}
}

// connection gives the current connection, making one when there is none.
func (s *sandbox) connection(ctx context.Context) (*control, error) {
	s.dial.Lock()
	defer s.dial.Unlock()
	s.mu.Lock()
	old, m := s.ctl, s.m
	s.mu.Unlock()
	if old.alive() {
		return old, nil
	}
	if m == nil {
		return nil, fmt.Errorf("sandbox %s has no machine: %w", s.id, errdefs.ErrNotFound)
	}
	c, err := dial(ctx, m)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.ctl = c
	s.mu.Unlock()
	return c, nil
}

// dial plugs a new control port in, and the others out: they are of
// connections that broke, or of an earlier life.
func dial(ctx context.Context, m machine.Machine) (*control, error) {
	names, err := m.Ports(ctx)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if strings.HasPrefix(name, channel.ControlPrefix) {
			if err := m.RemovePort(ctx, name); err != nil {
				return nil, err
			}
		}
	}
	name := channel.ControlPrefix + unique()
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	nc, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return nil, err
	}
	if err := m.AddPort(ctx, machine.Port{Name: name, Direction: machine.BothWays, File: theirs}); err != nil {
		nc.Close()
		return nil, fmt.Errorf("plug the control port in: %w", err)
	}
	c := &control{port: name, closed: make(chan struct{})}
	c.client = ttrpc.NewClient(nc, ttrpc.WithOnClose(func() { close(c.closed) }))
	c.guest = guestv1.NewGuestClient(c.client)
	return c, nil
}

// socketPair makes two connected sockets.
func socketPair() (a, b *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	return os.NewFile(uintptr(fds[0]), "machine"), os.NewFile(uintptr(fds[1]), "machine"), nil
}

// errEnded tells that a machine has ended.
var errEnded = fmt.Errorf("the virtual machine has ended: %w", errdefs.ErrUnavailable)

// repeats is how often a call is tried whose connection broke.
const repeats = 5

// redialTime is between a connection that broke and the next one.
const redialTime = 50 * time.Millisecond

// call calls the guest. A connection that breaks while the machine lives is
// made again and the call repeated: the guest knows each of them by its task.
func (s *sandbox) call(ctx context.Context, f func(context.Context, guestv1.GuestService) error) error {
	m := s.machine()
	if m == nil {
		return fmt.Errorf("sandbox %s has no machine: %w", s.id, errdefs.ErrNotFound)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-m.Done():
			cancel() // nobody will answer
		case <-ctx.Done():
		}
	}()
	var err error
	for range repeats {
		var c *control
		if c, err = s.connection(ctx); err == nil {
			if err = f(ctx, c.guest); err == nil {
				return nil
			}
		}
		if ended(m) {
			return errEnded
		}
		if _, answered := status.FromError(err); answered {
			return errgrpc.ToNative(err)
		}
		if ctx.Err() != nil || !broken(err) && !errdefs.IsUnavailable(err) {
			return err
		}
		select {
		case <-m.Done():
			return errEnded
		case <-ctx.Done():
			return err
		case <-time.After(redialTime): // when QEMU dies, that is known a little later
		}
		s.backend.log.Warn("connection to a guest broke", "sandbox", s.id, "err", err)
	}
	return fmt.Errorf("call the guest: %w: %w", err, errdefs.ErrUnavailable)
}

func ended(m machine.Machine) bool {
	select {
	case <-m.Done():
		return true
	default:
		return false
	}
}

// broken tells whether err means that the connection, not the call, failed.
func broken(err error) bool {
	return errors.Is(err, ttrpc.ErrClosed) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)
}

// catchUp does what a machine needs once after it was taken up.
func (s *sandbox) catchUp() {
	ctx, cancel := context.WithTimeout(s.backend.ctx, stopTime)
	defer cancel()
	err := s.call(ctx, func(ctx context.Context, g guestv1.GuestService) error {
		_, err := g.SetTime(ctx, &guestv1.SetTimeRequest{TimeNanos: time.Now().UnixNano()})
		return err
	})
	if err != nil && ctx.Err() == nil {
		s.backend.log.Warn("guest's clock not set", "sandbox", s.id, "err", err)
	}
}
