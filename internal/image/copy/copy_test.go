package copy_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"io"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"cloister.dev/internal/image/copy"
	"cloister.dev/internal/image/crypt"
)

func keyPair(t *testing.T, dir string) (public string) {
	t.Helper()
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	put := func(name, kind string, der []byte, err error) string {
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	der, err := x509.MarshalPKCS8PrivateKey(k)
	put("k.pem", "PRIVATE KEY", der, err)
	der, err = x509.MarshalPKIXPublicKey(&k.PublicKey)
	return put("k.pub", "PUBLIC KEY", der, err)
}

func place(t *testing.T, s string) copy.Place {
	t.Helper()
	p, err := copy.Parse(s, true)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// digests are the layers of the only image of a layout.
func layersOf(t *testing.T, dir string) (out []v1.Descriptor) {
	t.Helper()
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	m, err := index.IndexManifest()
	if err != nil || len(m.Manifests) != 1 {
		t.Fatal(m, err)
	}
	img, err := index.Image(m.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	im, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	return im.Layers
}

// TestBothWays encrypts an image, has skopeo decrypt it, and decrypts it itself.
func TestBothWays(t *testing.T) {
	keys := t.TempDir()
	public := keyPair(t, keys)
	recipients, err := crypt.ParseRecipients([]string{"jwe:" + public}, "")
	if err != nil {
		t.Fatal(err)
	}
	base, err := random.Image(100_000, 3)
	if err != nil {
		t.Fatal(err)
	}
	plain, sealed, back := filepath.Join(t.TempDir(), "plain"), filepath.Join(t.TempDir(), "sealed"), filepath.Join(t.TempDir(), "back")
	path, err := layout.Write(plain, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := path.AppendImage(base); err != nil {
		t.Fatal(err)
	}
	work := t.TempDir()
	convert := func(from, to string, change copy.Change) {
		t.Helper()
		img, err := copy.Load(t.Context(), place(t, from))
		if err != nil {
			t.Fatal(err)
		}
		if img, err = copy.Convert(t.Context(), img, "", change); err != nil {
			t.Fatal(err)
		}
		if err := copy.Save(t.Context(), place(t, to), img); err != nil {
			t.Fatal(err)
		}
	}
	convert("oci:"+plain, "oci:"+sealed+":1", copy.Encrypt(recipients, []int{0, -1}, work))
	got := layersOf(t, sealed)
	for i, want := range []bool{true, false, true} {
		if crypt.Encrypted(string(got[i].MediaType)) != want {
			t.Errorf("layer %d is %s", i, got[i].MediaType)
		}
	}
	// Through a registry, and back again.
	server := httptest.NewServer(registry.New())
	t.Cleanup(server.Close)
	remote := strings.TrimPrefix(server.URL, "http://") + "/app:1"
	img, err := copy.Load(t.Context(), place(t, "oci:"+sealed+":1"))
	if err != nil {
		t.Fatal(err)
	}
	if err := copy.Save(t.Context(), place(t, remote), img); err != nil {
		t.Fatal(err)
	}
	convert(remote, "oci:"+back, copy.Decrypt(crypt.Keys{Folder: keys}, work))
	want, err := base.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	for i, l := range layersOf(t, back) {
		if l.Digest != want.Layers[i].Digest || len(l.Annotations) > 0 {
			t.Errorf("layer %d came back as %v", i, l)
		}
	}
	if _, err := copy.Convert(t.Context(), img, "", copy.Decrypt(crypt.Keys{Folder: t.TempDir()}, work)); !errdefs.IsPermissionDenied(err) {
		t.Errorf("without the key: %v", err)
	}
	inspected(t, img, keys)
	skopeoDecrypts(t, sealed, filepath.Join(keys, "k.pem"), want)
}

func inspected(t *testing.T, img copy.Image, keys string) {
	t.Helper()
	for folder, want := range map[string]string{keys: "yes", t.TempDir(): "no key of this node"} {
		list, err := copy.Inspect(t.Context(), img, &crypt.Keys{Folder: folder})
		if err != nil || len(list) != 3 {
			t.Fatal(list, err)
		}
		if l := list[0]; !l.Encrypted || len(l.Schemes) != 1 || l.Schemes[0] != "jwe" || !strings.Contains(l.Opens, want) {
			t.Errorf("%+v", l)
		}
		if l := list[1]; l.Encrypted || l.Opens != "" {
			t.Errorf("%+v", l)
		}
	}
}

func skopeoDecrypts(t *testing.T, sealed, key string, want *v1.Manifest) {
	t.Helper()
	skopeo, err := exec.LookPath("skopeo")
	if err != nil {
		t.Skip("skopeo is not installed; run test/setup registry")
	}
	out := filepath.Join(t.TempDir(), "skopeo")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if b, err := exec.CommandContext(ctx, skopeo, "--insecure-policy", "copy", "--decryption-key", key, "oci:"+sealed+":1", "oci:"+out+":1").CombinedOutput(); err != nil {
		t.Fatalf("skopeo: %v: %s", err, b)
	}
	for i, l := range layersOf(t, out) {
		if l.Digest != want.Layers[i].Digest {
			t.Errorf("skopeo made layer %d %v", i, l)
		}
	}
}

// TestIndex converts every image of an index, or the one of a platform.
func TestIndex(t *testing.T) {
	keys := t.TempDir()
	recipients, err := crypt.ParseRecipients([]string{"jwe:" + keyPair(t, keys)}, "")
	if err != nil {
		t.Fatal(err)
	}
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, arch := range []string{"amd64", "arm64"} {
		img, err := random.Image(1000, 1)
		if err != nil {
			t.Fatal(err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
	}
	from, to := filepath.Join(t.TempDir(), "from"), filepath.Join(t.TempDir(), "to")
	path, err := layout.Write(from, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := path.AppendIndex(index); err != nil {
		t.Fatal(err)
	}
	img, err := copy.Load(t.Context(), place(t, "oci:"+from))
	if err != nil {
		t.Fatal(err)
	}
	work := t.TempDir()
	for platform, n := range map[string]int{"": 2, "linux/arm64": 1} {
		out, err := copy.Convert(t.Context(), img, platform, copy.Encrypt(recipients, nil, work))
		if err != nil {
			t.Fatal(err)
		}
		if err := copy.Save(t.Context(), place(t, "oci:"+to), out); err != nil {
			t.Fatal(err)
		}
		again, err := copy.Load(t.Context(), place(t, "oci:"+to))
		if err != nil {
			t.Fatal(err)
		}
		list, err := copy.Inspect(t.Context(), again, &crypt.Keys{Folder: keys})
		if err != nil || len(list) != n || list[0].Opens != "yes" {
			t.Errorf("%q: %v %v", platform, list, err)
		}
	}
	for _, bad := range []string{"linux/s390x", "not a platform/"} {
		if _, err := copy.Convert(t.Context(), img, bad, copy.Encrypt(recipients, nil, work)); err == nil {
			t.Errorf("platform %q was found", bad)
		}
	}
}

func TestBadPlaces(t *testing.T) {
	for _, s := range []string{"oci:", "UPPER CASE", "docker://", ""} {
		if _, err := copy.Parse(s, false); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", s, err)
		}
	}
	if _, err := copy.Load(t.Context(), place(t, "oci:"+t.TempDir())); err == nil {
		t.Error("an empty folder is an image")
	}
	for _, r := range []string{"", "jwe", "jwe:/nonexistent", "rot13:/etc/passwd", "jwe:/etc/passwd", "pgp:/etc/passwd", "provider:none"} {
		if _, err := crypt.ParseRecipients([]string{r}, ""); err == nil {
			t.Errorf("recipient %q was taken", r)
		}
	}
	r, err := crypt.ParseRecipients([]string{"jwe:" + keyPair(t, t.TempDir())}, "")
	if err != nil {
		t.Fatal(err)
	}
	sealed, annotate, err := r.Encrypt(strings.NewReader("x"), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := annotate(t.Context()); err == nil {
		t.Error("annotations before the layer was read")
	}
	var buf bytes.Buffer
	if _, err := io.Copy(&buf, sealed); err != nil {
		t.Fatal(err)
	}
}
