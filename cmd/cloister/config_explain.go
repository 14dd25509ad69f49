package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"cloister.dev/internal/client/display"
	"cloister.dev/internal/config"
)

func (a *app) configExplainCommand() *cobra.Command {
	var format *display.Format
	cmd := &cobra.Command{
		Use:   "explain KEY",
		Short: "Tell the type, default and meaning of a key",
		Long: `Explains a key by its whole name or the end of it, in the form of any version; keys
that were dropped are explained by what replaces them.`,
		Example: `  cloister config explain snapshotter
  cloister config explain runtimes.kata.runtime_type
  cloister config explain 'plugins."io.containerd.grpc.v1.cri".sandbox_image'`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: first(completeKeys),
		RunE: func(_ *cobra.Command, keys []string) error {
			found, err := config.Explain(keys[0])
			if err != nil {
				return err
			}
			if format.Structured() {
				return display.Value(a.stdout, *format, found)
			}
			for i, e := range found {
				if i > 0 {
					fmt.Fprintln(a.stdout)
				}
				a.explain(e)
			}
			return nil
		},
	}
	format = outputFlag(cmd)
	return cmd
}

// completeKeys offers the names of keys, without their tables.
func completeKeys(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	all, err := config.Reference()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, k := range all {
		names = append(names, k.Path[len(k.Path)-1])
	}
	slices.Sort(names)
	return slices.Compact(names), cobra.ShellCompDirectiveNoFileComp
}

func (a *app) explain(e config.Explanation) {
	row := func(what, text string) {
		if text != "" {
			fmt.Fprintf(a.stdout, "  %-11s%s\n", what, text)
		}
	}
	fmt.Fprintln(a.stdout, e.Key.Key)
	row("note", e.Note)
	row("option of", e.OptionsOf)
	if e.Type == "" {
		return
	}
	row("type", e.Type)
	row("default", cmp.Or(e.Default, "none"))
	row("meaning", strings.ReplaceAll(e.Meaning, "`", ""))
	row("since", e.Since)
	row("idle", e.Idle)
	change := "at the next start of the daemon"
	if e.Live {
		change = "when the file changes"
	}
	row("acts", change)
}
