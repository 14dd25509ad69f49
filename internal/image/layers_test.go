package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// TestHostileLayers unpacks tars that try to leave the root file system. Each
// either fails or stays inside; a directory beside the store is watched.
func TestHostileLayers(t *testing.T) {
	outside := t.TempDir()
	victim := filepath.Join(outside, "victim")
	if err := os.WriteFile(victim, []byte("untouched"), 0o600); err != nil {
		t.Fatal(err)
	}
	up := strings.Repeat("../", 30)
	reg := func(name string) tar.Header { return tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o777} }
	link := func(kind byte, name, to string) tar.Header {
		return tar.Header{Name: name, Linkname: to, Typeflag: kind, Mode: 0o777}
	}
	for name, layers := range map[string][][]tar.Header{
		"dotdot file":                     {{reg(up + outside + "/victim")}},
		"absolute file":                   {{reg(victim)}},
		"symlink then file":               {{link(tar.TypeSymlink, "out", outside), reg("out/victim")}},
		"symlink in a lower layer":        {{link(tar.TypeSymlink, "out", outside)}, {reg("out/victim")}},
		"relative symlink":                {{link(tar.TypeSymlink, "out", up+outside), reg("out/victim")}},
		"symlink chain":                   {{link(tar.TypeSymlink, "a", "b"), link(tar.TypeSymlink, "b", outside), reg("a/victim")}},
		"symlink replaced":                {{link(tar.TypeSymlink, "out", outside)}, {tar.Header{Name: "out", Typeflag: tar.TypeDir, Mode: 0o777}, reg("out/victim")}},
		"hard link outside":               {{link(tar.TypeLink, "h", victim), reg("h")}},
		"hard link dotdot":                {{link(tar.TypeLink, "h", up+victim), reg("h")}},
		"hard link by symlink":            {{link(tar.TypeSymlink, "out", outside), link(tar.TypeLink, "h", "out/victim"), reg("h")}},
		"chmod by symlink":                {{link(tar.TypeSymlink, "out", victim), {Name: "out", Typeflag: tar.TypeReg, Mode: 0o777}}},
		"whiteout outside":                {{reg(up + outside + "/.wh.victim")}},
		"whiteout by symlink":             {{link(tar.TypeSymlink, "out", outside), reg("out/.wh.victim")}},
		"opaque by symlink":               {{link(tar.TypeSymlink, "out", outside), reg("out/.wh..wh..opq")}},
		"opaque by symlink from below":    {{link(tar.TypeSymlink, "out", outside)}, {reg("out/.wh..wh..opq")}},
		"whiteout of dotdot":              {{reg(".wh...")}},
		"whiteout of the root":            {{reg(".wh..")}},
		"root as a file":                  {{reg(".")}},
		"root as a symlink":               {{link(tar.TypeSymlink, "/", outside), reg("victim")}},
		"root as a symlink over a parent": {{reg("f")}, {link(tar.TypeSymlink, ".", outside), reg("victim")}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRegistry(t)
			s := openStore(t, nil)
			var list []v1.Layer
			for _, headers := range layers {
				contents := map[string][]byte{}
				for _, h := range headers {
					if h.Typeflag == tar.TypeReg {
						contents[h.Name] = []byte("overwritten")
					}
				}
				list = append(list, layerWith(t, headers, contents))
			}
			_, err := s.Pull(context.Background(), PullRequest{Ref: r.push(t, "app", "1", imageOf(t, nil, list...))})
			t.Logf("pull: %v", err)
			b, readErr := os.ReadFile(victim)
			fi, statErr := os.Stat(victim)
			if readErr != nil || statErr != nil || string(b) != "untouched" || fi.Mode().Perm() != 0o600 {
				t.Fatalf("the file outside is now %q %v %v %v", b, fi, readErr, statErr)
			}
			if st := fi.Sys().(*syscall.Stat_t); st.Nlink != 1 {
				t.Errorf("the file outside has %d links", st.Nlink)
			}
			if entries, err := os.ReadDir(outside); err != nil || len(entries) != 1 {
				t.Errorf("the directory outside has %v %v", entries, err)
			}
		})
	}
}

