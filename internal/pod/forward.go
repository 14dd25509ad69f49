package pod

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// PortForward connects conn to a port of the pod, on its loopback address.
func (s *Service) PortForward(ctx context.Context, sandboxID string, port int32, conn io.ReadWriteCloser) error {
	sb, err := s.index.sandbox(sandboxID)
	if err != nil {
		return err
	}
	v := sb.get()
	if v.State != runtimeapi.PodSandboxState_SANDBOX_READY {
		return fmt.Errorf("pod sandbox %.13s is not ready: %w", v.ID, errdefs.ErrFailedPrecondition)
	}
	peer, err := s.dialPort(ctx, sb, port)
	if err != nil {
		return fmt.Errorf("connect to port %d in pod %s: %w", port, sb.record().Name, err)
	}
	defer peer.Close()
	stop := context.AfterFunc(ctx, func() { peer.Close(); conn.Close() })
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() {
		// Either side may go away at any time; the other direction tells.
		_, _ = io.Copy(peer, conn)
		if c, ok := peer.(interface{ CloseWrite() error }); ok {
			_ = c.CloseWrite()
		}
	})
	_, err = io.Copy(conn, peer)
	conn.Close()
	wg.Wait()
	if errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.ECONNRESET) {
		return nil
	}
	return err
}

// dialPort connects to a port on the pod's loopback address.
func (s *Service) dialPort(ctx context.Context, sb *sandbox, port int32) (net.Conn, error) {
	if !sb.handler.Machine() {
		return dialPod(ctx, sb.get().NetNS, port)
	}
	// That address is in another kernel: the shim brings a connection here.
	path := filepath.Join(s.podDir(sb.record().ID), fmt.Sprintf("f%d", s.forwards.Add(1)))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen for the shim: %w", err)
	}
	defer l.Close() // and removes the socket
	if err := l.SetDeadline(time.Now().Add(forwardTime)); err != nil {
		return nil, err
	}
	if err := sb.handler.Forward(ctx, sb.record().ID, uint16(port), path); err != nil {
		return nil, err
	}
	return l.Accept() // the shim has connected before it answered
}

// forwardTime bounds the wait for the shim's connection.
const forwardTime = 30 * time.Second

// dialPod dials from inside the pod's network namespace; a socket stays in
// the namespace that it was made in.
func dialPod(ctx context.Context, netns string, port int32) (net.Conn, error) {
	var c net.Conn
	dial := func() error {
		var errs []error
		for _, host := range []string{"127.0.0.1", "::1"} {
			var d net.Dialer
			var err error
			c, err = d.DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(int(port))))
			if err == nil {
				return nil
			}
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	}
	run := func(f func() error) error { return f() }
	if netns != "" {
		run = func(f func() error) error { return inNetNS(netns, f) }
	}
	if err := run(dial); err != nil {
		return nil, err
	}
	return c, nil
}
