package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	debugv1 "cloister.dev/api/debug/v1"
	"cloister.dev/internal/client"
	"cloister.dev/internal/client/display"
)

// pruneAge spares what was pulled for a container that is not there yet.
const pruneAge = 10 * time.Minute

func (a *app) imageCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Encrypt, decrypt, inspect and prune images",
		Args:  args(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.imageEncryptCommand(), a.imageDecryptCommand(), a.imageInspectCommand(), a.imagePruneCommand())
	return cmd
}

func (a *app) imagePruneCommand() *cobra.Command {
	var dryRun bool
	var age time.Duration
	var format *display.Format
	cmd := &cobra.Command{
		Use:   "prune",
		Short: "Remove images that no container uses",
		Long: `Removes the images of the node that no container uses, neither as its root
file system nor as a volume. Pinned images stay, and so do images that are just
being pulled or were pulled a short while ago.`,
		Example: "  cloister image prune --dry-run\n  cloister image prune --older-than 24h",
		Args:    args(cobra.NoArgs),
		RunE: a.with(func(ctx context.Context, c *client.Conn, _ []string) error {
			r, err := c.Debug.PruneImages(ctx, &debugv1.PruneImagesRequest{DryRun: dryRun, OlderThanSeconds: int64(age / time.Second)})
			if err != nil {
				return fmt.Errorf("prune images: %w", err)
			}
			if format.Structured() {
				return errors.Join(display.Message(a.stdout, *format, r), pruneFailures(r))
			}
			if len(r.GetImages()) == 0 {
				_, err := fmt.Fprintln(a.stdout, "every image is in use, pinned or new")
				return err
			}
			return errors.Join(pruneTable(r, dryRun).Write(a.stdout), pruneFailures(r))
		}),
	}
	format = outputFlag(cmd)
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only list what would be removed")
	cmd.Flags().DurationVar(&age, "older-than", pruneAge, "spare images that were pulled later than so long ago")
	return cmd
}

func pruneTable(r *debugv1.PruneImagesResponse, dryRun bool) *display.Table {
	t := &display.Table{Heading: []string{"IMAGE", "ID", "SIZE", "STATE"}}
	for _, i := range r.GetImages() {
		state := "removed"
		if dryRun {
			state = "would be removed"
		}
		if i.GetError() != "" {
			state = "failed: " + i.GetError()
		}
		t.Add(cmp.Or(append(i.GetNames(), "<none>")...), client.ShortID(i.GetId()), display.Bytes(i.GetSize()), state)
	}
	return t
}

func pruneFailures(r *debugv1.PruneImagesResponse) error {
	n := 0
	for _, i := range r.GetImages() {
		if i.GetError() != "" {
			n++
		}
	}
	if n > 0 {
		return fmt.Errorf("%d images could not be removed", n)
	}
	return nil
}
