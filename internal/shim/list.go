package shim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"

	hostv1 "cloister.dev/api/host/v1"
)

// Held is what the resident shim keeps a record of, by kind: "task", "sandbox"
// or "pump" (the streams of a container that another shim runs).
type Held struct {
	Kind, ID string
	Path     string // of the record
	shim     *resident
}

var heldFolders = [...]struct{ kind, folder string }{{"task", "tasks"}, {"sandbox", "sandboxes"}, {"pump", "pumps"}}

// Held lists what the resident shim keeps. It reads the shim's records and so
// neither starts the shim nor waits for it.
func (c *Client) Held() ([]Held, error) {
	var all []Held
	for _, r := range []*resident{c.container, c.machine} {
		for _, f := range heldFolders {
			dir := filepath.Join(r.dir, f.folder)
			entries, err := os.ReadDir(dir)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("list what the shim holds: %w", err)
			}
			for _, e := range entries {
				if e.IsDir() {
					all = append(all, Held{Kind: f.kind, ID: e.Name(), Path: filepath.Join(dir, e.Name()), shim: r})
				}
			}
		}
	}
	return all, nil
}

// Release ends what the resident shim holds of something that nobody owns, and
// makes it forget that. A task is killed. What is absent is success.
func (*Client) Release(ctx context.Context, what Held) error {
	err := what.shim.call(ctx, true, func(ctx context.Context, cn *conn) error {
		switch what.Kind {
		case "task":
			return releaseTask(ctx, cn, what.ID)
		case "sandbox":
			_, err := cn.sandbox.ShutdownSandbox(ctx, &sandboxapi.ShutdownSandboxRequest{SandboxID: what.ID})
			return err
		case "pump":
			_, err := cn.host.CloseIO(ctx, &hostv1.CloseIORequest{Id: what.ID})
			return err
		}
		return fmt.Errorf("the shim holds no %q: %w", what.Kind, errdefs.ErrInvalidArgument)
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("make the shim release %s %s: %w", what.Kind, what.ID, err)
	}
	return nil
}

// releaseTask kills and deletes a task. One that has ended, or was never
// started, cannot be killed, and Delete tells whether that was so.
func releaseTask(ctx context.Context, cn *conn, id string) error {
	if _, err := cn.task.Kill(ctx, &taskapi.KillRequest{ID: id, Signal: uint32(syscall.SIGKILL), All: true}); err == nil {
		if _, err := cn.task.Wait(ctx, &taskapi.WaitRequest{ID: id}); err != nil {
			return err
		}
	}
	_, err := cn.task.Delete(ctx, &taskapi.DeleteRequest{ID: id})
	return err
}
