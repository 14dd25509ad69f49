package cri

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// kubeAPIVersion is the version of kubelet's runtime API, which never moved.
	kubeAPIVersion = "0.1.0"
	runtimeName    = "cloister"
	apiVersion     = "v1"
)

// Version names the runtime.
func (s *Server) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{
		Version: kubeAPIVersion, RuntimeName: runtimeName, RuntimeVersion: s.version, RuntimeApiVersion: apiVersion,
	}, nil
}

// Status tells whether pods can run, and on which handlers.
func (s *Server) Status(ctx context.Context, r *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	return s.pods.Status(ctx, r.GetVerbose())
}

// RuntimeConfig tells kubelet which cgroup driver to use.
func (s *Server) RuntimeConfig(ctx context.Context, _ *runtimeapi.RuntimeConfigRequest) (*runtimeapi.RuntimeConfigResponse, error) {
	driver, err := s.pods.CgroupDriver(ctx)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.RuntimeConfigResponse{Linux: &runtimeapi.LinuxRuntimeConfiguration{CgroupDriver: driver}}, nil
}

// UpdateRuntimeConfig takes the node's pod address range, once kubelet knows it.
func (s *Server) UpdateRuntimeConfig(_ context.Context, r *runtimeapi.UpdateRuntimeConfigRequest) (*runtimeapi.UpdateRuntimeConfigResponse, error) {
	if cidr := r.GetRuntimeConfig().GetNetworkConfig().GetPodCidr(); cidr != "" {
		if err := s.pods.UpdatePodCIDR(cidr); err != nil {
			return nil, err
		}
	}
	return &runtimeapi.UpdateRuntimeConfigResponse{}, nil
}

// GetContainerEvents sends every event from now on, until the client goes, lags
// too far behind, or the server shuts down.
func (s *Server) GetContainerEvents(_ *runtimeapi.GetEventsRequest, out grpc.ServerStreamingServer[runtimeapi.ContainerEventResponse]) error {
	sub := s.subscribe()
	defer sub.Close()
	// The header tells the client that nothing is missed from here on.
	if err := out.SendHeader(metadata.MD{}); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(out.Context())
	defer cancel()
	defer context.AfterFunc(s.stopping, cancel)()
	for {
		event, err := sub.Next(ctx)
		if s.stopping.Err() != nil {
			return fmt.Errorf("the daemon is stopping: %w", errdefs.ErrUnavailable)
		}
		if err != nil {
			return err
		}
		if err := out.Send(event); err != nil {
			return err
		}
	}
}
