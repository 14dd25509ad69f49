package image

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestConcurrent pulls, removes and uses images that share a layer, all at
// once, and then removes everything: nothing may be left on disk.
func TestConcurrent(t *testing.T) {
	reg := newRegistry(t)
	s := openStore(t, nil)
	base := fileLayer(t, "base", noise(t, 1<<18))
	var refs []string
	for i := range 4 {
		refs = append(refs, reg.push(t, "app", fmt.Sprint(i), imageOf(t, nil, base, fileLayer(t, "own", fmt.Append(nil, i)))))
	}
	ctx := context.Background()
	var wg sync.WaitGroup
	for w := range 12 {
		wg.Go(func() {
			for round := range 4 {
				ref := refs[(w+round)%len(refs)]
				img, err := s.Pull(ctx, PullRequest{Ref: ref})
				if err != nil {
					t.Errorf("pull %s: %v", ref, err)
					return
				}
				key := fmt.Sprintf("c-%d-%d", w, round)
				// Somebody else may remove the image between pull and use.
				if _, err := s.PrepareRootfs(ctx, key, img, RootfsOptions{}); err != nil && !errdefs.IsNotFound(err) {
					t.Errorf("root file system %s: %v", key, err)
				}
				s.List()
				if w%3 == 0 {
					if err := s.Remove(ctx, ref); err != nil {
						t.Errorf("remove %s: %v", ref, err)
					}
				}
				if _, err := s.Usage(ctx); err != nil {
					t.Errorf("usage: %v", err)
				}
				if err := s.RemoveRootfs(ctx, key); err != nil {
					t.Errorf("remove root file system %s: %v", key, err)
				}
			}
		})
	}
	wg.Wait()
	for _, img := range s.List() {
		if err := s.Remove(ctx, img.ID); err != nil {
			t.Error(err)
		}
	}
	waitFor(t, "all to be freed", func() bool {
		return len(glob(s.contentDir()+"/blobs/sha256/*")) == 0 && len(glob(s.snapshotDir(snapshotterOverlay)+"/snapshots/*")) == 0
	})
	if keys, err := s.Rootfs(ctx); err != nil || len(keys) > 0 {
		t.Errorf("keys %v %v", keys, err)
	}
}

func TestUsage(t *testing.T) {
	reg := newRegistry(t)
	s := openStore(t, nil)
	img := mustPull(t, s, reg.push(t, "app", "1", imageOf(t, nil, fileLayer(t, "f", noise(t, 1<<20)))))
	u, err := s.Usage(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if u.Content.Bytes < img.Size || u.Content.Inodes < 3 || len(u.Snapshots) != 1 || u.Snapshots[0].Bytes < 1<<20 || u.Snapshots[0].Inodes == 0 {
		t.Errorf("usage %+v of an image of %d bytes", u, img.Size)
	}
	for _, dir := range []string{u.Content.Dir, u.Snapshots[0].Dir} {
		if fi, err := os.Stat(dir); err != nil || !fi.IsDir() {
			t.Errorf("%s: %v", dir, err)
		}
	}
	if again, err := s.Usage(context.Background()); err != nil || again.At != u.At {
		t.Errorf("second answer is not the first one: %v %v", again, err)
	}
}

// TestLeftovers puts files into the store that no record knows, as a crash
// between a removal and its collection does: opening the store frees them.
func TestLeftovers(t *testing.T) {
	needRoot(t)
	reg := newRegistry(t)
	root := t.TempDir()
	s := openStore(t, func(o *Options) { o.Root = root })
	img := mustPull(t, s, reg.push(t, "app", "1", imageOf(t, nil, fileLayer(t, "f", []byte("x")))))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	blob := filepath.Join(root, "content/blobs/sha256", strings.TrimPrefix(someDigest, "sha256:"))
	dir := filepath.Join(root, "snapshots/overlayfs/snapshots/999")
	if err := os.WriteFile(blob, []byte("orphan"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "fs"), 0o700); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, func(o *Options) { o.Root = root })
	waitFor(t, "the leftovers to go", func() bool {
		_, a := os.Stat(blob)
		_, b := os.Stat(dir)
		return os.IsNotExist(a) && os.IsNotExist(b)
	})
	if _, err := s.PrepareRootfs(context.Background(), "c", img, RootfsOptions{}); err != nil {
		t.Errorf("the image that stays: %v", err)
	}
}

// TestLostContent deletes the manifest below the store's feet: the record goes
// at the next start, and a pull brings the image back.
func TestLostContent(t *testing.T) {
	reg := newRegistry(t)
	root := t.TempDir()
	s := openStore(t, func(o *Options) { o.Root = root })
	ref := reg.push(t, "app", "1", imageOf(t, nil, fileLayer(t, "f", []byte("x"))))
	img := mustPull(t, s, ref)
	if err := s.content.Delete(s.ctx, img.Target); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, func(o *Options) { o.Root = root })
	if _, err := s.Get(ref); !errdefs.IsNotFound(err) {
		t.Errorf("get: %v", err)
	}
	mustPull(t, s, ref)
}

func TestGetAmbiguous(t *testing.T) {
	x := newIndex([]string{"pause", "not a name"})
	for i := range 3 {
		x.put(Image{ID: fmt.Sprintf("sha256:ab%062d", i)}, false, fmt.Sprintf("sha256:ab%062d", i), fmt.Sprintf("docker.io/library/n%d:latest", i))
	}
	x.put(Image{ID: "sha256:" + strings.Repeat("c", 64)}, false, "sha256:"+strings.Repeat("c", 64), "docker.io/library/ab:latest", "docker.io/library/pause:latest")
	if _, err := x.get("ab0", ""); !errdefs.IsInvalidArgument(err) {
		t.Errorf("ambiguous ID: %v", err)
	}
	if img, err := x.get("ab", ""); err != nil || !img.Pinned {
		t.Errorf("a name that looks like an ID: %+v %v", img, err)
	}
	if img, err := x.get("cc", ""); err != nil || img.ID[7] != 'c' {
		t.Errorf("short ID: %+v %v", img, err)
	}
	for _, ref := range []string{"dd", "sha256:", "sha256:zz", strings.Repeat("a", 10_000), "", "a\nb"} {
		if _, err := x.get(ref, ""); !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) {
			t.Errorf("get(%.20q): %v", ref, err)
		}
	}
}

func BenchmarkGetAmong1000(b *testing.B) {
	x := newIndex(nil)
	for i := range 1000 {
		id := fmt.Sprintf("sha256:%064x", i)
		x.put(Image{ID: id, Config: imagespec.ImageConfig{}}, false, id, fmt.Sprintf("docker.io/library/n%d:latest", i))
	}
	b.Run("name", func(b *testing.B) {
		for b.Loop() {
			if _, err := x.get("n500", ""); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("list", func(b *testing.B) {
		for b.Loop() {
			x.list()
		}
	})
}

func BenchmarkRootfs(b *testing.B) {
	reg := newRegistry(b)
	s := openStore(b, nil)
	layers := make([]v1.Layer, 5)
	for i := range layers {
		layers[i] = fileLayer(b, fmt.Sprint("f", i), []byte("x"))
	}
	img := mustPull(b, s, reg.push(b, "app", "1", imageOf(b, nil, layers...)))
	ctx := context.Background()
	n := 0
	for b.Loop() {
		n++
		if _, err := s.PrepareRootfs(ctx, fmt.Sprint(n), img, RootfsOptions{Volatile: true}); err != nil {
			b.Fatal(err)
		}
	}
}
