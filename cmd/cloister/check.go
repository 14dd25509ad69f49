package main

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/spf13/cobra"

	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/client/display"
	"cloister.dev/internal/config"
	"cloister.dev/internal/host/check"
)

func (a *app) checkCommand() *cobra.Command {
	var file, handler string
	var only []string
	var verbose bool
	var format *display.Format
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Find out by trying what this machine can run",
		Long: `Tries, one after the other, what containers and virtual machines need: runs a
container, boots a kernel with each accelerator, boots a whole pod. Each answer
comes with its evidence and, where something fails, with what to do. The exit
code is 0 when nothing failed, 1 otherwise.

Virtual machines are tried as the handler of the configuration has them; without
one as by default, with accel = "auto".`,
		Example: `  cloister check
  cloister check --handler vm -o json
  cloister check --config ./config.toml`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(file)
			if err != nil {
				return usage(err)
			}
			o, err := checkOptions(cfg, handler)
			if err != nil {
				return usage(err)
			}
			o.Only, o.Log = only, slog.New(slog.DiscardHandler)
			if verbose {
				o.Log = slog.New(slog.NewTextHandler(a.stderr, nil))
			}
			t := &display.Table{Heading: []string{"CHECK", "STATUS", "TIME", "EVIDENCE"}}
			all, err := check.Run(cmd.Context(), o, func(r check.Result) {
				if !format.Structured() {
					fmt.Fprintf(a.stderr, "%s: %s\n", r.Check, r.Status)
				}
				t.Add(r.Check, string(r.Status), fmt.Sprintf("%d ms", r.Millis), firstLine(r.Evidence))
			})
			if err != nil {
				return err
			}
			if format.Structured() {
				err = display.Value(a.stdout, *format, all)
			} else if err = t.Write(a.stdout); err == nil {
				a.remedies(all)
			}
			return errors.Join(err, check.Verdict(all))
		},
	}
	format = outputFlag(cmd)
	f := cmd.Flags()
	f.StringVarP(&file, "config", "c", "", "configuration `file` (default "+config.DefaultPath+", if it is there)")
	f.StringVar(&handler, "handler", "", "the `name` of a handler of virtual machines (default: the first one of the configuration)")
	f.StringSliceVar(&only, "only", nil, "`name` of a check to do, with what it builds upon; may be repeated")
	f.BoolVarP(&verbose, "verbose", "v", false, "show the log of what is tried")
	return cmd
}

func firstLine(text string) string {
	line, _, _ := strings.Cut(text, "\n")
	return line
}

// remedies tells, beneath the table, what is wrong in full and what to do.
func (a *app) remedies(all []check.Result) {
	for _, r := range all {
		if r.Status != check.Failed && r.Status != check.Warning {
			continue
		}
		fmt.Fprintf(a.stdout, "\n%s (%s)\n", r.Check, r.Status)
		for line := range strings.Lines(r.Evidence) {
			fmt.Fprintf(a.stdout, "  %s\n", display.Plain(strings.TrimSuffix(line, "\n")))
		}
		if r.Remedy != "" {
			fmt.Fprintf(a.stdout, "  To do: %s.\n", strings.TrimSuffix(r.Remedy, "."))
		}
	}
}

// checkOptions are those of a configuration's handler.
func checkOptions(cfg config.Config, handler string) (check.Options, error) {
	o := check.Options{OCI: []string{"crun", "runc"}}
	name, h, err := cfg.MachineHandler(handler)
	if err != nil {
		return o, err
	}
	if o.Machine, err = machineOptions(cfg, h); err != nil {
		return o, fmt.Errorf("options of handler %q: %w", name, err)
	}
	if name == "" {
		o.Machine = &hostv1.MachineOptions{Guests: o.Machine.GetGuests(), Accel: "auto"}
	}
	return o, nil
}
