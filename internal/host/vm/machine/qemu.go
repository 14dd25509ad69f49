package machine

import (
	"context"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/host/proc"
)

func startQEMU(context.Context, *proc.Reaper, Config) (Machine, error) {
	return nil, errdefs.ErrNotImplemented
}

func attachQEMU(context.Context, *proc.Reaper, State) (Machine, error) {
	return nil, errdefs.ErrNotImplemented
}
