package nri

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
)

// The events below are relayed to all plugins in the order of their indices.
// The caller has asked Active. An error is a plugin's veto.

// RunPod tells of a pod that is about to be ready.
func (s *Server) RunPod(ctx context.Context, pod *api.PodSandbox) error {
	return veto("RunPodSandbox", s.lib.RunPodSandbox(ctx, &api.RunPodSandboxRequest{Pod: pod}))
}

// UpdatePod tells of resources that a pod is about to get.
func (s *Server) UpdatePod(ctx context.Context, pod *api.PodSandbox, overhead, resources *api.LinuxResources) error {
	_, err := s.lib.UpdatePodSandbox(ctx, &api.UpdatePodSandboxRequest{Pod: pod, OverheadLinuxResources: overhead, LinuxResources: resources})
	return veto("UpdatePodSandbox", err)
}

// PostUpdatePod tells of resources that a pod has got.
func (s *Server) PostUpdatePod(ctx context.Context, pod *api.PodSandbox) error {
	return veto("PostUpdatePodSandbox", s.lib.PostUpdatePodSandbox(ctx, &api.PostUpdatePodSandboxRequest{Pod: pod}))
}

// StopPod tells of a pod whose containers have ended.
func (s *Server) StopPod(ctx context.Context, pod *api.PodSandbox) error {
	return veto("StopPodSandbox", s.lib.StopPodSandbox(ctx, &api.StopPodSandboxRequest{Pod: pod}))
}

// RemovePod tells of a pod that is being removed.
func (s *Server) RemovePod(ctx context.Context, pod *api.PodSandbox) error {
	return veto("RemovePodSandbox", s.lib.RemovePodSandbox(ctx, &api.RemovePodSandboxRequest{Pod: pod}))
}

// Create asks how a container is to be adjusted, and which others are to be
// updated or ended for its sake.
func (s *Server) Create(ctx context.Context, pod *api.PodSandbox, c *api.Container) (*api.CreateContainerResponse, error) {
	r, err := s.lib.CreateContainer(ctx, &api.CreateContainerRequest{Pod: pod, Container: c})
	return r, veto("CreateContainer", err)
}

// PostCreate tells of a container that was made.
func (s *Server) PostCreate(ctx context.Context, pod *api.PodSandbox, c *api.Container) error {
	return veto("PostCreateContainer", s.lib.PostCreateContainer(ctx, &api.PostCreateContainerRequest{Pod: pod, Container: c}))
}

// StartContainer tells of a container that is about to be started.
func (s *Server) StartContainer(ctx context.Context, pod *api.PodSandbox, c *api.Container) error {
	return veto("StartContainer", s.lib.StartContainer(ctx, &api.StartContainerRequest{Pod: pod, Container: c}))
}

// PostStart tells of a container that was started.
func (s *Server) PostStart(ctx context.Context, pod *api.PodSandbox, c *api.Container) error {
	return veto("PostStartContainer", s.lib.PostStartContainer(ctx, &api.PostStartContainerRequest{Pod: pod, Container: c}))
}

// Update asks what becomes of resources that a container is about to get.
func (s *Server) Update(ctx context.Context, pod *api.PodSandbox, c *api.Container, r *api.LinuxResources) (*api.UpdateContainerResponse, error) {
	resp, err := s.lib.UpdateContainer(ctx, &api.UpdateContainerRequest{Pod: pod, Container: c, LinuxResources: r})
	return resp, veto("UpdateContainer", err)
}

// PostUpdate tells of resources that a container has got.
func (s *Server) PostUpdate(ctx context.Context, pod *api.PodSandbox, c *api.Container) error {
	return veto("PostUpdateContainer", s.lib.PostUpdateContainer(ctx, &api.PostUpdateContainerRequest{Pod: pod, Container: c}))
}

// Stop tells of a container that has ended and asks which others get its share.
func (s *Server) Stop(ctx context.Context, pod *api.PodSandbox, c *api.Container) (*api.StopContainerResponse, error) {
	r, err := s.lib.StopContainer(ctx, &api.StopContainerRequest{Pod: pod, Container: c})
	return r, veto("StopContainer", err)
}

// Remove tells of a container that is being removed.
func (s *Server) Remove(ctx context.Context, pod *api.PodSandbox, c *api.Container) error {
	return veto("RemoveContainer", s.lib.RemoveContainer(ctx, &api.RemoveContainerRequest{Pod: pod, Container: c}))
}

func veto(event string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("an NRI plugin refused %s: %w: %w", event, err, errdefs.ErrFailedPrecondition)
}
