package client

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Image finds an image by a reference, or by its id or the beginning of it.
func (c *Conn) Image(ctx context.Context, ref string) (*runtimeapi.Image, error) {
	r, err := c.Images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	if err == nil && r.GetImage() != nil {
		return r.GetImage(), nil
	}
	list, listErr := c.Images.ListImages(ctx, &runtimeapi.ListImagesRequest{})
	if listErr != nil {
		return nil, fmt.Errorf("list images: %w", listErr)
	}
	var found []*runtimeapi.Image
	for _, x := range list.GetImages() {
		hex := strings.TrimPrefix(x.GetId(), "sha256:")
		if ref != "" && (strings.HasPrefix(hex, ref) || strings.HasPrefix(x.GetId(), ref)) {
			found = append(found, x)
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return nil, fmt.Errorf("image %q fits %d of them; give more of the id: %w", ref, len(found), errdefs.ErrInvalidArgument)
	case err != nil:
		return nil, fmt.Errorf("look for image %s: %w", ref, err)
	}
	return nil, fmt.Errorf("there is no image %q; \"cloister images\" lists them, \"cloister pull\" fetches one: %w", ref, errdefs.ErrNotFound)
}

// Predecessor is the container of the same name in the same pod that x
// replaced.
func (c *Conn) Predecessor(ctx context.Context, x *runtimeapi.Container) (*runtimeapi.Container, error) {
	list, err := c.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{
		Filter: &runtimeapi.ContainerFilter{PodSandboxId: x.GetPodSandboxId()},
	})
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	var before *runtimeapi.Container
	for _, y := range list.GetContainers() {
		m := y.GetMetadata()
		older := m.GetName() == x.GetMetadata().GetName() && m.GetAttempt() < x.GetMetadata().GetAttempt()
		if older && m.GetAttempt() >= before.GetMetadata().GetAttempt() {
			before = y
		}
	}
	if before == nil {
		return nil, fmt.Errorf("container %s has not replaced another one: %w", ShortID(x.GetId()), errdefs.ErrNotFound)
	}
	return before, nil
}
