package main

import (
	"github.com/spf13/cobra"

	"cloister.dev/internal/config"
)

func (a *app) configCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Look at configuration files, check them and bring them up to date",
		Long: `Works on files, no daemon is asked. Files may be of containerd's versions 1 to 4;
without a name it is ` + config.DefaultPath + ` with its drop-ins.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.configDefaultCommand(), a.configDumpCommand(), a.configValidateCommand(), a.configMigrateCommand(), a.configExplainCommand())
	return cmd
}

func (a *app) configDefaultCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "default",
		Short:   "Print a file of all defaults, with the meaning of each key",
		Example: "  cloister config default >/etc/cloister/config.toml",
		Args:    args(cobra.NoArgs),
		RunE:    func(*cobra.Command, []string) error { return config.WriteDefault(a.stdout) },
	}
}
