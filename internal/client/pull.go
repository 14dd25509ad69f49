package client

import (
	"context"
	"fmt"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	debugv1 "cloister.dev/api/debug/v1"
)

// Pull fetches an image and returns its id. progress, when not nil, is called
// from one goroutine at a time while layers arrive, and not after Pull has
// returned.
func (c *Conn) Pull(ctx context.Context, image, handler string, progress func([]*debugv1.Layer)) (string, error) {
	watch, stop := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		if progress != nil {
			c.watchPull(watch, image, progress)
		}
	}()
	defer func() { stop(); <-watched }()
	spec := &runtimeapi.ImageSpec{Image: image, RuntimeHandler: handler}
	r, err := c.Images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: spec})
	if err != nil {
		return "", fmt.Errorf("pull %s: %w", image, err)
	}
	return r.GetImageRef(), nil
}

// watchPull ends in silence when the daemon is one that has no progress to
// tell: the pull itself does not depend on it.
func (c *Conn) watchPull(ctx context.Context, image string, progress func([]*debugv1.Layer)) {
	stream, err := c.Debug.PullProgress(ctx, &debugv1.PullProgressRequest{Ref: image})
	if err != nil {
		return
	}
	for {
		r, err := stream.Recv()
		if err != nil {
			return
		}
		progress(r.GetLayers())
	}
}
