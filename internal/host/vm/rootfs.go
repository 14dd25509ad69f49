package vm

import (
	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/container"
)

// mountRootfs mounts what a stock containerd names; Cloister's own daemon has
// mounted already.
func mountRootfs(t *backend.TaskSpec) error { return container.MountRootfs(t) }

func unmountRootfs(t *backend.TaskSpec) error { return container.UnmountRootfs(t) }
