package image

import (
	"context"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/image/creds"
)

const password = "hunter2-very-secret"

// basicAuth lets requests through that carry the user's password, and notes all
// headers that a server saw.
func basicAuth(w http.ResponseWriter, r *http.Request) bool {
	if user, pass, ok := r.BasicAuth(); ok && user == "me" && pass == password {
		return false
	}
	w.Header().Set("WWW-Authenticate", `Basic realm="r"`)
	w.WriteHeader(http.StatusUnauthorized)
	return true
}

func TestCredentials(t *testing.T) {
	reg := newRegistry(t)
	s := openStore(t, nil)
	ref := reg.push(t, "app", "1", imageOf(t, nil, fileLayer(t, "f", []byte("x"))))
	reg.fault(basicAuth)
	for name, c := range map[string]struct {
		auth *Auth
		is   func(error) bool
	}{
		"none":          {nil, errdefs.IsUnauthorized},
		"empty":         {&Auth{}, errdefs.IsUnauthorized},
		"wrong":         {&Auth{Username: "me", Password: "wrong-secret-word"}, errdefs.IsUnauthorized},
		"other server":  {&Auth{Username: "me", Password: password, ServerAddress: "other.example:5000"}, errdefs.IsUnauthorized},
		"not base64":    {&Auth{Auth: "%%%"}, errdefs.IsInvalidArgument},
		"no colon":      {&Auth{Auth: base64.StdEncoding.EncodeToString([]byte("me"))}, errdefs.IsInvalidArgument},
		"password only": {&Auth{Password: password}, errdefs.IsInvalidArgument},
	} {
		_, err := s.Pull(context.Background(), PullRequest{Ref: ref, Auth: c.auth})
		if !c.is(err) {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil && (strings.Contains(err.Error(), password) || strings.Contains(err.Error(), "wrong-secret-word")) {
			t.Errorf("%s: the error holds the password: %v", name, err)
		}
	}
	for name, auth := range map[string]*Auth{
		"user":   {Username: "me", Password: password},
		"auth":   {Auth: base64.StdEncoding.EncodeToString([]byte("me:" + password))},
		"server": {Username: "me", Password: password, ServerAddress: "http://" + reg.host + "/v2/"},
	} {
		if _, err := s.Pull(context.Background(), PullRequest{Ref: ref, Auth: auth}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

type sourceFunc func(host string) (creds.Credential, bool)

func (f sourceFunc) Find(_ context.Context, host, _ string) (creds.Credential, bool, error) {
	c, ok := f(host)
	return c, ok, nil
}

func TestStoreCredentialsAndToken(t *testing.T) {
	reg := newRegistry(t)
	var asked []string
	s := openStore(t, func(o *Options) {
		o.Credentials = sourceFunc(func(host string) (creds.Credential, bool) {
			asked = append(asked, host)
			return creds.Credential{User: "me", Secret: password}, true
		})
	})
	ref := reg.push(t, "app", "1", imageOf(t, nil, fileLayer(t, "f", []byte("x"))))
	reg.fault(basicAuth)
	mustPull(t, s, ref)
	if len(asked) == 0 || asked[0] != reg.host {
		t.Errorf("asked for %v", asked)
	}
	reg.fault(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Authorization") == "Bearer "+password {
			return false
		}
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	if _, err := s.Pull(context.Background(), PullRequest{Ref: ref, Auth: &Auth{RegistryToken: password}}); err != nil {
		t.Errorf("registry token: %v", err)
	}
	if _, err := s.Pull(context.Background(), PullRequest{Ref: ref, Auth: &Auth{RegistryToken: "not-" + password}}); !errdefs.IsUnauthorized(err) || strings.Contains(err.Error(), password) {
		t.Errorf("wrong registry token: %v", err)
	}
}

// TestRedirectKeepsSecrets sends layer requests to another host, which asks for
// credentials itself: it must see none, and no header of the configuration.
func TestRedirectKeepsSecrets(t *testing.T) {
	for _, challenge := range []bool{false, true} {
		t.Run(fmt.Sprintf("challenge=%v", challenge), func(t *testing.T) {
			reg := newRegistry(t)
			layer := fileLayer(t, "f", noise(t, 1000))
			isLayer := isLayerGet(layer)
			rc, err := layer.Compressed()
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(rc)
			if err != nil {
				t.Fatal(err)
			}
			var mu sync.Mutex
			var headers []http.Header
			thief := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				mu.Lock()
				headers = append(headers, r.Header.Clone())
				mu.Unlock()
				if challenge {
					w.Header().Set("WWW-Authenticate", `Basic realm="give"`)
					w.WriteHeader(http.StatusUnauthorized)
					return
				}
				_, _ = w.Write(body)
			}))
			t.Cleanup(thief.Close)
			s := openStore(t, func(o *Options) { o.Headers = map[string][]string{"X-Node-Secret": {password}} })
			ref := reg.push(t, "app", "1", imageOf(t, nil, layer))
			reg.fault(func(w http.ResponseWriter, r *http.Request) bool {
				if basicAuth(w, r) {
					return true
				}
				if isLayer(r) {
					http.Redirect(w, r, thief.URL+"/loot?X-Amz-Signature=signed-secret", http.StatusTemporaryRedirect)
					return true
				}
				return false
			})
			_, err = s.Pull(context.Background(), PullRequest{Ref: ref, Auth: &Auth{Username: "me", Password: password}})
			if challenge == (err == nil) {
				t.Errorf("pull: %v", err)
			}
			if err != nil && strings.Contains(err.Error(), "signed-secret") {
				t.Errorf("the error holds the signature: %v", err)
			}
			if n := reg.seen(func(r *http.Request) bool { return r.Header.Get("X-Node-Secret") == password }); n == 0 {
				t.Error("the configured header does not reach the registry")
			}
			mu.Lock()
			defer mu.Unlock()
			if len(headers) == 0 {
				t.Fatal("no request was redirected")
			}
			for _, h := range headers {
				if all := fmt.Sprint(h); strings.Contains(all, password) || h.Get("Authorization") != "" {
					t.Errorf("the other host saw %v", h)
				}
			}
		})
	}
}

// TestForeignURLs serves a layer descriptor with URLs of another host: they
// must not be asked.
func TestForeignURLs(t *testing.T) {
	reg := newRegistry(t)
	s := openStore(t, nil)
	layer := fileLayer(t, "f", []byte("x"))
	img := imageOf(t, nil, layer)
	reg.push(t, "app", "plain", img)
	asked := make(chan string, 10)
	other := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { asked <- r.URL.Path }))
	t.Cleanup(other.Close)
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	m = m.DeepCopy()
	for i := range m.Layers {
		m.Layers[i].URLs = []string{other.URL + "/metadata"}
		m.Layers[i].Annotations = map[string]string{"containerd.io/snapshot/uidmapping": "0:7:1"}
		m.Layers[i].Data = []byte("other")
	}
	reg.manifest(t, "app", "urls", string(m.MediaType), marshal(t, m))
	mustPull(t, s, reg.host+"/app:urls")
	if len(asked) > 0 {
		t.Errorf("the other host was asked for %s", <-asked)
	}
}

