//go:build cgo

package image

import (
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/btrfs"
)

func openBtrfs(root string) (snapshots.Snapshotter, error) { return btrfs.NewSnapshotter(root) }
