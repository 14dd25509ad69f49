package main

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"cloister.dev/internal/client/display"
	"cloister.dev/internal/config"
	"cloister.dev/internal/host/vm/image"
	"cloister.dev/internal/host/vm/image/build"
)

func (a *app) guestCommand() *cobra.Command {
	var guests string
	cmd := &cobra.Command{
		Use:   "guest",
		Short: "Make and list what virtual machines boot",
		Long: `A guest is a kernel and an initial file system: cloister-agent as its first
program, crun with its libraries, and the kernel modules that a guest needs.`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.PersistentFlags().StringVar(&guests, "guests", filepath.Join(config.Default().Root, "guests"), "`folder` of guests")
	cmd.AddCommand(a.guestBuildCommand(&guests), a.guestListCommand(&guests), a.guestInspectCommand(&guests))
	return cmd
}

func (a *app) guestBuildCommand(guests *string) *cobra.Command {
	o := build.Options{}
	cmd := &cobra.Command{
		Use:   "build [NAME]",
		Short: "Make a guest, in place of an older one of its name",
		Long: `Makes a guest out of a Debian kernel package, which is downloaded and unpacked
but not installed, or out of a kernel of your own. The same inputs give the
same bytes. Machines that run keep what they booted.`,
		Example: `  cloister guest build
  cloister guest build --package linux-image-cloud-amd64
  cloister guest build mine --kernel ./bzImage --modules ./lib/modules/6.18.0`,
		Args: args(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				o.Name = args[0]
			}
			o.Root = *guests
			if o.Agent == "" {
				var err error
				if o.Agent, err = siblingProgram("cloister-agent"); err != nil {
					return err
				}
			}
			if o.Cache == "" {
				if cache, err := os.UserCacheDir(); err == nil {
					o.Cache = filepath.Join(cache, "cloister", "packages")
				}
			}
			began := time.Now()
			g, err := build.Guest(cmd.Context(), o)
			if err != nil {
				return fmt.Errorf("build a guest: %w", err)
			}
			fmt.Fprintf(a.stdout, "%s: Linux %s, %s, %s after %s\n", g.Name, g.KernelVersion, display.Bytes(uint64(g.Size)), g.Digest, time.Since(began).Round(time.Second/10))
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Package, "package", "", "Debian kernel `package` (default "+build.DefaultPackage+")")
	f.StringVar(&o.Kernel, "kernel", "", "bzImage or vmlinux `file` instead of a package; needs --modules")
	f.StringVar(&o.Modules, "modules", "", "`folder` of that kernel's modules, named after its version")
	f.StringSliceVar(&o.ExtraModules, "module", nil, "one more kernel `module`, with what it needs; may be repeated")
	f.StringVar(&o.Runtime, "crun", "", "crun's `program` (default: found in PATH)")
	f.StringVar(&o.Agent, "agent", "", "cloister-agent's `program` (default: beside this one, then PATH)")
	f.StringVar(&o.Cache, "cache", "", "`folder` that keeps downloaded packages (default: the user's cache)")
	return cmd
}

func (a *app) guestListCommand(guests *string) *cobra.Command {
	var format *display.Format
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List guests",
		Example: "  cloister guest list\n  cloister guest list -o json",
		Args:    args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			all, err := image.List(*guests)
			if err != nil {
				return err
			}
			if format.Structured() {
				return display.Value(a.stdout, *format, all)
			}
			t := &display.Table{Heading: []string{"NAME", "KERNEL", "AGENT", "RUNTIME", "SIZE", "AGE"}}
			if *format == display.Wide {
				t.Heading = append(t.Heading, "SOURCE", "DIGEST")
			}
			for _, g := range all {
				row := []string{g.Name, g.KernelVersion, g.Agent, g.Runtime, display.Bytes(uint64(g.Size)), display.Age(g.Built.UnixNano(), time.Now())}
				if *format == display.Wide {
					row = append(row, g.KernelSource, g.Digest)
				}
				t.Add(row...)
			}
			return t.Write(a.stdout)
		},
	}
	format = outputFlag(cmd)
	return cmd
}

func (a *app) guestInspectCommand(guests *string) *cobra.Command {
	var format *display.Format
	cmd := &cobra.Command{
		Use:     "inspect [NAME]",
		Short:   "Show what a guest was made of",
		Example: "  cloister guest inspect\n  cloister guest inspect mine -o yaml",
		Args:    args(cobra.MaximumNArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			name := image.DefaultName
			if len(args) > 0 {
				name = args[0]
			}
			g, err := image.Open(*guests, name)
			if err != nil {
				return err
			}
			if !format.Structured() {
				*format = display.JSON
			}
			return display.Value(a.stdout, *format, g)
		},
	}
	format = outputFlag(cmd)
	return cmd
}
