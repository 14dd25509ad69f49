package stream

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/utils/exec"
)

// runtime is the Runtime as the protocols of cri-streaming call it. It turns
// panics into errors: some of them call it from goroutines that nobody guards.
type runtime struct {
	rt  Runtime
	log *slog.Logger
}

// exec reports an exit code other than 0 as the error the protocols expect.
func (r runtime) exec(ctx context.Context, id string, cmd []string, st Streams, tty bool, resize <-chan Size) (err error) {
	defer r.guard("exec", id, &err)
	code, err := r.rt.Exec(ctx, id, cmd, st, tty, resize)
	if err == nil && code != 0 {
		err = exec.CodeExitError{Code: int(code), Err: fmt.Errorf("exit status %d", code)}
	}
	return err
}

func (r runtime) attach(ctx context.Context, id string, st Streams, tty bool, resize <-chan Size) (err error) {
	defer r.guard("attach", id, &err)
	return r.rt.Attach(ctx, id, st, tty, resize)
}

func (r runtime) portForward(ctx context.Context, id string, port int32, conn io.ReadWriteCloser) (err error) {
	defer r.guard("port-forward", id, &err)
	return r.rt.PortForward(ctx, id, port, conn)
}

func (r runtime) guard(what, id string, err *error) {
	if p := recover(); p != nil {
		r.log.Error("panic while streaming", "call", what, "id", id, "panic", p, "stack", string(debug.Stack()))
		*err = fmt.Errorf("%s: internal error, see the daemon's log: %w", what, errdefs.ErrInternal)
	}
}

// executor serves one exec or attach. It hands on only the streams that the
// request asked for: WebSocket connections have all of them.
type executor struct {
	rt   runtime
	opts *remotecommand.Options
}

// ExecInContainer implements remotecommand.Executor.
func (e executor) ExecInContainer(ctx context.Context, _, _, id string, cmd []string, in io.Reader, out, err io.WriteCloser, tty bool, resize <-chan Size, _ time.Duration) error {
	return e.rt.exec(ctx, id, cmd, e.wanted(in, out, err), tty, latest(ctx, resize))
}

// AttachContainer implements remotecommand.Attacher.
func (e executor) AttachContainer(ctx context.Context, _, _, id string, in io.Reader, out, err io.WriteCloser, tty bool, resize <-chan Size) error {
	return e.rt.attach(ctx, id, e.wanted(in, out, err), tty, latest(ctx, resize))
}

func (e executor) wanted(in io.Reader, out, err io.WriteCloser) Streams {
	var st Streams
	if e.opts.Stdin {
		st.In = in
	}
	if e.opts.Stdout {
		st.Out = out
	}
	if e.opts.Stderr {
		st.Err = err
	}
	return st
}

// latest passes sizes on and drops those that were overtaken by newer ones. A
// runtime that takes none would otherwise hold up the whole connection.
func latest(ctx context.Context, sizes <-chan Size) <-chan Size {
	if sizes == nil {
		return nil
	}
	out := make(chan Size)
	go func() {
		defer close(out)
		var size Size
		var send chan Size // nil, and so never ready, while there is nothing to send
		for {
			select {
			case s, ok := <-sizes:
				if !ok {
					return
				}
				size, send = s, out
			case send <- size:
				send = nil
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

// forwarder serves the connections of one port-forward request.
type forwarder struct {
	ctx context.Context // the request's; the protocols pass a background one
	rt  runtime

	mu     sync.Mutex // guards closed and adding to work
	closed bool
	work   sync.WaitGroup
}

// PortForward implements portforward.PortForwarder.
func (f *forwarder) PortForward(_ context.Context, id, _ string, port int32, conn io.ReadWriteCloser) error {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return fmt.Errorf("the client is gone: %w", context.Canceled)
	}
	f.work.Add(1)
	f.mu.Unlock()
	defer f.work.Done()
	return f.rt.portForward(f.ctx, id, port, conn)
}

// wait admits no further connections and waits for those there are.
func (f *forwarder) wait() {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	f.work.Wait()
}
