package image

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// TestPlatformsOfOneTag: two handlers have images for two platforms. A tag is
// both of them, and neither loses content or name to the other.
func TestPlatformsOfOneTag(t *testing.T) {
	reg := newRegistry(t)
	root := t.TempDir()
	s := openStore(t, func(o *Options) { o.Root = root })
	const foreign = "linux/s390x"
	native := imageOf(t, nil, fileLayer(t, "f", []byte("native")))
	other := imageOf(t, func(c *v1.ConfigFile) { c.Architecture = "s390x" }, fileLayer(t, "f", []byte("other")))
	reg.index(t, "app", "all", map[string]string{nativeArch(): reg.push(t, "app", "n", native), "s390x": reg.push(t, "app", "o", other)})
	ref := reg.host + "/app:all"
	mustPull(t, s, ref)
	if _, err := s.GetFor(t.Context(), ref, "", foreign); !errdefs.IsNotFound(err) {
		t.Errorf("before it is pulled: %v", err)
	}
	if _, err := s.Pull(t.Context(), PullRequest{Ref: ref, Platform: foreign}); err != nil {
		t.Fatal(err)
	}
	check := func(s *Store, when string) {
		t.Helper()
		for platform, want := range map[string]v1.Image{"": native, foreign: other} {
			img, err := s.GetFor(t.Context(), ref, "", platform)
			if err != nil || img.ID != idOf(t, want) || !slices.Equal(img.RepoTags, []string{ref}) || len(img.RepoDigests) != 1 {
				t.Errorf("%s, platform %q: %+v %v", when, platform, img, err)
			}
			if _, err := s.stored(s.within(t.Context()), img.target, img.platform); err != nil {
				t.Errorf("%s, platform %q: %v", when, platform, err)
			}
		}
	}
	check(s, "pulled")
	if err := s.collectNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	check(s, "after a collection")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, func(o *Options) { o.Root = root })
	check(s, "opened again")
	if err := s.RemoveFor(t.Context(), ref, ""); err != nil {
		t.Fatal(err)
	}
	if err := s.collectNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	if img, err := s.Get(ref); err != nil || img.ID != idOf(t, other) {
		t.Errorf("the tag is then %s %v", img.ID, err)
	}
	if _, err := s.PrepareRootfs(t.Context(), "c", mustGet(t, s, ref), RootfsOptions{}); err != nil {
		t.Error(err)
	}
	for _, digest := range []string{digestOf(t, native), idOf(t, native)} {
		if list := glob(root + "/content/blobs/sha256/" + strings.TrimPrefix(digest, "sha256:")); len(list) > 0 {
			t.Errorf("of the removed image %v is left", list)
		}
	}
}

func mustGet(t testing.TB, s *Store, ref string) Image {
	t.Helper()
	img, err := s.Get(ref)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// TestSnapshottersOfOneImage: an image is on the node for a handler when it is
// unpacked, or can be, where the handler's containers are kept.
func TestSnapshottersOfOneImage(t *testing.T) {
	for _, discard := range []bool{false, true} {
		reg := newRegistry(t)
		s := openStore(t, func(o *Options) { o.DiscardUnpackedLayers = discard })
		ref := reg.push(t, "app", "1", imageOf(t, nil, fileLayer(t, "f", []byte("x"))))
		img := mustPull(t, s, ref)
		if err := s.collectNow(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := s.GetFor(t.Context(), ref, "", ""); err != nil {
			t.Errorf("discard %v: %v", discard, err)
		}
		_, err := s.GetFor(t.Context(), ref, snapshotterNative, "")
		if errdefs.IsNotFound(err) != discard || err != nil && !discard {
			t.Errorf("discard %v, before it is unpacked there: %v", discard, err)
		}
		if _, err := s.Pull(t.Context(), PullRequest{Ref: ref, Snapshotter: snapshotterNative}); err != nil {
			t.Fatal(err)
		}
		if err := s.collectNow(t.Context()); err != nil {
			t.Fatal(err)
		}
		for i, name := range []string{snapshotterOverlay, snapshotterNative} {
			if _, err := s.GetFor(t.Context(), ref, name, ""); err != nil {
				t.Errorf("discard %v, %s: %v", discard, name, err)
			}
			if _, err := s.PrepareView(t.Context(), fmt.Sprint("v", i), img, name); err != nil {
				t.Errorf("discard %v, view in %s: %v", discard, name, err)
			}
			if _, err := s.PrepareRootfs(t.Context(), fmt.Sprint("c", i), img, RootfsOptions{Snapshotter: name}); err != nil {
				t.Errorf("discard %v, root file system in %s: %v", discard, name, err)
			}
		}
	}
}
