package integration

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// liar stands before the test registry and spoils what passes.
type liar struct {
	server *httptest.Server
	// blob handles requests for layers; nil passes them on.
	blob http.HandlerFunc
	real http.Handler
}

// newLiar serves as the registry NAME.example of the node's configuration.
func newLiar(t *testing.T, name string, blob func(real http.Handler) http.HandlerFunc) string {
	t.Helper()
	target, err := url.Parse("http://" + here.registry.Addr)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(target)
	l := &liar{real: proxy}
	l.blob = blob(proxy)
	l.server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/blobs/") || strings.Contains(r.URL.Path, "/manifests/") && strings.Contains(name, "manifest") {
			l.blob(w, r)
			return
		}
		l.real.ServeHTTP(w, r)
	}))
	t.Cleanup(l.server.Close)
	host := name + ".example"
	dir := filepath.Join(here.hosts, host)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	toml := fmt.Sprintf("server = %q\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", l.server.URL, l.server.URL)
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(toml), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return host
}

// oneImage is an image that no other test has, by its repository.
func oneImage(t *testing.T) string {
	t.Helper()
	ref := push(t, hostileImage(t, nil, file{path: "/mark", data: []byte(fmt.Sprint(serial.Add(1), strings.Repeat(time.Now().String(), 10000)))}))
	_, repo, _ := strings.Cut(ref, "/")
	return repo
}

func TestLyingRegistries(t *testing.T) {
	n := own(t, testnode.Options{})
	witness(t, n)
	check := noLeak(t, n)
	var times atomic.Int32
	for name, c := range map[string]struct {
		codes []codes.Code
		blob  func(real http.Handler) http.HandlerFunc
		words []string
	}{
		"wrong-bytes": {[]codes.Code{codes.FailedPrecondition, codes.DataLoss, codes.Unavailable, codes.InvalidArgument}, func(http.Handler) http.HandlerFunc {
			return func(w http.ResponseWriter, r *http.Request) { w.Write([]byte("these are not the bytes")) }
		}, nil},
		"truncated": {[]codes.Code{codes.Unavailable, codes.DataLoss, codes.FailedPrecondition}, func(http.Handler) http.HandlerFunc {
			return func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Length", "100000")
				w.Write(make([]byte, 500))
				times.Add(1)
			}
		}, nil},
		"error-page": {[]codes.Code{codes.Unavailable, codes.Internal, codes.FailedPrecondition}, func(http.Handler) http.HandlerFunc {
			return func(w http.ResponseWriter, r *http.Request) {
				http.Error(w, strings.Repeat("<html>secret\n\x1b[31m", 10000), http.StatusInternalServerError)
			}
		}, []string{"500"}},
		"not-there": {[]codes.Code{codes.NotFound}, func(http.Handler) http.HandlerFunc { return http.NotFound }, nil},
		"forbidden": {[]codes.Code{codes.PermissionDenied, codes.Unauthenticated}, func(http.Handler) http.HandlerFunc {
			return func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusForbidden) }
		}, nil},
		"endless-redirect": {[]codes.Code{codes.Unavailable, codes.Internal, codes.FailedPrecondition}, func(http.Handler) http.HandlerFunc {
			return func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.Path, http.StatusFound) }
		}, nil},
		"manifest-rubbish": {[]codes.Code{codes.InvalidArgument, codes.FailedPrecondition, codes.DataLoss, codes.Unavailable, codes.NotFound}, func(http.Handler) http.HandlerFunc {
			return func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
				w.Write([]byte(`{"schemaVersion":2,"layers":[{"digest":"sha256:../../etc/passwd","size":-5}]}`))
			}
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			ref := newLiar(t, name, c.blob) + "/" + oneImage(t)
			began := time.Now()
			_, err := pull(t.Context(), n, ref)
			if took := time.Since(began); took > 20*time.Second {
				t.Errorf("the answer took %v", took)
			}
			wantOneOf(t, err, c.codes, append(c.words, name+".example")...)
			if err != nil && strings.Contains(err.Error(), "\x1b") {
				t.Errorf("the error holds control characters: %.200q", err.Error())
			}
			r, err := n.Image.ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref}})
			if err != nil || r.Image != nil {
				t.Errorf("after the failed pull there is %v, %v", r, err)
			}
		})
	}
	check()
}

// A registry that sends nothing more is given up after the configured time,
// or when the client does.
func TestStallingRegistry(t *testing.T) {
	n := own(t, testnode.Options{})
	reconfigure(t, n, `[plugins."io.containerd.cri.v1.images"]`, "image_pull_progress_timeout = \"2s\"")
	release := make(chan struct{})
	defer close(release)
	host := newLiar(t, "stalling", func(http.Handler) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusOK)
			w.(http.Flusher).Flush()
			select {
			case <-release:
			case <-r.Context().Done():
			}
		}
	})
	ref := host + "/" + oneImage(t)
	began := time.Now()
	_, err := pull(t.Context(), n, ref)
	wantOneOf(t, err, []codes.Code{codes.DeadlineExceeded, codes.Unavailable}, host)
	if took := time.Since(began); took < time.Second || took > 15*time.Second {
		t.Errorf("given up after %v", took)
	}
	ctx, cancel := limit(t, 500*time.Millisecond)
	defer cancel()
	began = time.Now()
	_, err = pull(ctx, n, ref)
	wantError(t, err, codes.DeadlineExceeded)
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("a client that gives up waits for %v", took)
	}
}

// reconfigure adds a line under a table of the node's configuration.
func reconfigure(t *testing.T, n *testnode.Node, table, line string) {
	t.Helper()
	path := filepath.Join(n.Dir, "config.toml")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	changed := strings.Replace(string(data), table+"\n", table+"\n"+line+"\n", 1)
	if changed == string(data) {
		t.Fatalf("no table %s in\n%s", table, data)
	}
	if err := n.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(changed), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// Credentials go to the registry that asked for them and nowhere else: not
// with a redirect to another host, not into an error, not into the log.
func TestCredentialsStayWithTheirRegistry(t *testing.T) {
	n := own(t, testnode.Options{LogLevel: "debug"})
	const password = "s3cr3t-p4ssw0rd"
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte("user:"+password))
	var leaked, asked atomic.Int32
	thief := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			leaked.Add(1)
		}
		asked.Add(1)
		w.WriteHeader(http.StatusTeapot)
	}))
	t.Cleanup(thief.Close)
	elsewhere := strings.Replace(thief.URL, "127.0.0.1", "localhost", 1)
	host := newLiar(t, "thief-manifest", func(real http.Handler) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			switch {
			case r.Header.Get("Authorization") != basic:
				w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
				w.WriteHeader(http.StatusUnauthorized)
			case strings.Contains(r.URL.Path, "/blobs/"):
				http.Redirect(w, r, elsewhere+r.URL.Path, http.StatusTemporaryRedirect)
			default:
				real.ServeHTTP(w, r)
			}
		}
	})
	_, err := n.Image.PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: host + "/" + oneImage(t)},
		Auth: &cri.AuthConfig{Username: "user", Password: password}})
	if err == nil {
		t.Fatal("the pull succeeded without its layers")
	}
	if asked.Load() == 0 {
		t.Fatalf("the redirect was not followed: %v", err)
	}
	if leaked.Load() > 0 {
		t.Error("credentials went to the host of a redirect")
	}
	for what, text := range map[string]string{"error": err.Error(), "log": n.LogTail(10000)} {
		for _, secret := range []string{password, strings.TrimPrefix(basic, "Basic ")} {
			if strings.Contains(text, secret) {
				t.Errorf("the %s holds the credentials", what)
			}
		}
	}
}
