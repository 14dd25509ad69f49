package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"cloister.dev/internal/client"
)

func (a *app) stopCommand() *cobra.Command {
	var grace time.Duration
	cmd := &cobra.Command{
		Use:   "stop CONTAINER…",
		Short: "Stop containers",
		Long: `Sends the container's stop signal, and kills what still runs when the grace
time is over.`,
		Example:           "  cloister stop web\n  cloister stop --time 1s 3f2a 77c0",
		Args:              args(cobra.MinimumNArgs(1)),
		ValidArgsFunction: a.complete(containerNames),
		RunE: a.with(func(ctx context.Context, c *client.Conn, refs []string) error {
			return each(refs, func(ref string) error {
				x, err := c.Container(ctx, ref)
				if err != nil {
					return err
				}
				if err := c.StopContainer(ctx, x.GetId(), grace); err != nil {
					return err
				}
				_, err = fmt.Fprintln(a.stdout, ref)
				return err
			})
		}),
	}
	cmd.Flags().DurationVarP(&grace, "time", "t", 10*time.Second, "grace time")
	return cmd
}
