package cri

import (
	"context"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/pod"
	"cloister.dev/internal/stream"
)

// Exec prepares a command in a running container.
func (s *Server) Exec(_ context.Context, r *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	c, err := s.running(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	r.ContainerId = c.ID
	return s.stream.GetExec(r)
}

// Attach prepares an attachment to a running container.
func (s *Server) Attach(_ context.Context, r *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	c, err := s.running(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	r.ContainerId = c.ID
	return s.stream.GetAttach(r)
}

// PortForward prepares connections into a pod.
func (s *Server) PortForward(_ context.Context, r *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	sb, err := s.pods.Sandbox(r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if sb.State != runtimeapi.PodSandboxState_SANDBOX_READY {
		return nil, fmt.Errorf("pod sandbox %.13s is not ready, ports of a stopped pod cannot be reached: %w", sb.ID, errdefs.ErrFailedPrecondition)
	}
	r.PodSandboxId = sb.ID
	return s.stream.GetPortForward(r)
}

func (s *Server) running(id string) (pod.Container, error) {
	c, err := s.pods.Container(id)
	if err != nil {
		return c, err
	}
	if c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return c, fmt.Errorf("container %.13s is not running (%s): %w", c.ID, c.State, errdefs.ErrFailedPrecondition)
	}
	return c, nil
}

// StreamRuntime is what a streaming server for these pods streams to.
func StreamRuntime(p Pods) stream.Runtime { return streamRuntime{p} }

type streamRuntime struct{ pods Pods }

func (r streamRuntime) Exec(ctx context.Context, id string, cmd []string, st stream.Streams, tty bool, resize <-chan stream.Size) (int32, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	return r.pods.Exec(ctx, id, cmd, pod.Streams(st), tty, sizes(ctx, resize))
}

func (r streamRuntime) Attach(ctx context.Context, id string, st stream.Streams, tty bool, resize <-chan stream.Size) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	return r.pods.Attach(ctx, id, pod.Streams(st), tty, sizes(ctx, resize))
}

func (r streamRuntime) PortForward(ctx context.Context, sandboxID string, port int32, conn io.ReadWriteCloser) error {
	return r.pods.PortForward(ctx, sandboxID, port, conn)
}

// sizes passes terminal sizes from one package's type to the other's until
// either end is done.
func sizes(ctx context.Context, from <-chan stream.Size) <-chan pod.Size {
	if from == nil {
		return nil
	}
	to := make(chan pod.Size)
	go func() {
		defer close(to)
		for {
			select {
			case size, ok := <-from:
				if !ok {
					return
				}
				select {
				case to <- pod.Size(size):
				case <-ctx.Done():
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return to
}
