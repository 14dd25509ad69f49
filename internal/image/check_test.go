package image

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
)

// TestCheckRepairs damages what a power cut may damage, one thing at a time,
// and has it repaired out of the registry.
func TestCheckRepairs(t *testing.T) {
	r := newRegistry(t)
	content := bytes.Repeat([]byte("content "), 10000)
	ref := r.push(t, "app", "1", imageOf(t, nil, fileLayer(t, "lower", content), fileLayer(t, "upper", content)))
	s := openStore(t, nil)
	img := mustPull(t, s, ref)
	c, err := s.stored(s.within(t.Context()), img.target, "")
	if err != nil {
		t.Fatal(err)
	}
	blob := func(digest string) string {
		return filepath.Join(s.contentDir(), "blobs", "sha256", strings.TrimPrefix(digest, "sha256:"))
	}
	upper, err := s.upperOf(s.within(t.Context()), s.snapshotters[snapshotterOverlay], c.chains()[1])
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(upper, "upper")
	for name, damage := range map[string]struct {
		kind string
		do   func() error
	}{
		"nothing":         {"", func() error { return nil }},
		"layer changed":   {"blob", func() error { return flip(blob(c.layers()[0].Digest.String())) }},
		"layer cut":       {"blob", func() error { return os.Truncate(blob(c.layers()[1].Digest.String()), 10) }},
		"layer gone":      {"blob", func() error { return os.Remove(blob(c.layers()[1].Digest.String())) }},
		"manifest empty":  {"blob", func() error { return os.Truncate(blob(img.Target.String()), 0) }},
		"manifest gone":   {"blob", func() error { return os.Remove(blob(img.Target.String())) }},
		"config changed":  {"blob", func() error { return flip(blob(img.ID)) }},
		"file empty":      {"layer", func() error { return os.Truncate(file, 0) }},
		"file changed":    {"layer", func() error { return flip(file) }},
		"file gone":       {"layer", func() error { return os.Remove(file) }},
		"file a folder":   {"layer", func() error { return replaceByFolder(file) }},
		"file of a layer": {"layer", func() error { return os.WriteFile(file, []byte("x"), 0o600) }},
	} {
		t.Run(name, func(t *testing.T) {
			if err := damage.do(); err != nil {
				t.Fatal(err)
			}
			found, err := s.Check(t.Context(), false)
			if err != nil {
				t.Fatal(err)
			}
			if damage.kind == "" {
				if len(found) != 0 {
					t.Fatalf("found %+v", found)
				}
				return
			}
			if len(found) != 1 || found[0].Kind != damage.kind || found[0].Repaired {
				t.Fatalf("found %+v", found)
			}
			t.Log(found[0])
			r.fault(status(503, "")) // a registry that is away makes nothing worse
			if damage.kind == "blob" {
				if found, err := s.Check(t.Context(), true); err != nil || len(found) != 1 || found[0].Repaired || found[0].Err == "" {
					t.Errorf("without a registry: %+v %v", found, err)
				}
			}
			r.fault(nil)
			if found, err := s.Check(t.Context(), true); err != nil || len(found) != 1 || !found[0].Repaired {
				t.Fatalf("repair: %+v %v", found, err)
			}
			if found, err := s.Check(t.Context(), false); err != nil || len(found) != 0 {
				t.Errorf("after the repair: %+v %v", found, err)
			}
		})
	}
	if err := s.collectNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	dir := mounted(t, s, img)
	if b, err := os.ReadFile(filepath.Join(dir, "upper")); err != nil || !bytes.Equal(b, content) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o755 || st.Sys().(*syscall.Stat_t).Uid != 0 {
		t.Errorf("%v %v", st, err)
	}
}

func flip(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	b[len(b)/2] ^= 1
	fi, err := os.Stat(file)
	if err != nil {
		return err
	}
	if err := os.Chmod(file, 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(file, b, 0o600); err != nil {
		return err
	}
	return os.Chmod(file, fi.Mode())
}

func replaceByFolder(file string) error {
	if err := os.Remove(file); err != nil {
		return err
	}
	return os.Mkdir(file, 0o700)
}

func TestPrune(t *testing.T) {
	r := newRegistry(t)
	s := openStore(t, func(o *Options) { o.Pinned = []string{r.host + "/pinned:1"} })
	refs := map[string]Image{}
	for _, name := range []string{"used", "unused", "pinned", "shared"} {
		refs[name] = mustPull(t, s, r.push(t, name, "1", imageOf(t, nil, fileLayer(t, "common", []byte("common")), fileLayer(t, name, noise(t, 1000)))))
	}
	mounts, err := s.PrepareRootfs(t.Context(), "c", refs["unused"], RootfsOptions{}) // its container is not known to the caller
	if err != nil {
		t.Fatal(err)
	}
	o := PruneOptions{InUse: func(id string) bool { return id == refs["used"].ID || id == refs["shared"].ID }, Age: time.Hour}
	if got, err := s.Prune(t.Context(), o); err != nil || len(got) != 0 {
		t.Errorf("new images: %v %v", got, err)
	}
	o.Age, o.DryRun = 0, true
	got, err := s.Prune(t.Context(), o)
	if err != nil || len(got) != 1 || got[0].Image.ID != refs["unused"].ID {
		t.Fatalf("dry run: %v %v", got, err)
	}
	if len(s.List()) != 4 {
		t.Error("the dry run removed something")
	}
	o.DryRun = false
	if got, err := s.Prune(t.Context(), o); err != nil || len(got) != 1 || got[0].Err != nil {
		t.Fatalf("prune: %v %v", got, err)
	}
	if err := s.collectNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(s.List()) != 3 {
		t.Errorf("%d images", len(s.List()))
	}
	// The root file system outlives its image, and others keep what they share.
	dir := t.TempDir()
	if err := mount.All(mounts, dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = mount.UnmountAll(dir, 0) })
	if b, err := os.ReadFile(filepath.Join(dir, "common")); err != nil || string(b) != "common" {
		t.Errorf("%q %v", b, err)
	}
	if found, err := s.Check(t.Context(), false); err != nil || len(found) != 0 {
		t.Errorf("the images that stay: %v %v", found, err)
	}
}
