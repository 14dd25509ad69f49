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
// last broke.
type dialer struct {
	connect func(context.Context) (*conn, error)

	mu   sync.Mutex // guards cur; held while connecting, so that one goroutine connects for all
	cur  *conn
	done bool
}

func (d *dialer) get(ctx context.Context) (*conn, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.done {
		return nil, fmt.Errorf("shim was shut down: %w", errdefs.ErrUnavailable)
	}
	if d.cur != nil && d.cur.alive() {
		return d.cur, nil
	}
	c, err := d.connect(ctx)
	if err != nil {
		return nil, err
	}
	d.cur = c
	return c, nil
}

func (d *dialer) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.done = true
	if d.cur != nil {
		d.cur.client.Close()
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
		if errors.Is(err, errGone) {
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
