package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	debugv1 "cloister.dev/api/debug/v1"
	"cloister.dev/internal/client"
	"cloister.dev/internal/client/display"
)

func (a *app) vmCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "vm",
		Short: "Look into the virtual machines of pods",
		Args:  args(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.vmListCommand(), a.vmConsoleCommand(), a.vmExecCommand(), a.vmMetricsCommand())
	return cmd
}

func (a *app) vmListCommand() *cobra.Command {
	var format *display.Format
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List the pods that are virtual machines",
		Example: "  cloister vm list\n  cloister vm list -o json",
		Args:    args(cobra.NoArgs),
		RunE: a.with(func(ctx context.Context, c *client.Conn, _ []string) error {
			r, err := c.Debug.Machines(ctx, &debugv1.MachinesRequest{})
			if err != nil {
				return fmt.Errorf("list virtual machines: %w", err)
			}
			if format.Structured() {
				return display.Message(a.stdout, *format, r)
			}
			t := &display.Table{Heading: []string{"POD", "STATE", "KERNEL", "TYPE", "CPUS", "MEMORY", "BOOT", "PID"}}
			for _, m := range r.GetMachines() {
				t.Add(client.ShortID(m.GetPod()), m.GetState(), strings.Trim(m.GetKernel(), `"`), m.GetMachineType()+"/"+m.GetAccel(),
					fmt.Sprint(m.GetCpus()), fmt.Sprintf("%d MiB", m.GetMemory()>>20),
					(time.Duration(m.GetBootMillis()) * time.Millisecond).String(), fmt.Sprint(m.GetPid()))
			}
			return t.Write(a.stdout)
		}),
	}
	format = outputFlag(cmd)
	return cmd
}

func (a *app) vmConsoleCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "console POD",
		Short:             "Show the last lines of a machine's console",
		Example:           "  cloister vm console web",
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: first(a.complete(podNames)),
		RunE: a.with(func(ctx context.Context, c *client.Conn, args []string) error {
			p, err := c.Pod(ctx, args[0])
			if err != nil {
				return err
			}
			r, err := c.Debug.Machines(ctx, &debugv1.MachinesRequest{Pod: p.GetId(), Console: true})
			if err != nil {
				return fmt.Errorf("read the console of pod %s: %w", client.ShortID(p.GetId()), err)
			}
			for _, m := range r.GetMachines() {
				fmt.Fprintln(a.stdout, string(m.GetConsole()))
			}
			return nil
		}),
	}
}

func (a *app) vmExecCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "exec POD COMMAND [ARG…]",
		Short: "Run a program of the guest, outside of every container",
		Long: `Runs a program of the guest itself and exits with its exit code. A guest holds
little: its agent, crun and what it was built with. Output is cut after 1 MiB.`,
		Example:           "  cloister vm exec web crun --root /run/cloister/runtime list",
		Args:              args(cobra.MinimumNArgs(2)),
		ValidArgsFunction: first(a.complete(podNames)),
		RunE: a.with(func(ctx context.Context, c *client.Conn, args []string) error {
			return a.runInMachine(ctx, c, args[0], args[1:])
		}),
	}
	cmd.Flags().SetInterspersed(false)
	return cmd
}

func (a *app) vmMetricsCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "metrics POD",
		Short:             "Show a guest's figures as Prometheus reads them",
		Example:           "  cloister vm metrics web",
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: first(a.complete(podNames)),
		RunE: a.with(func(ctx context.Context, c *client.Conn, args []string) error {
			return a.runInMachine(ctx, c, args[0], nil)
		}),
	}
}

func (a *app) runInMachine(ctx context.Context, c *client.Conn, pod string, command []string) error {
	p, err := c.Pod(ctx, pod)
	if err != nil {
		return err
	}
	r, err := c.Debug.RunInMachine(ctx, &debugv1.RunInMachineRequest{Pod: p.GetId(), Args: command})
	if err != nil {
		return fmt.Errorf("ask the machine of pod %s: %w", client.ShortID(p.GetId()), err)
	}
	if _, err := a.stdout.Write(r.GetStdout()); err != nil {
		return err
	}
	if _, err := a.stderr.Write(r.GetStderr()); err != nil {
		return err
	}
	if r.GetStatus() != 0 {
		return &client.ExitError{Code: int(r.GetStatus())}
	}
	return nil
}
