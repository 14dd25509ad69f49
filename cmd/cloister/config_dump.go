package main

import (
	"github.com/spf13/cobra"

	"cloister.dev/internal/client/display"
	"cloister.dev/internal/config"
)

func (a *app) configDumpCommand() *cobra.Command {
	var file string
	var format *display.Format
	cmd := &cobra.Command{
		Use:   "dump",
		Short: "Print the effective configuration and where each value comes from",
		Long: `Prints the configuration after all files and drop-ins, in the newest form. Behind
each value is the file and line that set it, "default", or "derived" for what
follows from other keys. Secrets are not shown.`,
		Example: "  cloister config dump\n  cloister config dump --config /etc/containerd/config.toml -o json",
		Args:    args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			_, values, err := config.Inspect(file)
			if err != nil {
				return err
			}
			if format.Structured() {
				return display.Value(a.stdout, *format, values)
			}
			return config.WriteValues(a.stdout, values)
		},
	}
	cmd.Flags().StringVarP(&file, "config", "c", "", "configuration `file` (default "+config.DefaultPath+", if it is there)")
	format = outputFlag(cmd)
	return cmd
}
