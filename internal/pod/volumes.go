package pod

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/containerd/v2/core/mount"
	continuity "github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/selinux/go-selinux/label"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/image"
	"cloister.dev/internal/oci"
	"cloister.dev/internal/osutil"
)

// makeVolumes makes a folder on the node for each VOLUME of the image that no
// mount covers, filled with what the image has at that path.
func (s *Service) makeVolumes(sb *sandbox, c *container, img image.Image, rootfs string) (map[string]string, error) {
	if s.o.IgnoreImageVolumes {
		return nil, nil
	}
	paths, err := oci.ImageVolumes(img.Config)
	if err != nil {
		return nil, err
	}
	covered := map[string]bool{}
	for _, m := range c.record().Config.Mounts {
		covered[filepath.Clean(m.ContainerPath)] = true
	}
	volumes := map[string]string{}
	for i, p := range paths {
		if covered[p] {
			continue
		}
		dir := filepath.Join(s.volumeDir(c.record().ID), strconv.Itoa(i))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("make volume %s: %w", p, err)
		}
		if err := os.Chown(dir, int(rootOf(sb.record().UIDs)), int(rootOf(sb.record().GIDs))); err != nil {
			return nil, fmt.Errorf("give volume %s to root of the pod: %w", p, err)
		}
		if err := preparePlace(rootfs, p); err != nil {
			return nil, err
		}
		if err := copyUp(rootfs, p, dir); err != nil {
			return nil, fmt.Errorf("fill volume %s from the image: %w", p, err)
		}
		volumes[p] = dir
	}
	return volumes, nil
}

// preparePlace looks where a VOLUME lies in the root file system, which no
// process changes yet. Where a link of the image leads to nowhere it makes the
// folder: not every OCI runtime does. Links cannot leave rootfs.
func preparePlace(rootfs, volume string) error {
	real, err := continuity.RootPath(rootfs, volume)
	if err != nil {
		return fmt.Errorf("VOLUME %s of the image leads nowhere: %w: %w", volume, err, errdefs.ErrInvalidArgument)
	}
	place := filepath.Join("/", real[len(filepath.Clean(rootfs)):])
	if err := oci.CheckVolume(volume, place); err != nil {
		return err
	}
	if place != volume {
		err = os.MkdirAll(real, 0o755)
	} else if fi, e := os.Lstat(real); e == nil && !fi.IsDir() {
		err = unix.ENOTDIR
	}
	if errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("VOLUME %s of the image is, or lies below, what is no folder there: %w: %w", volume, err, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return fmt.Errorf("make the folder that VOLUME %s of the image leads to: %w", volume, err)
	}
	return nil
}

// copyUp copies the folder at path inside rootfs to dir, with ownership. The
// image chose path and every symlink on it, so it is resolved beneath rootfs.
func copyUp(rootfs, path, dir string) error {
	src, err := osutil.OpenInRoot(rootfs, path, unix.O_PATH|unix.O_DIRECTORY)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil // nothing there to copy
	}
	if err != nil {
		return err
	}
	defer src.Close()
	return continuity.CopyDir(dir, fmt.Sprintf("/proc/self/fd/%d/.", src.Fd()))
}

// makeImageVolumes mounts the images that the container mounts, read-only, and
// gives the folder for each container path.
func (s *Service) makeImageVolumes(ctx context.Context, sb *sandbox, c *container) (map[string]string, error) {
	volumes := map[string]string{}
	for i, m := range c.record().Config.Mounts {
		if m.GetImage().GetImage() == "" {
			continue
		}
		img, err := s.image(ctx, sb, m.Image.Image)
		if err != nil {
			return nil, fmt.Errorf("image volume at %s: %w", m.ContainerPath, err)
		}
		mounts, err := s.o.Images.PrepareView(ctx, imageVolumeKey(c.record().ID, i), img, sb.handler.Runtime.Snapshotter)
		if err != nil {
			return nil, fmt.Errorf("image volume at %s from %s: %w", m.ContainerPath, m.Image.Image, err)
		}
		dir := filepath.Join(c.record().Bundle, "images", strconv.Itoa(i))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("make the folder of an image volume: %w", err)
		}
		if err := mount.All(mounts, dir); err != nil {
			return nil, fmt.Errorf("mount image volume at %s: %w", m.ContainerPath, err)
		}
		if volumes[m.ContainerPath], err = subPath(dir, m); err != nil {
			return nil, err
		}
	}
	return volumes, nil
}

