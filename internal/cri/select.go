package cri

import (
	"cmp"
	"context"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/pod"
)

// unlessAbsent makes stopping and removing idempotent.
func unlessAbsent(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// sandboxes are those that match all of the filter, oldest first.
func (s *Server) sandboxes(f *runtimeapi.PodSandboxFilter) []pod.Sandbox {
	all := s.pods.Sandboxes()
	if f.GetId() != "" {
		all = one(s.pods.Sandbox(f.GetId()))
	}
	all = slices.DeleteFunc(all, func(sb pod.Sandbox) bool {
		return f.GetState() != nil && sb.State != f.GetState().GetState() || !labelled(sb.Config.GetLabels(), f.GetLabelSelector())
	})
	slices.SortFunc(all, func(a, b pod.Sandbox) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), strings.Compare(a.ID, b.ID))
	})
	return all
}

// containers are those that match all of the filter, oldest first.
func (s *Server) containers(f *runtimeapi.ContainerFilter) []pod.Container {
	all := s.pods.Containers()
	if f.GetId() != "" {
		all = one(s.pods.Container(f.GetId()))
	}
	sandboxID := f.GetPodSandboxId()
	if sandboxID != "" {
		// A sandbox that is gone has no containers, and its id is matched as it is.
		if sb, err := s.pods.Sandbox(sandboxID); err == nil {
			sandboxID = sb.ID
		}
	}
	all = slices.DeleteFunc(all, func(c pod.Container) bool {
		return sandboxID != "" && c.SandboxID != sandboxID ||
			f.GetState() != nil && c.State != f.GetState().GetState() ||
			!labelled(c.Config.GetLabels(), f.GetLabelSelector())
	})
	slices.SortFunc(all, func(a, b pod.Container) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), strings.Compare(a.ID, b.ID))
	})
	return all
}

// one is the list of what was found by id. A filter by an unknown id finds
// nothing, which is no error.
func one[T any](v T, err error) []T {
	if err != nil {
		return nil
	}
	return []T{v}
}

// labelled says whether labels hold all of the selector.
func labelled(labels, selector map[string]string) bool {
	for k, want := range selector {
		if got, ok := labels[k]; !ok || got != want {
			return false
		}
	}
	return true
}

// batchBytes is when a message of a streamed list is full; far below what
// clients accept, because a single item may be large.
const batchBytes = 1 << 20

// inBatches sends items in lists of bounded size, each item once.
func inBatches[T proto.Message](ctx context.Context, items []T, send func([]T) error) error {
	for len(items) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, size := 1, proto.Size(items[0])
		for n < len(items) {
			if size += proto.Size(items[n]); size > batchBytes {
				break
			}
			n++
		}
		if err := send(items[:n]); err != nil {
			return err
		}
		items = items[n:]
	}
	return nil
}
