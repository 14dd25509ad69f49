package shim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/proto"
)

const (
	// shutdownTime bounds the wait for the end of a shim that was told to end.
	shutdownTime = 10 * time.Second
	// deleteTime bounds a shim's delete command.
	deleteTime = 30 * time.Second
	// leftOpen bounds the wait for the output of a shim's command that has
	// ended, but left it to a child.
	leftOpen = 5 * time.Second
)

// endExternal ends the sandbox's shim and waits until it is gone. An absent
// one is success; for one that has died its delete command cleans up.
func (c *Client) endExternal(ctx context.Context, h *Handler, id, bundle string) error {
	e, err := c.findExternal(id, bundle)
	if errdefs.IsNotFound(err) {
		if _, err := os.Stat(filepath.Join(bundle, groupSpecFile)); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		// A start was cut off before it was noted where the shim listens;
		// a repeat of it tells.
		if e, err = c.startExternal(ctx, h, id, bundle); err != nil && ctx.Err() == nil {
			c.log.Warn("the sandbox's shim cannot be started again to be ended", "sandbox", id, "err", err)
			return nil
		}
	}
	if err != nil {
		return err
	}
	if err = e.shutDown(ctx, id); errors.Is(err, errGone) {
		c.log.Warn("the sandbox's shim has died, cleaning up after it", "sandbox", id)
		_, err = c.runDelete(ctx, h, id, bundle)
	}
	if err != nil {
		return fmt.Errorf("end the shim of sandbox %s: %w", id, err)
	}
	c.mu.Lock()
	delete(c.externals, id)
	c.mu.Unlock()
	e.close()
	for _, file := range []string{strings.TrimPrefix(e.address, "unix://"), filepath.Join(bundle, bootstrapFile), filepath.Join(bundle, groupSpecFile)} {
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("clean up after the shim of sandbox %s: %w", id, err)
		}
	}
	return nil
}

// wait blocks until the shim has ended.
func (e *external) wait(ctx context.Context) error {
	for {
		c, err := e.get(ctx)
		if errors.Is(err, errGone) {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case <-c.closed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// shutDown asks the shim to end and waits for that; one that does not is
// killed. errGone: it had ended before.
func (e *external) shutDown(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, shutdownTime)
	defer cancel()
	var asked *conn
	var pid uint32
	err := e.call(ctx, true, func(ctx context.Context, c *conn) error {
		asked = c
		if r, err := c.task.Connect(ctx, &taskapi.ConnectRequest{ID: id}); err == nil {
			pid = r.ShimPid
		}
		_, err := c.sandbox.ShutdownSandbox(ctx, &sandboxapi.ShutdownSandboxRequest{SandboxID: id})
		if err != nil && !errdefs.IsNotImplemented(errgrpc.ToNative(err)) {
			return err
		}
		_, err = c.task.Shutdown(ctx, &taskapi.ShutdownRequest{ID: id, Now: true})
		return err
	})
	if asked == nil {
		return err
	}
	if err != nil && !errors.Is(err, errGone) && !errdefs.IsNotFound(err) && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	select {
	case <-asked.closed:
		return nil
	case <-ctx.Done():
	}
	if pid == 0 {
		return fmt.Errorf("the shim does not end: %w", ctx.Err())
	}
	// Its connection is open, so the pid is still its own.
	if err := syscall.Kill(int(pid), syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("kill the shim, process %d, which does not end: %w", pid, err)
	}
	<-asked.closed
	return nil
}

// runDelete runs the delete command of a shim that has died: for a container
// in its bundle it kills what runs and tells how the container ended.
func (c *Client) runDelete(ctx context.Context, h *Handler, id, bundle string) (*taskapi.DeleteResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, deleteTime)
	defer cancel()
	out, err := c.runShim(ctx, h, bundle, nil, append([]string{"-bundle", bundle}, c.shimArgs(id, "delete")...)...)
	if err != nil {
		return nil, err
	}
	var r taskapi.DeleteResponse
	if err := proto.Unmarshal(out, &r); err != nil {
		return nil, fmt.Errorf("the shim's delete (handler %q) answered what is no DeleteResponse: %w", h.Name, err)
	}
	return &r, nil
}
