package client

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// StopContainer asks the container to end and kills it when the grace time is
// over. A container that has ended already is a success.
func (c *Conn) StopContainer(ctx context.Context, id string, grace time.Duration) error {
	seconds := int64((grace + time.Second - 1) / time.Second)
	_, err := c.Runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: seconds})
	if err != nil {
		return fmt.Errorf("stop container %s: %w", ShortID(id), err)
	}
	return nil
}

// RemovePod removes a pod and its containers. Without force a pod that is
// still ready is refused.
func (c *Conn) RemovePod(ctx context.Context, id string, force bool) error {
	r, err := c.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id})
	if err != nil {
		return fmt.Errorf("remove pod %s: %w", ShortID(id), err)
	}
	if !force && r.GetStatus().GetState() == runtimeapi.PodSandboxState_SANDBOX_READY {
		return fmt.Errorf("pod %s is running; stop it first, or remove it with --force: %w", ShortID(id), errdefs.ErrFailedPrecondition)
	}
	if _, err := c.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return fmt.Errorf("stop pod %s: %w", ShortID(id), err)
	}
	if _, err := c.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		return fmt.Errorf("remove pod %s: %w", ShortID(id), err)
	}
	return nil
}

// RemoveContainer removes a container, and its pod when "cloister run" made it.
func (c *Conn) RemoveContainer(ctx context.Context, x *runtimeapi.Container, force bool) error {
	if !force && x.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
		return fmt.Errorf("container %s is running; stop it first, or remove it with --force: %w",
			ShortID(x.GetId()), errdefs.ErrFailedPrecondition)
	}
	if x.GetLabels()[RunLabel] != "" {
		return c.removeRun(ctx, x)
	}
	if force {
		if err := c.StopContainer(ctx, x.GetId(), 0); err != nil {
			return err
		}
	}
	if _, err := c.Runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: x.GetId()}); err != nil {
		return fmt.Errorf("remove container %s: %w", ShortID(x.GetId()), err)
	}
	return nil
}

func (c *Conn) removeRun(ctx context.Context, x *runtimeapi.Container) error {
	st, err := c.ContainerStatus(ctx, x.GetId())
	if err != nil {
		return err
	}
	if err := c.RemovePod(ctx, x.GetPodSandboxId(), true); err != nil {
		return err
	}
	// The folder is one that CreateRun made, or it is left alone.
	dir := filepath.Dir(st.GetLogPath())
	if !strings.HasPrefix(filepath.Base(dir), "default_"+x.GetMetadata().GetName()+"_") {
		return nil
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove the log folder: %w", err)
	}
	return nil
}
