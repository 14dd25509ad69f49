package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/status"

	hostv1 "cloister.dev/api/host/v1"
)

// containerdNamespace is where all our tasks live on shims that know
// containerd's namespaces.
const containerdNamespace = "k8s.io"

// conn is one ttrpc connection to a shim.
type conn struct {
	client  *ttrpc.Client
	task    taskapi.TTRPCTaskService
	sandbox sandboxapi.TTRPCSandboxService
	host    hostv1.HostService
	closed  chan struct{} // closed when the peer went away
}

func dial(ctx context.Context, address string) (*conn, error) {
	path := strings.TrimPrefix(address, "unix://")
	d := net.Dialer{}
	nc, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	c := &conn{closed: make(chan struct{})}
	var once sync.Once
	c.client = ttrpc.NewClient(nc, ttrpc.WithOnClose(func() { once.Do(func() { close(c.closed) }) }))
	c.task = taskapi.NewTTRPCTaskClient(c.client)
	c.sandbox = sandboxapi.NewTTRPCSandboxClient(c.client)
	c.host = hostv1.NewHostClient(c.client)
	return c, nil
}

func (c *conn) alive() bool {
	select {
	case <-c.closed:
		return false
	default:
		return true
	}
}

// dialer gives the current connection to one shim, making a new one when the
// last broke. One goroutine connects for all callers, each of which waits no
// longer than it wants to.
type dialer struct {
	connect func(context.Context) (*conn, error)

	mu     sync.Mutex // guards the rest; not held while connecting
	cur    *conn
	trying *dialing
	done   bool
}

// dialing is one attempt to connect.
type dialing struct {
	cancel context.CancelFunc
	ended  chan struct{} // closed when c and err are final
	c      *conn
	err    error
}

// connectTime bounds an attempt, whoever waits for it.
const connectTime = 15 * time.Second

var errShutDown = fmt.Errorf("shim was shut down: %w", errdefs.ErrUnavailable)

func (d *dialer) get(ctx context.Context) (*conn, error) {
	d.mu.Lock()
	if d.done {
		d.mu.Unlock()
		return nil, errShutDown
	}
	if d.cur != nil && d.cur.alive() {
		defer d.mu.Unlock()
		return d.cur, nil
	}
	t := d.trying
	if t == nil {
		t = &dialing{ended: make(chan struct{})}
		var own context.Context
		own, t.cancel = context.WithTimeout(context.WithoutCancel(ctx), connectTime)
		d.trying = t
		go d.try(own, t)
	}
	d.mu.Unlock()
	select {
	case <-t.ended:
		return t.c, t.err
	case <-ctx.Done():
		return nil, fmt.Errorf("connect to the shim: %w", ctx.Err())
	}
}

func (d *dialer) try(ctx context.Context, t *dialing) {
	defer close(t.ended)
	defer t.cancel()
	c, err := d.connect(ctx)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.trying = nil
	switch {
	case err != nil:
		t.err = err
	case d.done:
		t.err = errors.Join(errShutDown, c.client.Close())
	default:
		t.c, d.cur = c, c
	}
}

// close ends the connection, and an attempt to make one.
func (d *dialer) close() {
	d.mu.Lock()
	d.done = true
	cur, t := d.cur, d.trying
	d.mu.Unlock()
	if t != nil {
		t.cancel()
		<-t.ended
	}
	if cur != nil {
		cur.client.Close()
	}
}

// repeatTime bounds how long a repeatable call waits for a shim to come back.
const repeatTime = 15 * time.Second

// call runs f on the current connection. When repeatable, a broken connection
// is replaced and f runs again. A call that waited for long before it broke
// gets the whole time to try again.
func (d *dialer) call(ctx context.Context, repeatable bool, f func(context.Context, *conn) error) error {
	md := ttrpc.MD{}
	md.Set("containerd-namespace-ttrpc", containerdNamespace)
	ctx = ttrpc.WithMetadata(ctx, md)
	deadline := time.Now().Add(repeatTime)
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		c, err := d.get(ctx)
		sent := err == nil
		if sent {
			began := time.Now()
			err = f(ctx, c)
			if err == nil {
				return nil
			}
			if _, answered := status.FromError(err); answered {
				return errgrpc.ToNative(err)
			}
			if !broken(err) {
				return err
			}
			if time.Since(began) > repeatTime {
				deadline, pause = time.Now().Add(repeatTime), 5*time.Millisecond
			}
		}
		if errors.Is(err, errGone) || errors.Is(err, errShutDown) {
			return err
		}
		if sent && !repeatable || time.Now().After(deadline) {
			return fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
	}
}

// broken tells whether err means that the connection, not the call, failed.
func broken(err error) bool {
	return errors.Is(err, ttrpc.ErrClosed) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)
}
