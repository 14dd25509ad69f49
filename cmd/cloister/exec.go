package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/client"
)

func (a *app) execCommand() *cobra.Command {
	var stdin, tty bool
	cmd := &cobra.Command{
		Use:   "exec CONTAINER COMMAND [ARG…]",
		Short: "Run a command in a running container",
		Long:  `Runs a command in a running container and exits with its exit code.`,
		Example: `  cloister exec web ls -l /
  cloister exec -it web sh
  echo data | cloister exec -i web tee /tmp/x`,
		Args:              args(cobra.MinimumNArgs(2)),
		ValidArgsFunction: first(a.complete(containerNames)),
		RunE: a.with(func(ctx context.Context, c *client.Conn, args []string) error {
			x, err := c.Container(ctx, args[0])
			if err != nil {
				return err
			}
			r, err := c.Runtime.Exec(ctx, &runtimeapi.ExecRequest{
				ContainerId: x.GetId(), Cmd: args[1:], Tty: tty, Stdin: stdin, Stdout: true, Stderr: !tty,
			})
			if err != nil {
				return fmt.Errorf("exec in container %s: %w", client.ShortID(x.GetId()), err)
			}
			return a.stream(ctx, r.GetUrl(), stdin, tty)
		}),
	}
	cmd.Flags().SetInterspersed(false)
	cmd.Flags().BoolVarP(&stdin, "stdin", "i", false, "pass standard input on")
	cmd.Flags().BoolVarP(&tty, "tty", "t", false, "give the command a terminal")
	return cmd
}

// stream connects this process's streams to a URL of the daemon's.
func (a *app) stream(ctx context.Context, url string, stdin, tty bool) (err error) {
	s := client.Streams{Stdout: a.stdout}
	if !tty {
		s.Stderr = a.stderr
	}
	if stdin {
		s.Stdin = a.stdin
	}
	if tty && client.IsTerminal(a.stdin) {
		t, err := client.OpenTerminal(a.stdin)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, t.Restore()) }()
		s.Resize = t.Sizes
		return client.Stream(ctx, url, s)
	}
	return client.Stream(ctx, url, s)
}
