package vm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	guestv1 "cloister.dev/api/guest/v1"
	"cloister.dev/internal/host/proc"
	"cloister.dev/internal/host/vm/machine"
	"cloister.dev/internal/host/vm/share"
)

// How image layers reach the guest.
const (
	layersShared = "virtio-fs"
	layersEROFS  = "erofs"
)

// Folders of what a container writes, beneath the upper folder that the node's
// overlay has for it: there it is counted and removed like any container's.
const (
	upperDir = "upper"
	workDir  = "work"
)

// overlay is what an overlay file system on the node is made of.
type overlay struct {
	layers []string // the uppermost first
	upper  string
}

// overlayAt finds the overlay on a mount point in a list like
// /proc/self/mountinfo. There is none where something else is mounted, or where
// the kernel does not tell whole paths.
func overlayAt(mountinfo, point string) (o overlay, ok bool) {
	for line := range strings.Lines(mountinfo) {
		mount, system, found := strings.Cut(strings.TrimSuffix(line, "\n"), " - ")
		place, kind := strings.Fields(mount), strings.Fields(system)
		if !found || len(place) < 5 || len(kind) < 3 || place[4] != point {
			continue
		}
		o, ok = overlay{}, kind[0] == "overlay" // the last one is on top
		for option := range strings.SplitSeq(kind[2], ",") {
			name, value, _ := strings.Cut(option, "=")
			switch name {
			case "lowerdir":
				o.layers = strings.Split(value, ":")
			case "upperdir":
				o.upper = value
			}
		}
	}
	for _, path := range append([]string{o.upper}, o.layers...) {
		if !filepath.IsAbs(path) || strings.Contains(path, `\`) {
			return overlay{}, false
		}
	}
	return o, ok && len(o.layers) > 0
}

// plugRoot makes the root file system at path one that the guest puts together
// out of disks. found is false when it is no overlay of layers.
func (s *sandbox) plugRoot(ctx context.Context, task, path string) (r *guestv1.Rootfs, found bool, err error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, false, err
	}
	o, found := overlayAt(string(b), path)
	if !found {
		return nil, false, nil
	}
	r = &guestv1.Rootfs{Writable: filepath.Join(key(task, ""), "writable")}
	for _, layer := range o.layers {
		image, err := s.backend.layerImage(ctx, s.record().Mkfs, layer)
		if err != nil {
			return nil, true, fmt.Errorf("make a disk of image layer %s: %w", layer, err)
		}
		sum := sha256.Sum256([]byte(image))
		id := "e" + hex.EncodeToString(sum[:8])
		if err := s.plugDisk(ctx, task, machine.Disk{ID: id, Path: image, ReadOnly: true}); err != nil {
			return nil, true, fmt.Errorf("image layer %s: %w", layer, err)
		}
		r.Layers = append(r.Layers, id)
	}
	if err := makeWritable(o.upper); err != nil {
		return nil, true, fmt.Errorf("make room for what the container writes: %w", err)
	}
	return r, true, s.files().Add(r.Writable, o.upper, share.Options{})
}

// makeWritable makes the folders of what a container writes. What a start that
// failed has left in them is of no use.
func makeWritable(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	var st syscall.Stat_t
	if err := syscall.Stat(dir, &st); err != nil {
		return err
	}
	work, upper := filepath.Join(dir, workDir), filepath.Join(dir, upperDir)
	// The folder above them is the root of the container.
	return errors.Join(os.RemoveAll(work), os.RemoveAll(upper), os.Mkdir(work, 0o700), os.Mkdir(upper, 0o700),
		os.Lchown(upper, int(st.Uid), int(st.Gid)), os.Chmod(upper, info.Mode()))
}

// imageSuffix makes the name of a layer's image out of its folder's: it lies
// beside that, and goes when whoever keeps the layer removes both.
const imageSuffix = ".erofs"

// layerTime bounds making the image of a layer.
const layerTime = 10 * time.Minute

// layerImage gives the EROFS image of a layer, which is made once.
func (b *Backend) layerImage(ctx context.Context, mkfs, layer string) (string, error) {
	image := layer + imageSuffix
	if _, err := os.Stat(image); err == nil {
		return image, nil
	}
	// Who comes meanwhile gets the same one; who began it may give up.
	_, err, _ := b.images.Do(image, func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), layerTime)
		defer cancel()
		return nil, b.makeImage(ctx, mkfs, layer, image)
	})
	return image, err
}

func (b *Backend) makeImage(ctx context.Context, mkfs, layer, image string) (err error) {
	if _, err := os.Stat(image); err == nil {
		return nil
	}
	if err := markOpaque(layer); err != nil {
		return err
	}
	fresh, began := image+".new", time.Now()
	defer func() {
		if err != nil {
			_ = os.Remove(fresh) // the error says enough
		}
	}()
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	said, err := os.CreateTemp(b.dir, "mkfs-")
	if err != nil {
		return err
	}
	defer os.Remove(said.Name())
	defer said.Close()
	exit, err := b.reaper.RunCommand(ctx, proc.Command{Path: mkfs, Args: []string{mkfs, "--quiet", "--preserve-mtime", fresh, layer},
		Env: []string{"LC_ALL=C", "PATH=/usr/bin:/bin", "TMPDIR=" + filepath.Dir(layer)}, Dir: "/", Files: [3]*os.File{nil, said, said}})
	if err == nil && exit.Status != 0 {
		text, _ := os.ReadFile(said.Name()) // for the message
		err = fmt.Errorf("%s ended with status %d: %s: %w", mkfs, exit.Status, strings.TrimSpace(string(text)), errdefs.ErrUnavailable)
	}
	if err != nil {
		return err
	}
	if err := flush(fresh); err != nil {
		return err
	}
	b.log.Info("made a disk of an image layer", "layer", layer, "took", time.Since(began))
	return os.Rename(fresh, image)
}

func flush(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// How folders say that they hide what lower layers have there: to the node's
// overlay, and to the guest's, whose marks are those of a user because the one
// who serves them may not make the others.
const (
	opaque     = "trusted.overlay.opaque"
	userOpaque = "user.overlay.opaque"
)

// markOpaque has a layer say what it hides in both ways.
func markOpaque(layer string) error {
	return filepath.WalkDir(layer, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.IsDir() {
			return err
		}
		var mark [1]byte
		if n, err := unix.Lgetxattr(path, opaque, mark[:]); err != nil || n != 1 || mark[0] != 'y' {
			return nil //nolint:nilerr // it has no such mark
		}
		if err := unix.Lsetxattr(path, userOpaque, mark[:], 0); err != nil {
			return fmt.Errorf("mark %s: %w", path, err)
		}
		return nil
	})
}
