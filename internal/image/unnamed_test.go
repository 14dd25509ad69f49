package image

import (
	"archive/tar"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Layers that are unpacked at the same time must look as if each had been
// unpacked on those below it, also where they leave folders unnamed.
func TestUnnamedFolders(t *testing.T) {
	for _, name := range []string{snapshotterOverlay, snapshotterErofs} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t, func(o *Options) {
				if name == snapshotterErofs {
					needErofs(t, o.Root)
				}
				o.Snapshotter = name
			})
			unnamedFolders(t, s)
		})
	}
}

func unnamedFolders(t *testing.T, s *Store) {
	dir := func(name string, mode int64, uid int) tar.Header {
		return tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: mode, Uid: uid, Gid: uid}
	}
	file := func(name string) tar.Header { return tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644} }
	layers := []v1.Layer{
		layerOf(t, dir("srv/", 0o750, 7), dir("srv/data/", 0o1777, 8), dir("gone/", 0o700, 9), dir("late/", 0o711, 3), dir("hidden/", 0o755, 0), file("hidden/x"), file("removed")),
		layerOf(t, file("srv/data/x"), file(".wh.gone"), file("new/deep/x"), file("hidden/.wh..wh..opq"), file("hidden/y"), file(".wh.removed")),
		layerOf(t, file("srv/data/y"), file("gone/y"), dir("late/", 0o755, 4)),
		layerOf(t, file("srv/data/z"), file("late/z")),
	}
	r := newRegistry(t)
	// The second pull finds the lower layers, and puts one on them.
	mustPull(t, s, r.push(t, "app", "0", imageOf(t, nil, layers[:2]...)))
	img := mustPull(t, s, r.push(t, "app", "1", imageOf(t, nil, layers...)))
	root := mounted(t, s, img)
	for name, want := range map[string]struct {
		mode os.FileMode
		uid  uint32
	}{
		"srv": {0o750 | os.ModeDir, 7}, "srv/data": {0o777 | os.ModeDir | os.ModeSticky, 8},
		"gone": {0o755 | os.ModeDir, 0}, "late": {0o755 | os.ModeDir, 4}, "new/deep": {0o755 | os.ModeDir, 0},
	} {
		fi, err := os.Stat(filepath.Join(root, name))
		if err != nil {
			t.Error(err)
			continue
		}
		if uid := fi.Sys().(*syscall.Stat_t).Uid; fi.Mode() != want.mode || uid != want.uid {
			t.Errorf("%s is %v of %d, want %v of %d", name, fi.Mode(), uid, want.mode, want.uid)
		}
	}
	for _, name := range []string{"srv/data/x", "srv/data/y", "srv/data/z", "gone/y", "late/z", "new/deep/x", "hidden/y"} {
		if _, err := os.Stat(filepath.Join(root, name)); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"hidden/x", "removed"} {
		if _, err := os.Lstat(filepath.Join(root, name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v, though a layer removed it", name, err)
		}
	}
}

func TestNames(t *testing.T) {
	n := newNames()
	for _, h := range []tar.Header{
		{Name: "a/b/c"}, {Name: "a", Typeflag: tar.TypeDir}, {Name: "/x/../y/f"}, {Name: "d/", Typeflag: tar.TypeDir}, {Name: "d/e"}, {Name: "top"},
	} {
		n.header(&h)
	}
	if got, want := n.unnamed(), []string{"/y", "/a/b"}; !slices.Equal(got, want) {
		t.Errorf("unnamed %v, want %v", got, want)
	}
}

// mounted shows an image below a folder until the test ends.
func mounted(t testing.TB, s *Store, img Image) string {
	t.Helper()
	mounts, err := s.PrepareView(t.Context(), strings.ReplaceAll(t.Name(), "/", "-"), img, "")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := mount.All(mounts, dir); err != nil {
		t.Fatalf("mount %v: %v", mounts, err)
	}
	t.Cleanup(func() { _ = mount.UnmountAll(dir, 0) })
	return dir
}
