package main

import (
	"github.com/spf13/cobra"

	"cloister.dev/internal/config"
)

func (a *app) configMigrateCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "migrate FILE",
		Short: "Print what a file sets in the newest form",
		Long: `Prints the keys that the file sets, and no others, in the form of version 4, with
a comment at each that has moved, changed or lost its effect. Imported files are
left alone: migrate them one by one. Secrets of the file are printed.`,
		Example: "  cloister config migrate /etc/containerd/config.toml >/etc/cloister/config.toml",
		Args:    args(cobra.ExactArgs(1)),
		RunE:    func(_ *cobra.Command, files []string) error { return config.Migrate(a.stdout, files[0]) },
	}
}
