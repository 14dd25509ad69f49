package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/client"
)

func (a *app) logsCommand() *cobra.Command {
	var o client.LogOptions
	var since string
	var previous bool
	cmd := &cobra.Command{
		Use:   "logs CONTAINER",
		Short: "Show what a container wrote",
		Example: `  cloister logs web
  cloister logs -f --tail 20 web
  cloister logs --since 10m --timestamps 3f2a`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: first(a.complete(containerNames)),
		RunE: a.with(func(ctx context.Context, c *client.Conn, args []string) error {
			var err error
			if o.Since, err = sinceTime(since, time.Now()); err != nil {
				return usage(err)
			}
			x, err := c.Container(ctx, args[0])
			if err != nil {
				return err
			}
			if previous {
				if x, err = c.Predecessor(ctx, x); err != nil {
					return err
				}
			}
			return a.showLogs(ctx, c, x, o)
		}),
	}
	f := cmd.Flags()
	f.BoolVarP(&o.Follow, "follow", "f", false, "go on until the container ends")
	f.IntVarP(&o.Tail, "tail", "n", -1, "only so many of the last lines")
	f.StringVar(&since, "since", "", "only what is newer: a duration such as 10m, or a time such as 2026-01-02T03:04:05Z")
	f.BoolVarP(&o.Timestamps, "timestamps", "t", false, "each line with its time")
	f.BoolVarP(&previous, "previous", "p", false, "of the container that this one replaced")
	return cmd
}

func (a *app) showLogs(ctx context.Context, c *client.Conn, x *runtimeapi.Container, o client.LogOptions) error {
	st, err := c.ContainerStatus(ctx, x.GetId())
	if err != nil {
		return err
	}
	if st.GetLogPath() == "" {
		return fmt.Errorf("container %s keeps no log: it was created without a log path", client.ShortID(x.GetId()))
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if o.Follow {
		done := make(chan struct{})
		o.Done = done
		go func() {
			defer close(done)
			if _, err := c.WaitExit(ctx, x.GetId()); err != nil {
				cancel(err)
			}
		}()
		defer func() { cancel(nil); <-done }()
	}
	err = client.Logs(ctx, st.GetLogPath(), o, a.stdout, a.stderr)
	switch {
	case errors.Is(err, os.ErrNotExist) && st.GetStartedAt() == 0:
		return nil // it has not run, so it wrote nothing
	case errors.Is(err, context.Canceled):
		return context.Cause(ctx)
	}
	return err
}

// sinceTime reads a duration before now, or a point in time.
func sinceTime(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(s); err == nil {
		return now.Add(-d), nil
	}
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		return time.Time{}, fmt.Errorf("--since %q: it is a duration such as 10m, or a time such as 2026-01-02T03:04:05Z", s)
	}
	return t, nil
}
