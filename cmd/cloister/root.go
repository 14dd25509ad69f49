package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"cloister.dev/internal/client"
	"cloister.dev/internal/client/display"
	"cloister.dev/internal/config"
)

// addressEnv names the variable that stands in for --address.
const addressEnv = "CLOISTER_ADDRESS"

// app is what the commands share.
type app struct {
	stdin          *os.File
	stdout, stderr *os.File
	address        string
	addressSet     bool // by the flag or the environment
}

func (a *app) root() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cloister",
		Short: "Run Kubernetes pods, each as isolated as it chooses",
		Long: `Cloister is a Kubernetes container runtime (CRI). "cloister daemon" serves a
kubelet; the other commands look into a daemon, or run a pod by hand.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          args(cobra.NoArgs),
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			a.addressSet = cmd.Flags().Changed("address")
			if env := os.Getenv(addressEnv); env != "" && !a.addressSet {
				a.address, a.addressSet = env, true
			}
			return nil
		},
	}
	cmd.SetOut(a.stdout)
	cmd.SetErr(a.stderr)
	cmd.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usage(fmt.Errorf("%w; see \"%s --help\"", err, c.CommandPath()))
	})
	cmd.PersistentFlags().StringVar(&a.address, "address", config.Default().Address,
		"socket of the daemon; also the variable "+addressEnv)
	cmd.AddGroup(&cobra.Group{ID: "pods", Title: "Pods and containers:"}, &cobra.Group{ID: "images", Title: "Images:"}, &cobra.Group{ID: "node", Title: "The daemon:"})
	add := func(group string, subs ...*cobra.Command) {
		for _, s := range subs {
			s.GroupID = group
			cmd.AddCommand(s)
		}
	}
	add("pods", a.runCommand(), a.psCommand(), a.podsCommand(), a.logsCommand(), a.execCommand(), a.inspectCommand(), a.stopCommand(), a.rmCommand())
	add("images", a.imagesCommand(), a.pullCommand(), a.rmiCommand(), a.imageCommand())
	add("node", a.daemonCommand(), a.devicePluginCommand(), a.configCommand(), a.checkCommand(), a.guestCommand(), a.vmCommand(), a.debugCommand(), a.versionCommand())
	cmd.SetCompletionCommandGroupID("node")
	cmd.SetHelpCommandGroupID("node")
	return cmd
}

// dial connects to the daemon. When no socket was named and none serves the
// default one, the user's private daemon is taken, if it runs.
func (a *app) dial(ctx context.Context) (*client.Conn, error) {
	c, err := client.Dial(ctx, a.address)
	if err == nil || a.addressSet || !errors.Is(err, client.ErrNoDaemon) {
		return c, err
	}
	private, findErr := client.FindPrivate()
	if findErr != nil {
		return nil, err
	}
	if c, privateErr := client.Dial(ctx, private.Address()); privateErr == nil {
		return c, nil
	}
	return nil, err
}

// with makes a command's body out of one that needs a daemon.
func (a *app) with(body func(ctx context.Context, c *client.Conn, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		c, err := a.dial(cmd.Context())
		if err != nil {
			return err
		}
		defer c.Close()
		return body(cmd.Context(), c, args)
	}
}

// each does something to every argument, whatever happens to the others.
func each(refs []string, do func(ref string) error) error {
	var errs []error
	for _, r := range refs {
		if err := do(r); err != nil {
			errs = append(errs, errors.New(client.Sentence(err)))
		}
	}
	return errors.Join(errs...)
}

// outputFlag adds --output to a command that lists things.
func outputFlag(cmd *cobra.Command) *display.Format {
	f := display.Plaintext
	cmd.Flags().VarP(&f, "output", "o", "how to print: table, wide, json or yaml")
	// The flag was added in the line above.
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(display.Formats(), cobra.ShellCompDirectiveNoFileComp))
	return &f
}
