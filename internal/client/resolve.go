package client

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Container finds a container by its id, the beginning of its id, or its name.
func (c *Conn) Container(ctx context.Context, ref string) (*runtimeapi.Container, error) {
	list, err := c.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	name := func(x *runtimeapi.Container) string { return x.GetMetadata().GetName() }
	return pick("container", ref, list.GetContainers(), (*runtimeapi.Container).GetId, name)
}

// Pod finds a pod by its id, the beginning of its id, or its name.
func (c *Conn) Pod(ctx context.Context, ref string) (*runtimeapi.PodSandbox, error) {
	list, err := c.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return nil, fmt.Errorf("list pods: %w", err)
	}
	name := func(x *runtimeapi.PodSandbox) string { return x.GetMetadata().GetName() }
	return pick("pod", ref, list.GetItems(), (*runtimeapi.PodSandbox).GetId, name)
}

// pick is the one item that ref means: a whole id, else a name, else the
// beginning of an id. What fits several items fits none.
func pick[T any](kind, ref string, items []T, id, name func(T) string) (T, error) {
	var none T
	if ref == "" {
		return none, fmt.Errorf("%s: the name is empty: %w", kind, errdefs.ErrInvalidArgument)
	}
	tests := []func(T) bool{
		func(x T) bool { return id(x) == ref },
		func(x T) bool { return name(x) == ref },
		func(x T) bool { return strings.HasPrefix(id(x), ref) },
	}
	for _, fits := range tests {
		var found []T
		for _, x := range items {
			if fits(x) {
				found = append(found, x)
			}
		}
		switch len(found) {
		case 0:
			continue
		case 1:
			return found[0], nil
		}
		return none, fmt.Errorf("%s %q fits %d of them, such as %s and %s; give more of the id: %w",
			kind, ref, len(found), ShortID(id(found[0])), ShortID(id(found[1])), errdefs.ErrInvalidArgument)
	}
	return none, fmt.Errorf("there is no %s %q; \"cloister %s\" lists them: %w", kind, ref, lister(kind), errdefs.ErrNotFound)
}

func lister(kind string) string {
	if kind == "pod" {
		return "pods"
	}
	return "ps -a"
}

// ShortID is the part of an id that people read.
func ShortID(id string) string {
	const shown = 13
	if _, hex, ok := strings.Cut(id, ":"); ok {
		id = hex
	}
	return id[:min(len(id), shown)]
}
