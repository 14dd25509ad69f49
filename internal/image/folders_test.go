package image

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// show mounts a root file system.
func show(t *testing.T, mounts []mount.Mount) string {
	t.Helper()
	dir := t.TempDir()
	if err := mount.All(mounts, dir); err != nil {
		t.Fatalf("mount %v: %v", mounts, err)
	}
	t.Cleanup(func() { _ = mount.UnmountAll(dir, 0) })
	return dir
}

func basesOf(t *testing.T, s *Store) (names []string) {
	t.Helper()
	err := s.snapshotters[snapshotterOverlay].Walk(s.ctx, func(_ context.Context, i snapshots.Info) error {
		if i.Labels[labelBase] != "" {
			names = append(names, i.Name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// Root file systems of an image have the same layers, and what one of them
// writes no other sees; the daemon may be restarted meanwhile.
func TestFolders(t *testing.T) {
	r := newRegistry(t)
	root := t.TempDir()
	open := func() *Store { return openStore(t, func(o *Options) { o.Root = root }) }
	s := open()
	img := mustPull(t, s, r.push(t, "app", "1", imageOf(t, nil, fileLayer(t, "f", []byte("x")), fileLayer(t, "g", []byte("y")))))
	var dirs []string
	for _, key := range []string{"a", "b"} {
		mounts, err := s.PrepareRootfs(t.Context(), key, img, RootfsOptions{Volatile: true})
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Contains(mounts[0].Options, "volatile") {
			t.Errorf("mounts %v", mounts)
		}
		dirs = append(dirs, show(t, mounts))
	}
	if err := os.WriteFile(filepath.Join(dirs[0], "f"), []byte("written"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dirs[1], "f")); err != nil || string(got) != "x" {
		t.Errorf("the other sees %q, %v", got, err)
	}
	if names := basesOf(t, s); len(names) != 1 {
		t.Errorf("two root file systems of an image stand on %v", names)
	}
	if _, err := s.PrepareRootfs(t.Context(), "a", img, RootfsOptions{}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("the same again: %v", err)
	}
	before, err := s.RootfsMounts(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open()
	if after, err := s.RootfsMounts(t.Context(), "a"); err != nil || !slices.Equal(after[0].Options, before[0].Options) {
		t.Errorf("mounts were %v and are %v, %v", before, after, err)
	}
	if bytes, inodes, err := s.RootfsUsage(t.Context(), "a"); err != nil || bytes == 0 || inodes != 2 {
		t.Errorf("usage is %d bytes, %d inodes, %v", bytes, inodes, err)
	}
	u, err := s.Usage(t.Context())
	if err != nil || u.Snapshots[0].Inodes < 2+2+1 { // of layers, a and b
		t.Errorf("usage of all is %v, %v", u, err)
	}
}

// The layers stay while a container needs them, and go with the last one.
func TestFoldersKeepTheirLayers(t *testing.T) {
	r := newRegistry(t)
	s := openStore(t, nil)
	img := mustPull(t, s, r.push(t, "app", "1", imageOf(t, nil, fileLayer(t, "f", []byte("x")))))
	mounts, err := s.PrepareRootfs(t.Context(), "c", img, RootfsOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), img.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.collectNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(show(t, mounts), "f")); err != nil {
		t.Errorf("the image was removed: %v", err)
	}
	for range 2 { // absent is fine
		if err := s.RemoveRootfs(t.Context(), "c"); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.collectNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	if names := basesOf(t, s); len(names) != 0 {
		t.Errorf("%v are left", names)
	}
	if old, err := os.ReadDir(filepath.Join(s.foldersDir(), trashName)); err != nil || len(old) != 0 {
		t.Errorf("%v are left, %v", old, err)
	}
	if _, err := s.RootfsMounts(t.Context(), "c"); !errdefs.IsNotFound(err) {
		t.Errorf("it is there still: %v", err)
	}
	for n := range s.bases.byName {
		t.Errorf("base %s is remembered", n)
	}
}

// A folder that was never finished can be removed.
func TestUnfinishedFolders(t *testing.T) {
	r := newRegistry(t)
	root := t.TempDir()
	open := func() *Store { return openStore(t, func(o *Options) { o.Root = root }) }
	s := open()
	img := mustPull(t, s, r.push(t, "app", "1", imageOf(t, nil, fileLayer(t, "f", []byte("x")))))
	for _, key := range []string{"whole", "unfinished/one"} {
		if _, err := s.PrepareRootfs(t.Context(), key, img, RootfsOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(s.folder("unfinished/one"), aboutName)); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open()
	if _, err := s.RootfsMounts(t.Context(), "unfinished/one"); !errdefs.IsNotFound(err) {
		t.Errorf("mounts of an unfinished one: %v", err)
	}
	dir := s.folder("unfinished/one")
	if err := s.RemoveRootfs(t.Context(), "unfinished/one"); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if got, err := s.Rootfs(t.Context()); err != nil || !slices.Equal(got, []string{"whole"}) {
		t.Errorf("left are %v, %v", got, err)
	}
}

func TestSpread(t *testing.T) {
	s := openStore(t, nil)
	if err := spread("/dev/shm"); err != nil {
		t.Errorf("a file system that has no block groups: %v", err)
	}
	if err := spread(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a folder that is not there: %v", err)
	}
	dir, err := os.Open(s.foldersDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if st.Type != unix.EXT4_SUPER_MAGIC {
		t.Skipf("%s is not on ext4", dir.Name())
	}
	flags, err := unix.IoctlGetInt(int(dir.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		t.Fatal(err)
	}
	if flags&0x20000 == 0 {
		t.Errorf("flags %x: all root file systems share a block group", flags)
	}
	if err := spread(dir.Name()); err != nil { // as at the next start
		t.Error(err)
	}
}

// The first version kept all root file systems in one folder.
func TestFoldersOfTheFirstVersion(t *testing.T) {
	r := newRegistry(t)
	root := t.TempDir()
	open := func() *Store { return openStore(t, func(o *Options) { o.Root = root }) }
	s := open()
	img := mustPull(t, s, r.push(t, "app", "1", imageOf(t, nil, fileLayer(t, "f", []byte("x")))))
	before, err := s.PrepareRootfs(t.Context(), "k/1", img, RootfsOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(s.folder("k/1"), filepath.Join(s.foldersDir(), "r-k%2F1")); err != nil {
		t.Fatal(err)
	}
	s = open()
	after, err := s.RootfsMounts(t.Context(), "k/1")
	if err != nil || !slices.Equal(after[0].Options, before[0].Options) {
		t.Fatalf("mounts %v, %v; they were %v", after, err, before)
	}
	if b, err := os.ReadFile(filepath.Join(show(t, after), "f")); err != nil || string(b) != "x" {
		t.Errorf("%q, %v", b, err)
	}
}
