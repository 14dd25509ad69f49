package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/client"
)

// completeTime bounds what a press of the tab key may take.
const completeTime = 2 * time.Second

type completion = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective)

// complete offers names that the daemon knows. Without a daemon it offers
// nothing, in silence: an error would land in the middle of a command line.
func (a *app) complete(names func(context.Context, *client.Conn) []string) completion {
	return func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		ctx, cancel := context.WithTimeout(context.Background(), completeTime)
		defer cancel()
		c, err := a.dial(ctx)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		defer c.Close()
		return names(ctx, c), cobra.ShellCompDirectiveNoFileComp
	}
}

// first limits a completion to the first argument.
func first(complete completion) completion {
	return func(cmd *cobra.Command, args []string, part string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveDefault
		}
		return complete(cmd, args, part)
	}
}

func containerNames(ctx context.Context, c *client.Conn) []string {
	r, err := c.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil
	}
	var names []string
	for _, x := range r.GetContainers() {
		names = append(names, client.ShortID(x.GetId())+"\t"+x.GetMetadata().GetName())
	}
	return names
}

func imageNames(ctx context.Context, c *client.Conn) []string {
	r, err := c.Images.ListImages(ctx, &runtimeapi.ListImagesRequest{})
	if err != nil {
		return nil
	}
	var names []string
	for _, x := range r.GetImages() {
		names = append(names, x.GetRepoTags()...)
	}
	return names
}

func podNames(ctx context.Context, c *client.Conn) []string {
	r, err := c.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return nil
	}
	var names []string
	for _, p := range r.GetItems() {
		names = append(names, p.GetMetadata().GetName())
	}
	return names
}
