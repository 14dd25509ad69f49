package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	hostv1 "cloister.dev/api/host/v1"
)

// Socket is where the host of a state folder listens.
func Socket(dir string) string { return filepath.Join(dir, "shim.sock") }

// Listen makes the socket, in place of one that a killed predecessor left.
func Listen(dir string) (net.Listener, error) {
	path := Socket(dir)
	if len(path) > 107 {
		return nil, fmt.Errorf("the state folder's path is too long for a socket in it: %s", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove the old socket: %w", err)
	}
	old := unix.Umask(0o177)
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	return l, nil
}

// Serve answers calls on l until ctx ends.
func (h *Host) Serve(ctx context.Context, l net.Listener) error {
	srv, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(typeErrors))
	if err != nil {
		return err
	}
	taskapi.RegisterTTRPCTaskService(srv, taskService{h})
	sandboxapi.RegisterTTRPCSandboxService(srv, sandboxService{h})
	hostv1.RegisterHostService(srv, hostService{h})
	if err := writeAddress(h.dir); err != nil {
		return err
	}
	// Calls end with their connection, not with ctx.
	served := make(chan error, 1)
	go func() { served <- srv.Serve(context.WithoutCancel(ctx), l) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	// Calls that wait for an exit would wait for ever; others get a moment.
	sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if srv.Shutdown(sctx) != nil {
		_ = srv.Close()
	}
	if err := <-served; !errors.Is(err, ttrpc.ErrServerClosed) {
		return err
	}
	return nil
}

// typeErrors gives errors their gRPC code.
func typeErrors(ctx context.Context, unmarshal ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	resp, err := method(ctx, unmarshal)
	return resp, errgrpc.ToGRPC(err)
}

func writeAddress(dir string) error {
	path := filepath.Join(dir, "address")
	if err := os.WriteFile(path+".new", []byte("unix://"+Socket(dir)), 0o600); err != nil {
		return fmt.Errorf("write the address: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("write the address: %w", err)
	}
	return nil
}