func imageVolumeKey(containerID string, i int) string {
	return fmt.Sprintf("%s-image-%d", containerID, i)
}

// subPath resolves a mount's image_sub_path beneath the mounted image.
func subPath(dir string, m *runtimeapi.Mount) (string, error) {
	if m.ImageSubPath == "" {
		return dir, nil
	}
	f, err := osutil.OpenInRoot(dir, m.ImageSubPath, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return "", fmt.Errorf("image_sub_path %.200q of the image volume at %s: it must be a folder in the image: %w: %w",
			m.ImageSubPath, m.ContainerPath, err, errdefs.ErrInvalidArgument)
	}
	defer f.Close()
	return os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
}

// prepareMounts makes missing host paths, as kubelet's users expect of
// hostPath, and resolves links, which the OCI runtime would follow blindly.
func prepareMounts(cfg *runtimeapi.ContainerConfig) (*runtimeapi.ContainerConfig, error) {
	if len(cfg.Mounts) == 0 {
		return cfg, nil
	}
	cfg = proto.CloneOf(cfg)
	for _, m := range cfg.Mounts {
		if m.HostPath == "" {
			continue
		}
		real, err := filepath.EvalSymlinks(m.HostPath)
		if errors.Is(err, fs.ErrNotExist) {
			if err := os.MkdirAll(m.HostPath, 0o755); err != nil {
				return nil, fmt.Errorf("make host path %s of the mount at %s: %w", m.HostPath, m.ContainerPath, err)
			}
			real, err = filepath.EvalSymlinks(m.HostPath)
		}
		if err != nil {
			return nil, fmt.Errorf("host path %s of the mount at %s: %w", m.HostPath, m.ContainerPath, err)
		}
		m.HostPath = real
	}
	return cfg, nil
}

// relabel gives host paths the container's SELinux label where the mount asks
// for it.
func relabel(res *oci.Result) error {
	for _, path := range res.Relabel {
		if err := label.Relabel(path, res.Spec.Linux.MountLabel, false); err != nil && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("set the SELinux label of %s: %w", path, err)
		}
	}
	return nil
}

// releaseFiles takes down what a container has on the node besides its task.
// It may be repeated and finds everything by the container's id.
func (s *Service) releaseFiles(ctx context.Context, c *container) error {
	id := c.record().ID
	for i, m := range c.record().Config.GetMounts() {
		if m.GetImage().GetImage() == "" {
			continue
		}
		if err := unmountAll(filepath.Join(c.record().Bundle, "images", strconv.Itoa(i))); err != nil {
			return err
		}
		if err := s.o.Images.RemoveRootfs(ctx, imageVolumeKey(id, i)); err != nil {
			return fmt.Errorf("remove an image volume: %w", err)
		}
	}
	if err := unmountAll(filepath.Join(c.record().Bundle, "rootfs")); err != nil {
		return err
	}
	if err := os.RemoveAll(c.record().Bundle); err != nil {
		return fmt.Errorf("remove the container's bundle: %w", err)
	}
	if err := s.o.Images.RemoveRootfs(ctx, id); err != nil {
		return fmt.Errorf("remove the root file system: %w", err)
	}
	if err := os.RemoveAll(s.volumeDir(id)); err != nil {
		return fmt.Errorf("remove the container's volumes: %w", err)
	}
	return nil
}
