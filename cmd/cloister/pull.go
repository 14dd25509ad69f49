package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	debugv1 "cloister.dev/api/debug/v1"
	"cloister.dev/internal/client"
	"cloister.dev/internal/client/display"
)

func (a *app) pullCommand() *cobra.Command {
	var handler string
	var quiet bool
	cmd := &cobra.Command{
		Use:     "pull IMAGE…",
		Short:   "Fetch images",
		Example: "  cloister pull busybox\n  cloister pull registry.k8s.io/pause:3.10.2",
		Args:    args(cobra.MinimumNArgs(1)),
		RunE: a.with(func(ctx context.Context, c *client.Conn, images []string) error {
			return each(images, func(image string) error {
				id, err := a.pull(quiet, image, func(progress func([]*debugv1.Layer)) (string, error) {
					return c.Pull(ctx, image, handler, progress)
				})
				if err != nil {
					return err
				}
				_, err = fmt.Fprintln(a.stdout, id)
				return err
			})
		}),
	}
	cmd.Flags().StringVar(&handler, "runtime", "", "runtime `handler` that the image is for")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "no progress")
	return cmd
}

// pull shows the progress of a pull on stderr while it runs.
func (a *app) pull(quiet bool, image string, do func(progress func([]*debugv1.Layer)) (string, error)) (string, error) {
	if quiet {
		return do(nil)
	}
	bar := display.NewBar(a.stderr, image, client.IsTerminal(a.stderr))
	id, err := do(bar.Update)
	bar.Done(err)
	return id, err
}
