package registry_test

import (
	"archive/tar"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"cloister.dev/test/registry/images"
	"cloister.dev/test/registry/registry"
)

// The demo image is pulled back whole, and building it again in a fresh cache
// gives the same digest.
func TestDemoIsServedAndReproducible(t *testing.T) {
	ctx := t.Context()
	build := func() images.Set {
		set, err := (&images.Builder{Cache: t.TempDir()}).Demo(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return set
	}
	set := build()
	r, err := registry.Serve(ctx, "127.0.0.1:0", set)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ref, err := name.ParseReference(r.Addr+"/demo:1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(ref)
	if err != nil {
		t.Fatal(err)
	}
	got, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	want, err := build()["demo:1"].Digest()
	if err != nil {
		t.Fatal(err)
	}
	if got != want {
		t.Errorf("served %s, built again %s", got, want)
	}
	rc := mutate.Extract(img)
	defer rc.Close()
	modes := map[string]int64{}
	for tr := tar.NewReader(rc); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		modes[h.Name] = h.Mode
	}
	if modes["demo"] != 0o755 || modes["tmp"] != 0o1777 {
		t.Errorf("mode of /demo %o, of /tmp %o", modes["demo"], modes["tmp"])
	}
}

func TestWriteHosts(t *testing.T) {
	r, err := registry.Serve(t.Context(), "127.0.0.1:0", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	dir := t.TempDir()
	if err := r.WriteHosts(dir); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "_default", "hosts.toml"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b), `[host."http://`+r.Addr+`"]`) {
		t.Errorf("hosts.toml does not name %s:\n%s", r.Addr, b)
	}
}