func writeHosts(t testing.TB, tree, host, text string) {
	t.Helper()
	dir := filepath.Join(tree, host)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestHostsToml(t *testing.T) {
	reg, dead := newRegistry(t), newRegistry(t)
	img := imageOf(t, nil, fileLayer(t, "f", []byte("x")))
	reg.push(t, "library/app", "1", img)
	secure := httptest.NewTLSServer(reg.Config.Handler)
	t.Cleanup(secure.Close)
	dead.fault(status(503, ""))
	ca := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	first, second := t.TempDir(), t.TempDir()
	s := openStore(t, func(o *Options) { o.ConfigPath = first + ":" + second })
	pull := func(ref string) error {
		_, err := s.Pull(context.Background(), PullRequest{Ref: ref})
		return err
	}
	mirror := func(url string) string { return fmt.Sprintf("[host.%q]\n", url) }

	writeHosts(t, second, "_default", mirror(reg.URL))
	if err := pull("registry.invalid/library/app:1"); err != nil {
		t.Errorf("_default of the second tree: %v", err)
	}
	if n := reg.seen(func(r *http.Request) bool { return r.URL.Query().Get("ns") == "registry.invalid" }); n == 0 {
		t.Error("the mirror is not told the registry's name")
	}
	writeHosts(t, first, "docker.io", mirror(dead.URL)+"capabilities = [\"pull\", \"resolve\"]\n"+mirror(reg.URL))
	if err := pull("app:1"); err != nil {
		t.Errorf("second mirror: %v", err)
	}
	if n := dead.seen(func(*http.Request) bool { return true }); n == 0 {
		t.Error("the first mirror was not tried first")
	}
	writeHosts(t, first, "ca.invalid", fmt.Sprintf("server = %q\nca = %q\n", secure.URL, ca))
	if err := pull("ca.invalid/library/app:1"); err != nil {
		t.Errorf("own CA: %v", err)
	}
	writeHosts(t, first, "unknown-ca.invalid", fmt.Sprintf("server = %q\n", secure.URL))
	if err := pull("unknown-ca.invalid/library/app:1"); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("unknown CA: %v", err)
	}
	writeHosts(t, first, "no-ca.invalid", fmt.Sprintf("server = %q\nca = \"/nonexistent\"\n", secure.URL))
	if err := pull("no-ca.invalid/library/app:1"); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "/nonexistent") {
		t.Errorf("missing CA file: %v", err)
	}
	writeHosts(t, first, "skip.invalid", fmt.Sprintf("server = %q\nskip_verify = true\n", secure.URL))
	if err := pull("skip.invalid/library/app:1"); err != nil {
		t.Errorf("skip_verify: %v", err)
	}
	if got, err := s.Get("app:1"); err != nil || len(got.RepoTags) != 4 {
		t.Errorf("names %v %v", got.RepoTags, err)
	}
}
