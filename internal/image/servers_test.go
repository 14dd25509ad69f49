package image

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"cloister.dev/internal/image/creds"
)

// TestDockerRegistry pulls from Debian's docker-registry with TLS and basic
// authentication, with credentials from every place that they can come from.
func TestDockerRegistry(t *testing.T) {
	d := serveDocker(t, dockerOptions{tls: true, auth: true})
	from := "docker://" + newRegistry(t).push(t, "app", "1", imageOf(t, nil, fileLayer(t, "f", noise(t, 1<<20)), fileLayer(t, "g", []byte("x"))))
	certs := t.TempDir()
	ca, err := os.ReadFile(d.ca)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(certs, "ca.crt"), ca, 0o644)
	skopeo(t, "copy", "--src-tls-verify=false", "--dest-cert-dir", certs, "--dest-creds", "me:"+password, from, "docker://"+d.host+"/team/app:1")
	tree := t.TempDir()
	writeFile(t, filepath.Join(tree, d.host, "ca.crt"), ca, 0o644) // Docker's layout
	toml := t.TempDir()
	writeHosts(t, toml, d.host, fmt.Sprintf("server = \"https://%s\"\n[host.\"https://%s\"]\nca = %q\n", d.host, d.host, d.ca))
	otherCA, _ := certificate(t, t.TempDir(), "other")
	other := t.TempDir()
	writeHosts(t, other, d.host, fmt.Sprintf("server = \"https://%s\"\nca = %q\n", d.host, otherCA))
	config := filepath.Join(t.TempDir(), "config.json")
	writeFile(t, config, fmt.Appendf(nil, `{"auths":{%q:{"username":"me","password":%q}}}`, d.host, password), 0o600)
	for name, c := range map[string]struct {
		tree   string
		auth   *Auth
		source creds.Source
		fails  func(error) bool
	}{
		"docker's certs layout":    {tree: tree, auth: &Auth{Username: "me", Password: password}},
		"hosts.toml":               {tree: toml, auth: &Auth{Username: "me", Password: password}},
		"configuration":            {tree: toml, source: creds.Static{d.host: {Username: "me", Password: password}}},
		"config.json":              {tree: toml, source: creds.Docker(config)},
		"caller before the node":   {tree: toml, auth: &Auth{Username: "me", Password: password}, source: creds.Static{d.host: {Username: "me", Password: "stale-" + password}}},
		"no credentials":           {tree: toml, fails: errdefs.IsUnauthorized},
		"wrong credentials":        {tree: toml, source: creds.Static{d.host: {Username: "me", Password: "wrong-" + password}}, fails: errdefs.IsUnauthorized},
		"credentials of another":   {tree: toml, source: creds.Static{"other.example": {Username: "me", Password: password}}, fails: errdefs.IsUnauthorized},
		"unknown authority":        {tree: other, auth: &Auth{Username: "me", Password: password}, fails: errdefs.IsUnavailable},
		"damaged credentials file": {tree: toml, source: creds.Docker(d.ca), fails: errdefs.IsFailedPrecondition},
	} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t, func(o *Options) { o.ConfigPath, o.Credentials = c.tree, c.source })
			_, err := s.Pull(t.Context(), PullRequest{Ref: d.host + "/team/app:1", Auth: c.auth})
			if c.fails == nil {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if !c.fails(err) || strings.Contains(err.Error(), password) {
				t.Errorf("error %v", err)
			}
			t.Log(err)
		})
	}
}

