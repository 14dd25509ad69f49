package pod

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/oci"
)

// UpdateResources changes the resources of a created or running container.
// Fields that are zero stay as they are.
func (s *Service) UpdateResources(ctx context.Context, id string, r *runtimeapi.LinuxContainerResources, annotations map[string]string) error {
	c, err := s.lockedContainer(ctx, id)
	if err != nil {
		return err
	}
	defer c.op.unlock()
	p := c.phase()
	if p != ready && p != running {
		return fmt.Errorf("container %.13s is %s, resources of a created or running one can change: %w", c.record().ID, p.containerState(), errdefs.ErrFailedPrecondition)
	}
	path := filepath.Join(c.record().Bundle, "config.json")
	var spec specs.Spec
	data, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(data, &spec)
	}
	if err != nil {
		return fmt.Errorf("read the container's specification: %w", err)
	}
	res, err := oci.UpdateResources(&spec, r, s.o.Node)
	if err != nil {
		return err
	}
	if p == running {
		if err := c.task(s).Update(ctx, res); err != nil {
			return fmt.Errorf("update the resources of container %q: %w", c.record().Config.Metadata.Name, err)
		}
	} else {
		oci.DropUnlimited(res)
	}
	spec.Linux.Resources = res
	if data, err = json.Marshal(&spec); err != nil {
		return fmt.Errorf("encode the specification: %w", err)
	}
	if err := replaceFile(path, data); err != nil {
		return err
	}
	return s.changeContainer(c, func(rec *containerRecord) {
		rec.Resources = &runtimeapi.ContainerResources{Linux: mergeResources(rec.Resources.GetLinux(), r)}
	})
}

// mergeResources lays the fields that r sets over old.
func mergeResources(old, r *runtimeapi.LinuxContainerResources) *runtimeapi.LinuxContainerResources {
	if r == nil {
		return old
	}
	merged := &runtimeapi.LinuxContainerResources{}
	if old != nil {
		merged = proto.CloneOf(old)
	}
	if r.HugepageLimits != nil {
		merged.HugepageLimits = nil // Merge appends lists
	}
	proto.Merge(merged, r)
	return merged
}

func replaceFile(path string, data []byte) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("replace %s: %w", path, err)
	}
	return nil
}

// UpdateSandboxResources notes the pod's new resources. The kubelet has
// changed the pod's cgroup itself.
func (s *Service) UpdateSandboxResources(ctx context.Context, r *runtimeapi.UpdatePodSandboxResourcesRequest) error {
	sb, err := s.index.sandbox(r.PodSandboxId)
	if err != nil {
		return err
	}
	if err := sb.op.lock(ctx); err != nil {
		return err
	}
	defer sb.op.unlock()
	if sb.phase() != ready {
		return fmt.Errorf("pod sandbox %.13s is not ready: %w", sb.record().ID, errdefs.ErrFailedPrecondition)
	}
	return s.changeSandbox(sb, func(rec *sandboxRecord) {
		if r.Overhead != nil {
			rec.Overhead = r.Overhead
		}
		if r.Resources != nil {
			rec.Resources = r.Resources
		}
	})
}

// ReopenLog makes a running container's log continue in a new file, after the
// kubelet has renamed the old one.
func (s *Service) ReopenLog(ctx context.Context, id string) error {
	c, err := s.runningContainer(id)
	if err != nil {
		return err
	}
	if c.record().LogPath == "" {
		return fmt.Errorf("container %.13s has no log: %w", c.record().ID, errdefs.ErrFailedPrecondition)
	}
	return c.task(s).ReopenLog(ctx)
}
