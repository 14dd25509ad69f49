package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// fakeRegistry is a real registry on the loopback with a place to put faults:
// the hook sees each request first and returns true when it has answered it.
type fakeRegistry struct {
	*httptest.Server
	host  string
	inner http.Handler

	mu       sync.Mutex
	hook     func(http.ResponseWriter, *http.Request) bool
	requests []*http.Request
}

func newRegistry(t testing.TB) *fakeRegistry {
	t.Helper()
	r := &fakeRegistry{inner: registry.New(registry.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)))}
	r.Server = httptest.NewServer(http.HandlerFunc(r.serve))
	t.Cleanup(r.Close)
	u, err := url.Parse(r.URL)
	if err != nil {
		t.Fatal(err)
	}
	r.host = u.Host
	return r
}

func (r *fakeRegistry) serve(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	hook := r.hook
	r.requests = append(r.requests, req)
	r.mu.Unlock()
	if hook != nil && hook(w, req) {
		return
	}
	r.inner.ServeHTTP(w, req)
}

// fault sets the hook and forgets the requests seen so far.
func (r *fakeRegistry) fault(hook func(http.ResponseWriter, *http.Request) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hook, r.requests = hook, nil
}

// seen counts the requests that match.
func (r *fakeRegistry) seen(match func(*http.Request) bool) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, req := range r.requests {
		if match(req) {
			n++
		}
	}
	return n
}

func (r *fakeRegistry) upload(t testing.TB, path, contentType string, body []byte) {
	t.Helper()
	req := httptest.NewRequest(http.MethodPut, path, bytes.NewReader(body))
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	} else {
		req.Method = http.MethodPost
	}
	rec := httptest.NewRecorder()
	r.inner.ServeHTTP(rec, req)
	if rec.Code >= 300 {
		t.Fatalf("upload %s: %d %s", path, rec.Code, rec.Body)
	}
}

func (r *fakeRegistry) blob(t testing.TB, repo string, digest string, b []byte) {
	t.Helper()
	r.upload(t, "/v2/"+repo+"/blobs/uploads/?digest="+digest, "", b)
}

// manifest stores a document under a tag and returns its digest.
func (r *fakeRegistry) manifest(t testing.TB, repo, tag, mediaType string, b []byte) string {
	t.Helper()
	r.upload(t, "/v2/"+repo+"/manifests/"+tag, mediaType, b)
	h, _, err := v1.SHA256(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	return h.String()
}

// push stores an image and returns its full name.
func (r *fakeRegistry) push(t testing.TB, repo, tag string, img v1.Image) string {
	t.Helper()
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		rc, err := l.Compressed()
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(rc)
		if err != nil {
			t.Fatal(err)
		}
		h, err := l.Digest()
		if err != nil {
			t.Fatal(err)
		}
		r.blob(t, repo, h.String(), b)
	}
	cfg, err := img.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	name, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	r.blob(t, repo, name.String(), cfg)
	raw, err := img.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	mt, err := img.MediaType()
	if err != nil {
		t.Fatal(err)
	}
	r.manifest(t, repo, tag, string(mt), raw)
	return r.host + "/" + repo + ":" + tag
}

// layerOf makes a gzip layer out of tar entries.
func layerOf(t testing.TB, entries ...tar.Header) v1.Layer {
	t.Helper()
	return layerWith(t, entries, nil)
}

// layerWith makes a layer; contents are by name.
func layerWith(t testing.TB, entries []tar.Header, contents map[string][]byte) v1.Layer {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range entries {
		var content []byte
		if h.Typeflag == tar.TypeReg {
			content = contents[h.Name]
		}
		h.Size = int64(len(content))
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return layerFromTar(t, buf.Bytes())
}

func layerFromTar(t testing.TB, b []byte) v1.Layer {
	t.Helper()
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// fileLayer makes a layer of one file.
func fileLayer(t testing.TB, name string, content []byte) v1.Layer {
	t.Helper()
	return layerWith(t, []tar.Header{{Name: name, Typeflag: tar.TypeReg}}, map[string][]byte{name: content})
}

// noise makes bytes that do not compress.
func noise(t testing.TB, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return b
}

// imageOf makes an image for this machine.
func imageOf(t testing.TB, edit func(*v1.ConfigFile), layers ...v1.Layer) v1.Image {
	t.Helper()
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture = "linux", nativeArch()
	if edit != nil {
		edit(cfg)
	}
	if img, err = mutate.ConfigFile(img, cfg); err != nil {
		t.Fatal(err)
	}
	return img
}

func nativeArch() string {
	_, name, _ := platform("")
	return strings.Split(name, "/")[1]
}

func idOf(t testing.TB, img v1.Image) string {
	t.Helper()
	h, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	return h.String()
}

func digestOf(t testing.TB, img v1.Image) string {
	t.Helper()
	h, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return h.String()
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("unpacking and overlayfs need root")
	}
}

// openStore opens a store below a private directory.
func openStore(t testing.TB, edit func(*Options)) *Store {
	t.Helper()
	needRoot(t)
	o := Options{Root: t.TempDir(), Hosts: Hosts{ConfigPath: t.TempDir()}, Log: slog.New(slog.NewTextHandler(testWriter{t}, nil))}
	if edit != nil {
		edit(&o)
	}
	s, err := Open(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

type testWriter struct{ testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.Helper()
	w.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

func mustPull(t testing.TB, s *Store, ref string) Image {
	t.Helper()
	img, err := s.Pull(context.Background(), PullRequest{Ref: ref})
	if err != nil {
		t.Fatalf("pull %s: %v", ref, err)
	}
	return img
}

func marshal(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
