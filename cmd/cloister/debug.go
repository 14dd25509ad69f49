package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	debugv1 "cloister.dev/api/debug/v1"
	"cloister.dev/internal/client"
	"cloister.dev/internal/client/display"
)

func (a *app) debugCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "debug",
		Short: "Look for and repair what is wrong on the node",
		Args:  args(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.fsckCommand())
	return cmd
}

func (a *app) fsckCommand() *cobra.Command {
	var repair, content bool
	var format *display.Format
	cmd := &cobra.Command{
		Use:   "fsck",
		Short: "List what belongs to no pod: snapshots, namespaces, mounts, addresses, cgroups",
		Long: `Compares the daemon's store with what is on the machine and lists what has no
owner. With --repair it is removed. Exits with 1 while something is left.

With --content it also reads all images and compares them with their digests,
as after a power cut or when a disk fails. Damaged blobs and files are then
repaired out of the registry that the image came from.`,
		Example: "  cloister debug fsck\n  cloister debug fsck --repair\n  cloister debug fsck --content --repair",
		Args:    args(cobra.NoArgs),
		RunE: a.with(func(ctx context.Context, c *client.Conn, _ []string) error {
			r, err := c.Debug.Fsck(ctx, &debugv1.FsckRequest{Repair: repair, Content: content})
			if err != nil {
				return fmt.Errorf("check the node: %w", err)
			}
			left := 0
			t := &display.Table{Heading: []string{"KIND", "ID", "PATH", "WHAT", "STATE"}}
			for _, f := range r.GetFindings() {
				state := "found"
				if f.GetRepaired() {
					state = "repaired"
				} else {
					left++
				}
				if f.GetError() != "" {
					state = "failed: " + f.GetError()
				}
				t.Add(f.GetKind(), client.ShortID(f.GetId()), f.GetPath(), f.GetDetail(), state)
			}
			switch {
			case format.Structured():
				err = display.Message(a.stdout, *format, r)
			case len(t.Rows) == 0:
				_, err = fmt.Fprintln(a.stdout, "nothing is without an owner")
			default:
				err = t.Write(a.stdout)
			}
			if left > 0 && repair {
				return errors.Join(err, fmt.Errorf("%d findings could not be repaired", left))
			}
			if left > 0 {
				return errors.Join(err, fmt.Errorf("%d findings; run it again with --repair", left))
			}
			return err
		}),
	}
	format = outputFlag(cmd)
	cmd.Flags().BoolVar(&repair, "repair", false, "remove, or repair, what was found")
	cmd.Flags().BoolVar(&content, "content", false, "read and verify the content of all images, too")
	return cmd
}
