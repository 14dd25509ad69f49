package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/client"
	"cloister.dev/internal/client/display"
)

func (a *app) imagesCommand() *cobra.Command {
	var quiet bool
	var format *display.Format
	cmd := &cobra.Command{
		Use:     "images",
		Short:   "List images",
		Example: "  cloister images\n  cloister images -o wide",
		Args:    args(cobra.NoArgs),
		RunE: a.with(func(ctx context.Context, c *client.Conn, _ []string) error {
			r, err := c.Images.ListImages(ctx, &runtimeapi.ListImagesRequest{})
			if err != nil {
				return fmt.Errorf("list images: %w", err)
			}
			slices.SortFunc(r.Images, func(x, y *runtimeapi.Image) int { return cmp.Compare(imageName(x), imageName(y)) })
			if quiet {
				for _, x := range r.GetImages() {
					fmt.Fprintln(a.stdout, x.GetId())
				}
				return nil
			}
			if format.Structured() {
				return display.Message(a.stdout, *format, r)
			}
			return imageTable(r.GetImages(), *format == display.Wide).Write(a.stdout)
		}),
	}
	format = outputFlag(cmd)
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "ids only")
	return cmd
}

// imageName is what an image is listed under: its first tag, else a digest.
func imageName(x *runtimeapi.Image) string {
	return cmp.Or(append(slices.Clone(x.GetRepoTags()), x.GetRepoDigests()...)...)
}

func imageTable(list []*runtimeapi.Image, wide bool) *display.Table {
	t := &display.Table{Heading: []string{"IMAGE", "TAG", "ID", "SIZE"}}
	if wide {
		t.Heading = append(t.Heading, "PINNED", "DIGEST")
	}
	for _, x := range list {
		tags := x.GetRepoTags()
		if len(tags) == 0 {
			tags = []string{imageName(x)}
		}
		for _, full := range tags {
			name, tag := splitTag(full)
			row := []string{name, tag, client.ShortID(x.GetId()), display.Bytes(x.GetSize())}
			if wide {
				_, digest, _ := strings.Cut(cmp.Or(x.GetRepoDigests()...), "@")
				row = append(row, fmt.Sprint(x.GetPinned()), digest)
			}
			t.Add(row...)
		}
	}
	return t
}

// splitTag parts a reference; the colon of a port is not one of a tag.
func splitTag(ref string) (name, tag string) {
	name, _, _ = strings.Cut(ref, "@")
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		return name[:i], name[i+1:]
	}
	return name, ""
}
