package main

import (
	"cmp"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"cloister.dev/internal/client/display"
	"cloister.dev/internal/config"
)

// validation is what there is to say of one file.
type validation struct {
	File     string           `json:"file"`
	Valid    bool             `json:"valid"`
	Error    string           `json:"error,omitempty"`
	Files    []string         `json:"files,omitempty"` // that were read with it
	Warnings []config.Warning `json:"warnings,omitempty"`
}

func (a *app) configValidateCommand() *cobra.Command {
	var format *display.Format
	cmd := &cobra.Command{
		Use:   "validate [FILE...]",
		Short: "Check files with all that they import",
		Long: `Checks files as the daemon does when it starts or reloads, and prints what is
wrong, what is deprecated and what has no effect. Exits with 1 if a file would
be refused.`,
		Example: "  cloister config validate\n  cloister config validate /etc/containerd/config.toml",
		RunE: func(_ *cobra.Command, files []string) error {
			if len(files) == 0 {
				files = []string{""}
			}
			var all []validation
			refused := false
			for _, f := range files {
				v := validate(f)
				all = append(all, v)
				refused = refused || !v.Valid
			}
			if err := a.showValidations(*format, all); err != nil {
				return err
			}
			if refused {
				return &codedError{code: exitFailure}
			}
			return nil
		},
	}
	format = outputFlag(cmd)
	return cmd
}

func validate(file string) validation {
	v := validation{File: cmp.Or(file, config.DefaultPath)}
	c, err := config.Load(file)
	if err != nil {
		v.Error = err.Error()
		return v
	}
	v.Valid, v.Files, v.Warnings = true, c.Files, c.Warnings
	return v
}

func (a *app) showValidations(format display.Format, all []validation) error {
	if format.Structured() {
		return display.Value(a.stdout, format, all)
	}
	for _, v := range all {
		for _, w := range v.Warnings {
			fmt.Fprintln(a.stdout, "warning:", w)
		}
		_, absent := os.Stat(v.File)
		switch {
		case !v.Valid:
			fmt.Fprintln(a.stdout, v.Error)
			fmt.Fprintln(a.stdout, v.File+": refused")
		case len(v.Files) == 0 && absent != nil:
			fmt.Fprintln(a.stdout, v.File+": not there, the defaults are used")
		default:
			fmt.Fprintln(a.stdout, v.File+": valid")
		}
	}
	return nil
}
