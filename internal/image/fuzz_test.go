package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"

	"cloister.dev/internal/image/creds"
)

// A name that is taken names one image, in a form that is taken again.
func FuzzReference(f *testing.F) {
	for _, s := range []string{"busybox", "a/b:c", "localhost:5000/a@sha256:" + strings.Repeat("0", 64), "[::1]:80/x", "A", "a:b:c", "../a", "a//b", "\x00", "A\x00", "xn--a.b/c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := parseName(s)
		if err != nil {
			if len(err.Error()) > 2000 || strings.ContainsAny(err.Error(), "\x00\n\x1b") {
				t.Errorf("error %q", err)
			}
			return
		}
		again, err := parseName(n.String())
		if err != nil || again.String() != n.String() {
			t.Errorf("%q is %q, which is %v %v", s, n, again, err)
		}
		if strings.Contains(n.String(), "..") || strings.ContainsAny(n.String(), " \x00\n") {
			t.Errorf("%q is %q", s, n)
		}
	})
}

// A document and a configuration that are taken keep to the bounds.
func FuzzManifest(f *testing.F) {
	f.Add(imagespec.MediaTypeImageManifest, []byte(`{"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:`+strings.Repeat("0", 64)+`","size":2},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip+encrypted","digest":"sha256:`+strings.Repeat("1", 64)+`","size":3,"annotations":{"org.opencontainers.image.enc.keys.jwe":"eA=="}}]}`), []byte(`{"rootfs":{"type":"layers","diff_ids":["sha256:`+strings.Repeat("2", 64)+`"]}}`))
	f.Add(imagespec.MediaTypeImageIndex, []byte(`{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","platform":{"os":"linux","architecture":"amd64"}}]}`), []byte(`{}`))
	f.Add("", []byte(`{"schemaVersion":1,"fsLayers":[]}`), []byte(`null`))
	f.Fuzz(func(t *testing.T, mediaType string, doc, cfg []byte) {
		d, err := parseDocument(mediaType, doc)
		if err != nil {
			return
		}
		if len(d.Layers) > maxIndex || len(d.Manifests) > maxIndex || d.Config != nil && d.Manifests != nil {
			t.Errorf("took %d layers and %d manifests", len(d.Layers), len(d.Manifests))
		}
		want, name, err := platform("linux/amd64")
		if err != nil {
			t.Fatal(err)
		}
		_, _ = d.pick(want, name)
		if d.Config == nil || d.checkImage() != nil {
			return
		}
		for _, l := range d.Layers {
			if l.Size <= 0 || !images.IsLayerType(l.plain().MediaType) || len(l.plain().Annotations) > 0 || len(l.Encryption) > maxAnnotations {
				t.Errorf("took layer %+v", l)
			}
		}
		c, err := parseConfig(cfg, len(d.Layers))
		if err != nil {
			return
		}
		chosen{manifest: d, config: c}.decrypted()
		parseUser(c.Config.User)
	})
}

