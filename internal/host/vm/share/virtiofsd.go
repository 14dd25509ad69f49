package share

import (
	"context"
	"path/filepath"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/host/proc"
)

func socketIn(dir string) string { return filepath.Join(dir, "virtiofsd.sock") }

func start(context.Context, *proc.Reaper, Config) (*FS, error) { return nil, errdefs.ErrNotImplemented }
func attach(*proc.Reaper, State) *FS                           { return nil }
func (f *FS) add(string, string, Options) error                { return errdefs.ErrNotImplemented }
func (f *FS) remove(string) error                              { return errdefs.ErrNotImplemented }
func (f *FS) stop(context.Context) error                       { return errdefs.ErrNotImplemented }
