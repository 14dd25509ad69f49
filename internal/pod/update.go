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

	"cloister.dev/internal/nri"
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
	spec, err := readSpec(c.record().Bundle)
	if err != nil {
		return err
	}
	res, err := oci.UpdateResources(spec, r, s.o.Node)
	if err != nil {
		return err
	}
	if res, err = s.adjustUpdate(ctx, c, spec, r, res); err != nil {
		return err
	}
	if err := s.setResources(ctx, c, spec, res, r); err != nil {
		return err
	}
	if s.o.NRI.Active() {
		s.tell("PostUpdateContainer", c.record().ID, s.o.NRI.PostUpdate(ctx, s.podOf(c), s.describeContainer(c, spec)))
	}
	return nil
}

// setResources gives the container res, which its specification then has. The
// record gets what r tells of them. The caller holds c.op.
func (s *Service) setResources(ctx context.Context, c *container, spec *specs.Spec, res *specs.LinuxResources, r *runtimeapi.LinuxContainerResources) error {
	if c.phase() == running {
		if err := c.task(s).Update(ctx, res); err != nil {
			return fmt.Errorf("update the resources of container %q: %w", c.record().Config.Metadata.Name, err)
		}
	} else {
		oci.DropUnlimited(res)
	}
	spec.Linux.Resources = res
	data, err := json.Marshal(spec)
	if err != nil {
		return fmt.Errorf("encode the specification: %w", err)
	}
	if err := replaceFile(filepath.Join(c.record().Bundle, "config.json"), data); err != nil {
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

// readSpec reads the specification of the container with this bundle.
func readSpec(bundle string) (*specs.Spec, error) {
	var spec specs.Spec
	data, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err == nil {
		err = json.Unmarshal(data, &spec)
	}
	if err != nil {
		return nil, fmt.Errorf("read the container's specification: %w", err)
	}
	return &spec, nil
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
	plugins := s.o.NRI.Active()
	if plugins {
		if err := s.o.NRI.UpdatePod(ctx, s.describePod(sb), nri.Resources(r.Overhead), nri.Resources(r.Resources)); err != nil {
			return err
		}
	}
	err = s.changeSandbox(sb, func(rec *sandboxRecord) {
		rec.Resized = true
		if r.Overhead != nil {
			rec.Overhead = r.Overhead
		}
		if r.Resources != nil {
			rec.Resources = r.Resources
		}
	})
	if err == nil && plugins {
		s.tell("PostUpdatePodSandbox", sb.record().ID, s.o.NRI.PostUpdatePod(ctx, s.describePod(sb)))
	}
	return err
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