// TestMirrorCredentials: a mirror gets its own credentials, the registry its
// own, and neither sees the other's.
func TestMirrorCredentials(t *testing.T) {
	const mirrorPassword = "the-password-of-the-mirror"
	seen := func(reg *fakeRegistry, secret string) int {
		return reg.seen(func(r *http.Request) bool { _, p, _ := r.BasicAuth(); return p == secret })
	}
	asks := func(secret string, missing bool) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if _, p, _ := r.BasicAuth(); p != secret {
				w.Header().Set("WWW-Authenticate", `Basic realm="r"`)
				w.WriteHeader(http.StatusUnauthorized)
				return true
			}
			if missing {
				w.WriteHeader(http.StatusNotFound)
			}
			return missing
		}
	}
	img := imageOf(t, nil, fileLayer(t, "f", noise(t, 1000)))
	for _, legacy := range []bool{false, true} {
		upstream, mirror := newRegistry(t), newRegistry(t)
		ref := upstream.push(t, "team/app", "1", img)
		mirror.push(t, "team/app", "1", img)
		tree := t.TempDir()
		writeHosts(t, tree, upstream.host, fmt.Sprintf("server = %q\n[host.%q]\n", upstream.URL, mirror.URL))
		s := openStore(t, func(o *Options) {
			o.ConfigPath = tree
			if legacy {
				o.ConfigPath = ""
				o.Registries = Registries{Mirrors: map[string][]string{upstream.host: {mirror.URL, upstream.URL}}}
			}
			o.Credentials = creds.Static{mirror.host: {Username: "mirror", Password: mirrorPassword}}
		})
		auth := &Auth{Username: "me", Password: password}
		mirror.fault(asks(mirrorPassword, false))
		upstream.fault(asks(password, false))
		if _, err := s.Pull(t.Context(), PullRequest{Ref: ref, Auth: auth}); err != nil {
			t.Fatalf("legacy %v: %v", legacy, err)
		}
		if seen(mirror, mirrorPassword) == 0 || seen(mirror, password) != 0 || seen(upstream, mirrorPassword) != 0 {
			t.Errorf("legacy %v: the mirror saw %d and %d, the registry %d", legacy, seen(mirror, mirrorPassword), seen(mirror, password), seen(upstream, mirrorPassword))
		}
		if legacy {
			continue // the registry itself is plain HTTP, which the old form gives to mirrors only
		}
		mirror.fault(asks(mirrorPassword, true))
		upstream.fault(asks(password, false))
		if _, err := s.Pull(t.Context(), PullRequest{Ref: ref, Auth: auth}); err != nil {
			t.Fatalf("when the mirror has no such image: %v", err)
		}
		if seen(upstream, password) == 0 || seen(upstream, mirrorPassword) != 0 {
			t.Errorf("the registry saw %d of its own, %d of the mirror's", seen(upstream, password), seen(upstream, mirrorPassword))
		}
	}
}

// TestLegacyRegistries covers registry.mirrors and registry.configs.tls.
func TestLegacyRegistries(t *testing.T) {
	reg := newRegistry(t)
	reg.push(t, "app", "1", imageOf(t, nil, fileLayer(t, "f", []byte("x"))))
	reg.push(t, "library/app", "1", imageOf(t, nil, fileLayer(t, "f", []byte("y"))))
	secure := httptest.NewTLSServer(reg.Config.Handler)
	t.Cleanup(secure.Close)
	host := strings.TrimPrefix(secure.URL, "https://")
	prefix := httptest.NewServer(http.StripPrefix("/proxy/cache", reg.Config.Handler))
	t.Cleanup(prefix.Close)
	s := openStore(t, func(o *Options) {
		o.Registries = Registries{
			Mirrors: map[string][]string{"docker.io": {secure.URL}, "*": {reg.URL}, "prefix.invalid": {prefix.URL + "/proxy/cache/v2"}},
			TLS:     map[string]RegistryTLS{host: {SkipVerify: true}},
		}
	})
	for _, ref := range []string{"app:1", "any.invalid/app:1", "prefix.invalid/app:1", host + "/app:1"} {
		if _, err := s.Pull(t.Context(), PullRequest{Ref: ref}); err != nil {
			t.Errorf("%s: %v", ref, err)
		}
	}
	for _, r := range []Registries{{Mirrors: map[string][]string{"h": {"http://[::1"}}}, {Mirrors: map[string][]string{"../h": {"http://x"}}}} {
		if err := r.write(filepath.Join(t.TempDir(), "hosts")); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v", r, err)
		}
	}
}

