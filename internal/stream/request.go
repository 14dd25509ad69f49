package stream

import (
	"fmt"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// GetExec prepares a command in a container.
func (s *Server) GetExec(req *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	if len(req.GetCmd()) == 0 {
		return nil, fmt.Errorf("exec: cmd is empty: %w", errdefs.ErrInvalidArgument)
	}
	if err := checkStreams("exec", req.GetContainerId(), req.GetStdin(), req.GetStdout(), req.GetStderr(), req.GetTty()); err != nil {
		return nil, err
	}
	url, err := s.prepare("exec", req)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ExecResponse{Url: url}, nil
}

// GetAttach prepares an attachment to a container.
func (s *Server) GetAttach(req *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	if err := checkStreams("attach", req.GetContainerId(), req.GetStdin(), req.GetStdout(), req.GetStderr(), req.GetTty()); err != nil {
		return nil, err
	}
	url, err := s.prepare("attach", req)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.AttachResponse{Url: url}, nil
}

// GetPortForward prepares connections to ports of a sandbox. SPDY clients name
// the ports as they connect; the request's list is for WebSocket clients.
func (s *Server) GetPortForward(req *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	if req.GetPodSandboxId() == "" {
		return nil, fmt.Errorf("port-forward: pod_sandbox_id is empty: %w", errdefs.ErrInvalidArgument)
	}
	for _, p := range req.GetPort() {
		if p < 1 || p > 65535 {
			return nil, fmt.Errorf("port-forward: %d is not a port: %w", p, errdefs.ErrInvalidArgument)
		}
	}
	url, err := s.prepare("portforward", req)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.PortForwardResponse{Url: url}, nil
}

func checkStreams(what, id string, in, out, err, tty bool) error {
	switch {
	case id == "":
		return fmt.Errorf("%s: container_id is empty: %w", what, errdefs.ErrInvalidArgument)
	case !in && !out && !err:
		return fmt.Errorf("%s: at least one of stdin, stdout and stderr must be set: %w", what, errdefs.ErrInvalidArgument)
	case tty && err:
		return fmt.Errorf("%s: a terminal has no separate stderr, unset one of tty and stderr: %w", what, errdefs.ErrInvalidArgument)
	}
	return nil
}

func (s *Server) prepare(verb string, req any) (string, error) {
	s.mu.Lock()
	base, closed := s.base, s.closed
	s.mu.Unlock()
	if base == nil || closed {
		return "", fmt.Errorf("the streaming server does not run: %w", errdefs.ErrUnavailable)
	}
	token, err := s.tokens.add(req)
	if err != nil {
		return "", err
	}
	return base.JoinPath(verb, token).String(), nil
}
