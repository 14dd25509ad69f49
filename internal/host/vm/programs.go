package vm

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/containerd/errdefs"

	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/host/vm/machine"
)

// FindQEMU finds QEMU's program for this architecture.
func FindQEMU(path string) (string, error) {
	if path == "" {
		path = "qemu-system-" + map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[runtime.GOARCH]
	}
	found, err := exec.LookPath(path)
	if err != nil {
		return "", fmt.Errorf("QEMU (%w): install qemu-system-x86, or name it in the handler's path: %w", err, errdefs.ErrFailedPrecondition)
	}
	return filepath.Abs(found)
}

// virtiofsdPlaces is where distributions put it; it is in nobody's PATH.
var virtiofsdPlaces = [...]string{"/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd", "virtiofsd"}

// FindVirtiofsd finds the program that serves files to machines.
func FindVirtiofsd(path string) (string, error) {
	places := virtiofsdPlaces[:]
	if path != "" {
		places = []string{path}
	}
	for _, p := range places {
		if found, err := exec.LookPath(p); err == nil {
			return filepath.Abs(found)
		}
	}
	return "", fmt.Errorf("virtiofsd is not on this machine (looked for %s): install qemu-system-common or virtiofsd, or name it in the handler's virtio_fs_daemon: %w",
		strings.Join(places, ", "), errdefs.ErrFailedPrecondition)
}

// findMkfs finds the program that makes disks of image layers, where the
// options want them.
func findMkfs(o *hostv1.MachineOptions) (string, error) {
	if o.ImageLayers != layersEROFS {
		return "", nil
	}
	for _, name := range [...]string{"mkfs.erofs", "/usr/bin/mkfs.erofs", "/usr/sbin/mkfs.erofs"} {
		if found, err := exec.LookPath(name); err == nil {
			return filepath.Abs(found)
		}
	}
	return "", fmt.Errorf("mkfs.erofs is not on this machine: install erofs-utils, or set the handler's image_layers to %q: %w", layersShared, errdefs.ErrFailedPrecondition)
}

// lastLines gives the end of a guest's console as one text.
func lastLines(console []byte, n int) string {
	return strings.TrimSpace(strings.Join(machine.LastLines(console, n), "\n"))
}
