package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/client"
	"cloister.dev/internal/client/display"
)

func (a *app) inspectCommand() *cobra.Command {
	format := display.JSON
	cmd := &cobra.Command{
		Use:               "inspect CONTAINER|POD|IMAGE",
		Short:             "Show all that is known of a container, a pod or an image",
		Example:           "  cloister inspect web\n  cloister inspect -o yaml busybox",
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: first(a.complete(containerNames)),
		RunE: a.with(func(ctx context.Context, c *client.Conn, refs []string) error {
			m, info, err := inspect(ctx, c, refs[0])
			if err != nil {
				return err
			}
			v, err := inspected(m, info)
			if err != nil {
				return err
			}
			return display.Value(a.stdout, format, v)
		}),
	}
	cmd.Flags().VarP(&format, "output", "o", "how to print: json or yaml")
	return cmd
}

func inspect(ctx context.Context, c *client.Conn, ref string) (proto.Message, map[string]string, error) {
	x, err := c.Container(ctx, ref)
	if err == nil {
		r, err := c.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: x.GetId(), Verbose: true})
		return r.GetStatus(), r.GetInfo(), err
	}
	if !errors.Is(err, errdefs.ErrNotFound) {
		return nil, nil, err
	}
	pod, err := c.Pod(ctx, ref)
	if err == nil {
		r, err := c.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod.GetId(), Verbose: true})
		return r.GetStatus(), r.GetInfo(), err
	}
	if !errors.Is(err, errdefs.ErrNotFound) {
		return nil, nil, err
	}
	image, err := c.Image(ctx, ref)
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil, nil, fmt.Errorf("there is no container, no pod and no image %q: %w", ref, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, nil, err
	}
	spec := &runtimeapi.ImageSpec{Image: image.GetId()}
	r, err := c.Images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: spec, Verbose: true})
	return r.GetImage(), r.GetInfo(), err
}

// inspected joins a status with its verbose info, whose values are JSON in
// strings.
func inspected(m proto.Message, info map[string]string) (any, error) {
	b, err := protojson.MarshalOptions{EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode the answer: %w", err)
	}
	var status any
	if err := json.Unmarshal(b, &status); err != nil {
		return nil, fmt.Errorf("encode the answer: %w", err)
	}
	more := map[string]any{}
	for k, text := range info {
		var v any
		if json.Unmarshal([]byte(text), &v) != nil {
			v = text
		}
		more[k] = v
	}
	return map[string]any{"status": status, "info": more}, nil
}