// An archive, whatever it holds, changes nothing outside of its root.
func FuzzLayer(f *testing.F) {
	if os.Geteuid() != 0 {
		f.Skip("layers are unpacked as root")
	}
	tarOf := func(headers ...tar.Header) []byte {
		var buf bytes.Buffer
		w := tar.NewWriter(&buf)
		for _, h := range headers {
			if err := w.WriteHeader(&h); err != nil {
				f.Fatal(err)
			}
		}
		return buf.Bytes()
	}
	f.Add(tarOf(tar.Header{Name: "a", Typeflag: tar.TypeSymlink, Linkname: "/"}, tar.Header{Name: "a/../../canary", Typeflag: tar.TypeReg, Mode: 0o777}))
	f.Add(tarOf(tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "../canary"}))
	f.Add(tarOf(tar.Header{Name: ".wh..wh..opq", Typeflag: tar.TypeReg}, tar.Header{Name: "d", Typeflag: tar.TypeDir, Uid: 1 << 20, Mode: 0o7777}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if bytes.Contains(b, []byte("GNU.sparse")) || len(b) > 1<<16 {
			t.Skip("may write for long, and is stopped by the space guard")
		}
		base := t.TempDir()
		root := filepath.Join(base, "root")
		canary := filepath.Join(base, "canary")
		if err := os.Mkdir(root, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(canary, []byte("untouched"), 0o640); err != nil {
			t.Fatal(err)
		}
		a := &applier{dirs: new(unnamedDirs)}
		small := io.LimitReader(bytes.NewReader(b), 1<<16)
		_ = a.extract(t.Context(), []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{"upperdir=" + root}}}, small)
		entries, err := os.ReadDir(base)
		if err != nil || len(entries) != 2 {
			t.Errorf("beside the root is %v %v", entries, err)
		}
		if got, err := os.ReadFile(canary); err != nil || string(got) != "untouched" {
			t.Errorf("canary %q %v", got, err)
		}
		if fi, err := os.Stat(canary); err != nil || fi.Mode() != 0o640 {
			t.Errorf("canary %v %v", fi, err)
		}
	})
}

// hosts.toml is the administrator's, but may be damaged: it is used or refused.
func FuzzHostsToml(f *testing.F) {
	f.Add("server = \"https://a\"\n[host.\"http://b\"]\ncapabilities = [\"pull\"]\nca = \"x\"\nclient = [[\"a\",\"b\"]]\nskip_verify = true\noverride_path = true\ndial_timeout = \"1s\"\n[host.\"http://b\".header]\nx = [\"y\"]\n")
	f.Add("[host]\n[host.\"\"]\n")
	f.Add("server = 1")
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text string) {
		tree := filepath.Join(dir, "tree")
		if err := os.MkdirAll(filepath.Join(tree, "h"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(tree, "h", "hosts.toml"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		ss := &session{meter: newMeter(), hosts: make(map[string]bool), configPath: tree, registry: "h"}
		_, _ = ss.resolver(t.Context()).Fetcher(t.Context(), "h/app:1")
	})
}

// Credentials of a caller, and a registry's challenge, are what anybody wrote.
func FuzzAuth(f *testing.F) {
	f.Add("me", "secret", "bWU6c2VjcmV0", "https://h/v2/", `Bearer realm="https://a/token",service="s",scope="repository:x:pull"`)
	f.Add("", "", "%%%", "[::1", `Basic realm="`)
	f.Add("", "", "", "", `Digest qop="auth", , =,"`)
	f.Fuzz(func(t *testing.T, user, secret, both, server, challenge string) {
		c, err := callersCredentials(&Auth{Username: user, Password: secret, Auth: both, ServerAddress: server})
		if err == nil {
			_, _, _ = c.lookup("h")
		} else if len(both) > 8 && strings.Contains(err.Error(), both) {
			t.Errorf("the error holds the credentials: %v", err)
		}
		_ = auth.ParseAuthHeader(http.Header{"Www-Authenticate": {challenge}})
		_, _, _ = creds.Static{server: {Username: user, Password: secret, Auth: both}}.Find(t.Context(), "h", "r")
	})
}

// What comes back from a registry as an error is made fit for a line.
func FuzzClean(f *testing.F) {
	f.Add("x https://a/b?sig=secret#y \x1b[31m\n")
	f.Fuzz(func(t *testing.T, text string) {
		if got := clean(text); strings.ContainsAny(got, "\n\x1b\x00") || len(got) > 1100 {
			t.Errorf("%q", got)
		}
	})
}

// Annotations of an encrypted layer are bounded before they are used.
func FuzzEncryption(f *testing.F) {
	f.Add([]byte(`{"org.opencontainers.image.enc.keys.jwe":"eA==","x":"y"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var e encryption
		if json.Unmarshal(b, &e) == nil && len(e) > maxAnnotations {
			t.Errorf("%d annotations", len(e))
		}
		var cfg v1.ConfigFile
		_ = json.Unmarshal(b, &cfg)
	})
}