// TestHostsTomlKeys has a case for each key that TestHostsToml leaves out.
func TestHostsTomlKeys(t *testing.T) {
	reg := newRegistry(t)
	img := imageOf(t, nil, fileLayer(t, "f", []byte("x")))
	reg.push(t, "app", "1", img)
	tree, files := t.TempDir(), t.TempDir()
	cert, key := certificate(t, files, "client")
	mutual := httptest.NewUnstartedServer(reg.Config.Handler)
	pem, err := os.ReadFile(cert)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	mutual.TLS = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
	mutual.StartTLS()
	t.Cleanup(mutual.Close)
	prefix := httptest.NewServer(http.StripPrefix("/some/where", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.URL.Path = "/v2" + r.URL.Path
		reg.Config.Handler.ServeHTTP(w, r)
	})))
	t.Cleanup(prefix.Close)
	noRoute, err := net.Listen("tcp", "127.0.0.1:0") // accepts nothing: a backlog that nobody serves
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { noRoute.Close() })
	s := openStore(t, func(o *Options) { o.ConfigPath = tree })
	for name, c := range map[string]struct {
		toml  string
		fails string
	}{
		"client":                 {toml: fmt.Sprintf("[host.%q]\nskip_verify = true\nclient = [[%q, %q]]\n", mutual.URL, cert, key)},
		"no-client":              {toml: fmt.Sprintf("[host.%q]\nskip_verify = true\n", mutual.URL), fails: "certificate"},
		"override":               {toml: fmt.Sprintf("[host.%q]\noverride_path = true\n", prefix.URL+"/some/where")},
		"no-resolve":             {toml: fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = [\"pull\"]\n", reg.URL, reg.URL)},
		"push-only":              {toml: fmt.Sprintf("server = \"https://127.0.0.1:1\"\n[host.%q]\ncapabilities = [\"push\"]\n", reg.URL), fails: "127.0.0.1:1"},
		"header":                 {toml: fmt.Sprintf("[host.%q]\n[host.%q.header]\nX-Team = [\"a\", \"b\"]\n", reg.URL, reg.URL)},
		"unknown-capability":     {toml: fmt.Sprintf("[host.%q]\ncapabilities = [\"fly\"]\n", reg.URL), fails: "fly"},
		"damaged":                {toml: "server = [[[", fails: "hosts.toml"},
		"a-number-for-a-string":  {toml: "server = 1", fails: "hosts.toml"},
		"a-client-key-not-there": {toml: fmt.Sprintf("[host.%q]\nclient = [[%q, \"/nonexistent\"]]\n", reg.URL, cert), fails: "/nonexistent"},
		"dial":                   {toml: "server = \"https://10.255.255.1\"\ndial_timeout = \"50ms\"\n", fails: "10.255.255.1"},
	} {
		t.Run(name, func(t *testing.T) {
			reg.fault(nil)
			writeHosts(t, tree, name+".invalid", c.toml)
			start := time.Now()
			_, err := s.Pull(t.Context(), PullRequest{Ref: name + ".invalid/app:1"})
			if c.fails == "" && err != nil || c.fails != "" && (err == nil || !strings.Contains(err.Error(), c.fails)) {
				t.Errorf("error %v, want %q", err, c.fails)
			}
			t.Log(err)
			if time.Since(start) > 10*time.Second {
				t.Errorf("took %v", time.Since(start))
			}
			if name == "header" && reg.seen(func(r *http.Request) bool { return len(r.Header["X-Team"]) == 2 }) == 0 {
				t.Error("the header was not sent")
			}
		})
	}
}

func TestIPv6Registry(t *testing.T) {
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Skipf("this machine has no IPv6 loopback: %v", err)
	}
	reg := newRegistry(t)
	reg.push(t, "app", "1", imageOf(t, nil, fileLayer(t, "f", []byte("x"))))
	six := httptest.NewUnstartedServer(reg.Config.Handler)
	six.Listener.Close()
	six.Listener = l
	six.Start()
	t.Cleanup(six.Close)
	img := mustPull(t, openStore(t, nil), l.Addr().String()+"/app:1")
	if len(img.RepoTags) != 1 || img.RepoTags[0] != l.Addr().String()+"/app:1" {
		t.Errorf("names %v", img.RepoTags)
	}
}

// TestSkopeoFormats pulls what skopeo wrote: zstd, plain and several platforms.
func TestSkopeoFormats(t *testing.T) {
	d := serveDocker(t, dockerOptions{})
	content := []byte(strings.Repeat("content ", 10000))
	reg := newRegistry(t)
	from := "docker://" + reg.push(t, "app", "1", imageOf(t, nil, fileLayer(t, "f", content), fileLayer(t, "g", content)))
	dirs := map[string]string{"zstd": "zstd", "gzip": "gzip"}
	for tag, format := range dirs {
		dir := t.TempDir()
		skopeo(t, "copy", "--format", "oci", "--src-tls-verify=false", "--dest-compress-format", format, "--dest-compress", from, "dir:"+dir)
		skopeo(t, "copy", "--dest-tls-verify=false", "dir:"+dir, "docker://"+d.host+"/app:"+tag)
	}
	skopeo(t, "copy", "--format", "v2s2", "--src-tls-verify=false", "--dest-tls-verify=false", from, "docker://"+d.host+"/app:docker")
	arm := reg.push(t, "app", "arm", imageOf(t, func(c *v1.ConfigFile) { c.Architecture, c.Variant = "arm64", "v8" }, fileLayer(t, "f", []byte("arm"))))
	index := reg.index(t, "app", "many", map[string]string{"amd64": reg.host + "/app:1", "arm64": arm})
	skopeo(t, "copy", "--all", "--src-tls-verify=false", "--dest-tls-verify=false", "docker://"+index, "docker://"+d.host+"/app:many")
	for _, tag := range []string{"zstd", "gzip", "docker", "many"} {
		s := openStore(t, nil)
		img := mustPull(t, s, d.host+"/app:"+tag)
		b, err := os.ReadFile(filepath.Join(mounted(t, s, img), "f"))
		if err != nil || string(b) != string(content) {
			t.Errorf("%s: %d bytes %v", tag, len(b), err)
		}
		var m struct {
			Layers []struct{ MediaType string }
		}
		if tag == "zstd" {
			raw, err := s.stored(s.within(t.Context()), img.target, "")
			if err != nil || !strings.HasSuffix(raw.manifest.Layers[0].MediaType, "zstd") {
				t.Errorf("layers %v %v", m, err)
			}
		}
	}
	s := openStore(t, nil)
	img, err := s.Pull(t.Context(), PullRequest{Ref: d.host + "/app:many", Platform: "linux/arm64"})
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(mounted(t, s, img), "f")); err != nil || string(b) != "arm" {
		t.Errorf("arm64: %q %v", b, err)
	}
}

