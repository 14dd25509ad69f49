//go:build !cgo

package image

import (
	"errors"

	"github.com/containerd/containerd/v2/core/snapshots"
)

// openBtrfs is for a static program: containerd's snapshotter is linked with C.
func openBtrfs(string) (snapshots.Snapshotter, error) {
	return nil, errors.New("this program was built without cgo, which the btrfs snapshotter needs; build it by make build CGO=1")
}
