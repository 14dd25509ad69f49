package container

import (
	"context"
	"fmt"
	"path/filepath"

	cgroups "github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"cloister.dev/internal/host/backend"
)

// Stats is part of backend.Backend.
func (b *Backend) Stats(_ context.Context, t *backend.TaskSpec, init backend.Process) (*anypb.Any, error) {
	m, err := metrics(init.Place)
	if err != nil {
		return nil, fmt.Errorf("read the metrics of task %s: %w", t.ID, err)
	}
	value, err := proto.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode the metrics of task %s: %w", t.ID, err)
	}
	return &anypb.Any{TypeUrl: string(m.ProtoReflect().Descriptor().FullName()), Value: value}, nil
}

func metrics(place string) (proto.Message, error) {
	paths := placePaths(place)
	if cgroups.Mode() == cgroups.Unified {
		path := paths[""]
		if path == "" || path == "/" {
			return nil, fmt.Errorf("the container has no cgroup of its own: %w", errdefs.ErrNotFound)
		}
		cg, err := cgroup2.Load(path)
		if err != nil {
			return nil, err
		}
		return cg.Stat()
	}
	cg, err := cgroup1.Load(func(name cgroup1.Name) (string, error) {
		if p := paths[string(name)]; cgroupDir(place, string(name)) != "" {
			return filepath.Clean(p), nil
		}
		return "", cgroup1.ErrControllerNotActive
	})
	if err != nil {
		return nil, err
	}
	return cg.Stat(cgroup1.IgnoreNotExist)
}
