package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"cloister.dev/internal/client"
)

func (a *app) rmCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "rm CONTAINER|POD…",
		Short: "Remove containers or pods",
		Long: `Removes containers; with one that "cloister run" made, its pod too. An id or
name that is no container's may be a pod's, which is removed with all that is
in it.`,
		Example:           "  cloister rm web\n  cloister rm -f 3f2a",
		Args:              args(cobra.MinimumNArgs(1)),
		ValidArgsFunction: a.complete(containerNames),
		RunE: a.with(func(ctx context.Context, c *client.Conn, refs []string) error {
			return each(refs, func(ref string) error {
				if err := remove(ctx, c, ref, force); err != nil {
					return err
				}
				_, err := fmt.Fprintln(a.stdout, ref)
				return err
			})
		}),
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "also what is running")
	return cmd
}

func remove(ctx context.Context, c *client.Conn, ref string, force bool) error {
	x, err := c.Container(ctx, ref)
	if err == nil {
		return c.RemoveContainer(ctx, x, force)
	}
	if !errors.Is(err, errdefs.ErrNotFound) {
		return err
	}
	pod, podErr := c.Pod(ctx, ref)
	if errors.Is(podErr, errdefs.ErrNotFound) {
		return fmt.Errorf("there is no container and no pod %q; \"cloister ps --all\" and \"cloister pods\" list them: %w", ref, errdefs.ErrNotFound)
	}
	if podErr != nil {
		return podErr
	}
	return c.RemovePod(ctx, pod.GetId(), force)
}
