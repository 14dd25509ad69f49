package image

import (
	"archive/tar"
	"context"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func TestPullGetListRemove(t *testing.T) {
	reg := newRegistry(t)
	s := openStore(t, nil)
	img := imageOf(t, func(c *v1.ConfigFile) { c.Config.User = "1002:7"; c.Config.Labels = map[string]string{"a": "b"} },
		fileLayer(t, "hello", []byte("hi")), layerOf(t, tar.Header{Name: "dir", Typeflag: tar.TypeDir}))
	one := reg.push(t, "team/app", "one", img)
	two := reg.push(t, "team/app", "two", img)

	got := mustPull(t, s, one)
	again := mustPull(t, s, two)
	byDigest := reg.host + "/team/app@" + digestOf(t, img)

	if got.ID != idOf(t, img) || again.ID != got.ID {
		t.Fatalf("IDs %s and %s, want %s", got.ID, again.ID, idOf(t, img))
	}
	if want := []string{one, two}; !slices.Equal(again.RepoTags, want) {
		t.Errorf("tags %v, want %v", again.RepoTags, want)
	}
	if want := []string{byDigest}; !slices.Equal(again.RepoDigests, want) {
		t.Errorf("digests %v, want %v", again.RepoDigests, want)
	}
	if got.UID == nil || *got.UID != 1002 || got.Username != "" {
		t.Errorf("user %v %q", got.UID, got.Username)
	}
	if got.Config.Labels["a"] != "b" || got.Size == 0 || got.ChainID == "" {
		t.Errorf("image %+v", got)
	}
	hex := got.ID[len("sha256:"):]
	for _, ref := range []string{one, two, byDigest, got.ID, hex, hex[:9], "sha256:" + hex[:9]} {
		if g, err := s.Get(ref); err != nil || g.ID != got.ID {
			t.Errorf("get %s: %v %v", ref, g.ID, err)
		}
	}
	if n := len(s.List()); n != 1 {
		t.Errorf("%d images listed", n)
	}
	if err := s.Remove(context.Background(), two); err != nil {
		t.Fatal(err)
	}
	for _, ref := range []string{one, two, byDigest, got.ID} {
		if _, err := s.Get(ref); !errdefs.IsNotFound(err) {
			t.Errorf("get %s after removal: %v", ref, err)
		}
	}
	if err := s.Remove(context.Background(), one); err != nil {
		t.Errorf("second removal: %v", err)
	}
}

func TestRootfs(t *testing.T) {
	for _, snapshotter := range []string{snapshotterOverlay, snapshotterNative} {
		t.Run(snapshotter, func(t *testing.T) {
			reg := newRegistry(t)
			s := openStore(t, func(o *Options) { o.Snapshotter = snapshotter })
			img := mustPull(t, s, reg.push(t, "app", "1", imageOf(t, nil,
				fileLayer(t, "keep", []byte("below")), fileLayer(t, "gone", []byte("x")),
				layerOf(t, tar.Header{Name: ".wh.gone", Typeflag: tar.TypeReg}))))
			ctx := context.Background()
			mounts, err := s.PrepareRootfs(ctx, "c1", img, RootfsOptions{Volatile: true})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.PrepareRootfs(ctx, "c1", img, RootfsOptions{}); !errdefs.IsAlreadyExists(err) {
				t.Errorf("second: %v", err)
			}
			dir := t.TempDir()
			if err := mount.All(mounts, dir); err != nil {
				t.Fatalf("mount %v: %v", mounts, err)
			}
			t.Cleanup(func() { _ = mount.UnmountAll(dir, 0) })
			if b, err := os.ReadFile(filepath.Join(dir, "keep")); err != nil || string(b) != "below" {
				t.Errorf("keep: %q %v", b, err)
			}
			if _, err := os.Stat(filepath.Join(dir, "gone")); !os.IsNotExist(err) {
				t.Errorf("gone: %v", err)
			}
			if err := os.WriteFile(filepath.Join(dir, "new"), make([]byte, 8192), 0o644); err != nil {
				t.Error(err)
			}
			if bytes, inodes, err := s.RootfsUsage(ctx, "c1"); err != nil || bytes < 8192 || inodes == 0 {
				t.Errorf("usage %d %d %v", bytes, inodes, err)
			}
			if err := mount.UnmountAll(dir, 0); err != nil {
				t.Fatal(err)
			}
			if err := s.Remove(ctx, img.ID); err != nil {
				t.Fatal(err)
			}
			if err := s.collectNow(ctx); err != nil {
				t.Fatal(err)
			}
			if _, err := s.RootfsMounts(ctx, "c1"); err != nil {
				t.Errorf("mounts after the image went: %v", err)
			}
			if keys, err := s.Rootfs(ctx); err != nil || !slices.Equal(keys, []string{"c1"}) {
				t.Errorf("keys %v %v", keys, err)
			}
			for range 2 {
				if err := s.RemoveRootfs(ctx, "c1"); err != nil {
					t.Error(err)
				}
			}
			if err := s.collectNow(ctx); err != nil {
				t.Fatal(err)
			}
			left, err := os.ReadDir(filepath.Join(s.snapshotDir(snapshotter), "snapshots"))
			if err != nil || len(left) > 0 {
				t.Errorf("left on disk: %v %v", left, err)
			}
		})
	}
}