// index stores an index of images that are there, by architecture.
func (r *fakeRegistry) index(t testing.TB, repo, tag string, refs map[string]string) string {
	t.Helper()
	doc := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex}
	for arch, ref := range refs {
		_, refTag, _ := strings.Cut(strings.TrimPrefix(ref, r.host+"/"), ":")
		req := httptest.NewRequest(http.MethodGet, "/v2/"+repo+"/manifests/"+refTag, nil)
		rec := httptest.NewRecorder()
		r.inner.ServeHTTP(rec, req)
		h, size, err := v1.SHA256(rec.Body)
		if err != nil || rec.Code != http.StatusOK {
			t.Fatal(rec.Code, err)
		}
		doc.Manifests = append(doc.Manifests, v1.Descriptor{MediaType: types.MediaType(rec.Header().Get("Content-Type")), Digest: h, Size: size,
			Platform: &v1.Platform{OS: "linux", Architecture: arch}})
	}
	b, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	r.manifest(t, repo, tag, string(types.OCIImageIndex), b)
	return r.host + "/" + repo + ":" + tag
}

// TestRanges fetches a large layer in parts, from a registry that can send
// them, from one that cannot, and from one that breaks off.
func TestRanges(t *testing.T) {
	const chunk = 64 << 10
	content := noise(t, 1<<20)
	layer := fileLayer(t, "f", content)
	img := imageOf(t, nil, layer)
	isLayer := isLayerGet(layer)
	simple := newRegistry(t) // refuses ranges without an end
	d := serveDocker(t, dockerOptions{})
	skopeo(t, "copy", "--src-tls-verify=false", "--dest-tls-verify=false", "docker://"+simple.push(t, "app", "1", img), "docker://"+d.host+"/app:1")
	able := newRegistry(t)
	able.inner = httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: d.host})
	pull := func(reg *fakeRegistry, want int) *Store {
		t.Helper()
		s := openStore(t, func(o *Options) { o.LayerFetchBuffer = chunk })
		got, err := s.Pull(t.Context(), PullRequest{Ref: reg.host + "/app:1"})
		if n := reg.seen(isLayer); n < want {
			t.Errorf("%d requests, want %d", n, want)
		}
		if err != nil {
			t.Error(err)
			return s
		}
		if b, err := os.ReadFile(filepath.Join(mounted(t, s, got), "f")); err != nil || string(b) != string(content) {
			t.Errorf("%d bytes %v", len(b), err)
		}
		return s
	}
	pull(able, 16)
	simple.fault(nil)
	pull(simple, 2)
	able.fault(func(_ http.ResponseWriter, r *http.Request) bool { r.Header.Del("Range"); return false }) // sends all
	pull(able, 1)
	able.fault(func(w http.ResponseWriter, r *http.Request) bool {
		if !isLayer(r) || strings.HasPrefix(r.Header.Get("Range"), "bytes=0-") {
			return false
		}
		w.WriteHeader(http.StatusForbidden)
		return true
	})
	s := openStore(t, func(o *Options) { o.LayerFetchBuffer = chunk })
	if _, err := s.Pull(t.Context(), PullRequest{Ref: able.host + "/app:1"}); !errdefs.IsPermissionDenied(err) {
		t.Errorf("parts are missing: %v", err)
	}
	able.fault(nil)
	mustPull(t, s, able.host+"/app:1")
}
