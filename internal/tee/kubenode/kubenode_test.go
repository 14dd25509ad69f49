package kubenode

import (
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// server records what it is asked and answers with code. That a real API
// server takes it is shown by the end-to-end tests.
type server struct {
	*httptest.Server
	code int
	got  []string
}

func newServer(t *testing.T) (*server, string) {
	s := &server{code: http.StatusOK}
	s.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		s.got = append(s.got, r.Method+" "+r.URL.Path+" "+r.Header.Get("Content-Type")+" "+r.Header.Get("Authorization")+" "+string(b))
		w.WriteHeader(s.code)
		fmt.Fprintf(w, `{"kind":"Status","message":"says the server"}`)
	}))
	t.Cleanup(s.Close)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	path := filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf(`{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"k","user":"u"}}],
"clusters":[{"name":"k","cluster":{"server":%q,"certificate-authority-data":%q}}],"users":[{"name":"u","user":{"token":"sesame"}}]}`,
		s.URL, base64.StdEncoding.EncodeToString(ca))
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return s, path
}

func TestWrites(t *testing.T) {
	s, kubeconfig := newServer(t)
	c, err := Open(kubeconfig, "node-1")
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(c.SetLabels(t.Context(), map[string]string{"teetype": "trustzone"}),
		c.SetCapacity(t.Context(), map[string]int64{"sgx.intel.com/epc": 1 << 40}), c.Event(t.Context(), true, "TEEUnhealthy", "gone"))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		`PATCH /api/v1/nodes/node-1 application/merge-patch+json Bearer sesame {"metadata":{"labels":{"teetype":"trustzone"}}}`,
		`PATCH /api/v1/nodes/node-1/status application/merge-patch+json Bearer sesame {"status":{"capacity":{"sgx.intel.com/epc":"1099511627776"}}}`,
	}
	for n, w := range want {
		if s.got[n] != w {
			t.Errorf("got  %s\nwant %s", s.got[n], w)
		}
	}
	_, body, _ := strings.Cut(s.got[2], "sesame ")
	var event struct {
		Type, Reason, Message string
		InvolvedObject        struct{ Kind, Name string }
	}
	if err := json.Unmarshal([]byte(body), &event); err != nil || event.Type != "Warning" || event.InvolvedObject.Name != "node-1" {
		t.Errorf("event: %s", s.got[2])
	}
}

func TestRefusals(t *testing.T) {
	s, kubeconfig := newServer(t)
	c, err := Open(kubeconfig, "node-1")
	if err != nil {
		t.Fatal(err)
	}
	for code, class := range map[int]error{403: errdefs.ErrPermissionDenied, 401: errdefs.ErrPermissionDenied, 404: errdefs.ErrNotFound, 500: errdefs.ErrUnavailable} {
		s.code = code
		err := c.SetLabels(t.Context(), map[string]string{"a": "b"})
		if !errors.Is(err, class) || !strings.Contains(err.Error(), "says the server") || strings.Contains(err.Error(), "sesame") {
			t.Errorf("%d: %v", code, err)
		}
	}
	s.Close()
	if err := c.SetLabels(t.Context(), nil); err == nil {
		t.Error("a server that is gone took it")
	}
}

func TestBadCredentials(t *testing.T) {
	_, kubeconfig := newServer(t)
	if _, err := Open(kubeconfig, ""); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("no node name: %v", err)
	}
	if _, err := Open("/no/such/file", "n"); err == nil {
		t.Error("no file, and no error")
	}
	if _, err := Open(InCluster, "n"); err == nil || !strings.Contains(err.Error(), "not a pod") {
		t.Errorf("not in a cluster: %v", err)
	}
	good, err := os.ReadFile(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct{ old, fresh, want string }{
		"nonsense":       {string(good), "token: sesame: {", "not YAML"},
		"no context":     {`"current-context":"c"`, `"current-context":"x"`, "no cluster or no user"},
		"http":           {`"server":"https`, `"server":"http`, "not https"},
		"insecure":       {`"server"`, `"insecure-skip-tls-verify":true,"server"`, "does not verify"},
		"a program":      {`"token":"sesame"`, `"exec":{"command":"rm"}`, "is a program"},
		"no certificate": {`"token":"sesame"`, `"client-certificate":"none.pem"`, "none.pem"},
		"bad authority":  {`"certificate-authority-data":"`, `"certificate-authority-data":"AAAA`, "certificate-authority"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "kubeconfig")
			if err := os.WriteFile(path, []byte(strings.Replace(string(good), tt.old, tt.fresh, 1)), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := Open(path, "n")
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "sesame") {
				t.Errorf("got %v", err)
			}
		})
	}
}

// A token that is rotated is used from the next request on.
func TestTokenFile(t *testing.T) {
	s, kubeconfig := newServer(t)
	b, err := os.ReadFile(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "kubeconfig")
	text := strings.Replace(string(b), `"token":"sesame"`, `"tokenFile":"token"`, 1)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Open(path, "n")
	if err != nil {
		t.Fatal(err)
	}
	for _, token := range []string{"one", "two"} {
		if err := os.WriteFile(filepath.Join(dir, "token"), []byte(token+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := c.SetLabels(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		if got := s.got[len(s.got)-1]; !strings.Contains(got, "Bearer "+token+" ") {
			t.Errorf("asked with %s", got)
		}
	}
	if err := os.Remove(filepath.Join(dir, "token")); err != nil {
		t.Fatal(err)
	}
	if err := c.SetLabels(t.Context(), nil); err == nil {
		t.Error("asked without a token")
	}
}

func FuzzKubeconfig(f *testing.F) {
	f.Add([]byte(`{"current-context":"c","contexts":[{"name":"c","context":{"cluster":"k","user":"u"}}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		path := filepath.Join(t.TempDir(), "kubeconfig")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		if c, u, err := credentials(path); err == nil {
			_, _, _ = transport(c, u) // it may be refused, it may not panic
		}
	})
}
