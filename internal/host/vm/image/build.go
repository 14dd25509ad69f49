package image

import (
	"context"

	"github.com/containerd/errdefs"
)

func build(context.Context, BuildOptions) (Guest, error) { return Guest{}, errdefs.ErrNotImplemented }
func open(string, string) (Guest, error)                 { return Guest{}, errdefs.ErrNotImplemented }
func list(string) ([]Guest, error)                       { return nil, errdefs.ErrNotImplemented }
