package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/client"
)

func (a *app) rmiCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "rmi IMAGE…",
		Short:             "Remove images",
		Example:           "  cloister rmi busybox",
		Args:              args(cobra.MinimumNArgs(1)),
		ValidArgsFunction: a.complete(imageNames),
		RunE: a.with(func(ctx context.Context, c *client.Conn, images []string) error {
			return each(images, func(image string) error {
				found, err := c.Image(ctx, image)
				if err != nil {
					return err
				}
				spec := &runtimeapi.ImageSpec{Image: found.GetId()}
				if _, err := c.Images.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: spec}); err != nil {
					return fmt.Errorf("remove image %s: %w", image, err)
				}
				_, err = fmt.Fprintln(a.stdout, image)
				return err
			})
		}),
	}
}
