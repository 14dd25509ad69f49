package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/client"
	"cloister.dev/internal/client/display"
)

func (a *app) psCommand() *cobra.Command {
	var all, quiet bool
	var format *display.Format
	cmd := &cobra.Command{
		Use:   "ps",
		Short: "List containers",
		Example: `  cloister ps
  cloister ps -a -o wide
  cloister ps -q | xargs cloister stop`,
		Args:              args(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: a.with(func(ctx context.Context, c *client.Conn, _ []string) error {
			req := &runtimeapi.ListContainersRequest{}
			if !all {
				req.Filter = &runtimeapi.ContainerFilter{State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING}}
			}
			r, err := c.Runtime.ListContainers(ctx, req)
			if err != nil {
				return fmt.Errorf("list containers: %w", err)
			}
			slices.SortFunc(r.Containers, func(x, y *runtimeapi.Container) int { return cmp.Compare(y.CreatedAt, x.CreatedAt) })
			if quiet {
				for _, x := range r.GetContainers() {
					fmt.Fprintln(a.stdout, x.GetId())
				}
				return nil
			}
			if format.Structured() {
				return display.Message(a.stdout, *format, r)
			}
			pods, err := c.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
			if err != nil {
				return fmt.Errorf("list pods: %w", err)
			}
			return containerTable(r.GetContainers(), pods.GetItems(), *format == display.Wide, time.Now()).Write(a.stdout)
		}),
	}
	format = outputFlag(cmd)
	cmd.Flags().BoolVarP(&all, "all", "a", false, "also those that do not run")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "ids only")
	return cmd
}

func containerTable(list []*runtimeapi.Container, pods []*runtimeapi.PodSandbox, wide bool, now time.Time) *display.Table {
	byID := map[string]*runtimeapi.PodSandbox{}
	for _, p := range pods {
		byID[p.GetId()] = p
	}
	t := &display.Table{Heading: []string{"CONTAINER", "NAME", "IMAGE", "STATE", "CREATED", "POD"}}
	if wide {
		t.Heading = append(t.Heading, "NAMESPACE", "ATTEMPT", "POD ID", "HANDLER")
	}
	for _, x := range list {
		pod := byID[x.GetPodSandboxId()]
		image := x.GetImage().GetUserSpecifiedImage()
		if image == "" {
			image = x.GetImage().GetImage()
		}
		if strings.HasPrefix(image, "sha256:") {
			image = client.ShortID(image)
		}
		row := []string{client.ShortID(x.GetId()), x.GetMetadata().GetName(), image, containerState(x.GetState()),
			display.Age(x.GetCreatedAt(), now), pod.GetMetadata().GetName()}
		if wide {
			row = append(row, pod.GetMetadata().GetNamespace(), fmt.Sprint(x.GetMetadata().GetAttempt()),
				client.ShortID(x.GetPodSandboxId()), handlerName(pod))
		}
		t.Add(row...)
	}
	return t
}

func containerState(s runtimeapi.ContainerState) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "CONTAINER_"))
}