func TestOddLayers(t *testing.T) {
	device := layerOf(t, tar.Header{Name: "dev/null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o666},
		tar.Header{Name: "fifo", Typeflag: tar.TypeFifo}, tar.Header{Name: "suid", Typeflag: tar.TypeReg, Mode: 0o4755, Uid: 7, Gid: 8})
	r := newRegistry(t)
	s := openStore(t, nil)
	img := mustPull(t, s, r.push(t, "app", "1", imageOf(t, nil, device)))
	mounts, err := s.PrepareView(context.Background(), "v", img, "")
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(filepath.Join(mounts[0].Source, "suid"))
	if err != nil || fi.Mode()&os.ModeSetuid == 0 || fi.Sys().(*syscall.Stat_t).Uid != 7 {
		t.Errorf("suid %v %v", fi, err)
	}
	if fi, err := os.Stat(filepath.Join(mounts[0].Source, "dev/null")); err != nil || fi.Mode()&os.ModeCharDevice == 0 {
		t.Errorf("dev/null %v %v", fi, err)
	}
	for name, raw := range map[string][]byte{
		"truncated gzip": gzipped(t, make([]byte, 4096))[:20],
		"not gzip":       []byte("plainly not a layer"),
		"truncated tar":  gzipped(t, append([]byte("name"), make([]byte, 700)...)),
		"noise":          noise(t, 4096),
	} {
		l := static.NewLayer(raw, types.DockerLayer)
		_, err := s.Pull(context.Background(), PullRequest{Ref: r.push(t, "app", "bad", imageOf(t, nil, l))})
		if err == nil {
			t.Errorf("%s: no error", name)
		}
		t.Logf("%s: %v", name, err)
	}
	none := mustPull(t, s, r.push(t, "app", "none", imageOf(t, nil)))
	if none.ChainID != "" {
		t.Errorf("chain %q of an image without layers", none.ChainID)
	}
	if _, err := s.PrepareRootfs(context.Background(), "empty", none, RootfsOptions{}); err != nil {
		t.Errorf("root file system without layers: %v", err)
	}
}

func gzipped(t testing.TB, b []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// TestSpaceGuard checks that a nearly full file system ends an unpack: a tmpfs
// as root, and a layer of zeros that unpacks to more than it holds.
func TestSpaceGuard(t *testing.T) {
	root := tmpfs(t, "size=56m")
	pr, pw := io.Pipe()
	go func() {
		w := tar.NewWriter(pw)
		const size = 64 << 20
		err := w.WriteHeader(&tar.Header{Name: "zeros", Typeflag: tar.TypeReg, Size: size, Mode: 0o644})
		for written := 0; err == nil && written < size; written += 1 << 20 {
			_, err = w.Write(make([]byte, 1<<20))
		}
		_ = pw.CloseWithError(w.Close())
	}()
	raw, err := io.ReadAll(pr)
	if err != nil {
		t.Fatal(err)
	}
	r := newRegistry(t)
	s := openStore(t, func(o *Options) { o.Root = root })
	ref := r.push(t, "app", "1", imageOf(t, nil, layerFromTar(t, raw)))
	if _, err := s.Pull(context.Background(), PullRequest{Ref: ref}); err == nil || !strings.Contains(err.Error(), "full") && !strings.Contains(err.Error(), "space") {
		t.Errorf("pull of a bomb: %v", err)
	} else {
		t.Log(err)
	}
	waitFor(t, "the space to be free again", func() bool {
		var st syscall.Statfs_t
		return syscall.Statfs(root, &st) == nil && st.Bavail*uint64(st.Bsize) > 44<<20
	})
	mustPull(t, s, r.push(t, "app", "2", imageOf(t, nil, fileLayer(t, "f", []byte("x")))))
}

// tmpfs mounts a small and fast file system.
func tmpfs(t testing.TB, options string) string {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	return dir
}

// TestManyLayers mounts an image of as many layers as are allowed.
func TestManyLayers(t *testing.T) {
	r := newRegistry(t)
	root := tmpfs(t, "size=128m") // thousands of fsyncs
	s := openStore(t, func(o *Options) { o.Root = root })
	layers := make([]v1.Layer, maxLayers)
	for i := range layers {
		layers[i] = fileLayer(t, fmt.Sprint("f", i), []byte{byte(i)})
	}
	img := mustPull(t, s, r.push(t, "app", "1", imageOf(t, nil, layers...)))
	mounts, err := s.PrepareRootfs(context.Background(), "c", img, RootfsOptions{Volatile: true})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := mount.All(mounts, dir); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = mount.UnmountAll(dir, 0) }()
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != maxLayers {
		t.Errorf("%d files, %v", len(entries), err)
	}
}

// TestUserNamespace mounts a root file system with id-mapped layers: files of
// root in the image belong to the mapped root outside.
func TestUserNamespace(t *testing.T) {
	for _, name := range []string{snapshotterOverlay, snapshotterErofs} {
		t.Run(name, func(t *testing.T) { userNamespace(t, name) })
	}
}

func userNamespace(t *testing.T, snapshotter string) {
	r := newRegistry(t)
	s := openStore(t, func(o *Options) {
		if snapshotter == snapshotterErofs {
			needErofs(t, o.Root)
		}
		o.Snapshotter = snapshotter
	})
	if !s.SupportsIDMapping() {
		t.Skip("this kernel has no id-mapped mounts")
	}
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	img := mustPull(t, s, r.push(t, "app", "1", imageOf(t, nil, fileLayer(t, "f", []byte("x")), fileLayer(t, "g", []byte("y")))))
	ctx := context.Background()
	mounts, err := s.PrepareRootfs(ctx, "c", img, RootfsOptions{UIDs: ids, GIDs: ids})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(mounts[0].Options, "uidmap=0:100000:65536") {
		t.Errorf("mounts %v", mounts)
	}
	dir := t.TempDir()
	if err := mount.All(mounts, dir); err != nil {
		t.Fatalf("mount %v: %v", mounts, err)
	}
	defer func() { _ = mount.UnmountAll(dir, 0) }()
	for _, name := range []string{"f", "."} {
		fi, err := os.Stat(filepath.Join(dir, name))
		if err != nil || fi.Sys().(*syscall.Stat_t).Uid != 100000 {
			t.Errorf("%s: %v %v", name, fi, err)
		}
	}
	if _, err := s.PrepareRootfs(ctx, "d", img, RootfsOptions{UIDs: ids}); err == nil {
		t.Error("half a mapping was taken")
	}
	if _, err := s.PrepareRootfs(ctx, "e", img, RootfsOptions{UIDs: ids, GIDs: ids, Snapshotter: snapshotterNative}); err == nil {
		t.Error("the native snapshotter claims to map ids")
	}
}
