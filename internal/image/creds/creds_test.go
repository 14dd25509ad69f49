package creds

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

const secret = "hunter2-very-secret"

func write(t *testing.T, path, text string, mode os.FileMode) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

// find asks and fails the test when a secret shows up in an error.
func find(t *testing.T, s Source, host, repository string) (Credential, bool, error) {
	t.Helper()
	c, ok, err := Sources{s}.Find(t.Context(), host, repository)
	if err != nil && strings.Contains(err.Error(), secret) {
		t.Errorf("the error holds the secret: %v", err)
	}
	return c, ok, err
}

func TestStatic(t *testing.T) {
	b64 := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	s := Static{
		"one.example:5000":            {Username: "me", Password: secret},
		"https://two.example/v1/":     {Auth: b64("me:" + secret)},
		"https://index.docker.io/v1/": {IdentityToken: secret},
		"gcr.io":                      {Username: "_json_key", Password: `{"a": "` + secret + `"}`},
		"bad.example":                 {Auth: "%%%" + secret},
		"nocolon.example":             {Auth: b64(secret)},
		"empty.example":               {},
	}
	for host, want := range map[string]Credential{
		"one.example:5000": {"me", secret}, "two.example": {"me", secret}, "registry-1.docker.io": {"", secret},
		"docker.io": {"", secret}, "gcr.io": {"_json_key", `{"a": "` + secret + `"}`}, "TWO.example": {"me", secret},
	} {
		if c, ok, err := find(t, s, host, "r"); !ok || err != nil || c != want {
			t.Errorf("%s: %v %v", host, ok, err)
		}
	}
	for _, host := range []string{"one.example", "three.example", "empty.example"} {
		if _, ok, err := find(t, s, host, "r"); ok || err != nil {
			t.Errorf("%s: %v %v", host, ok, err)
		}
	}
	for _, host := range []string{"bad.example", "nocolon.example"} {
		if _, ok, err := find(t, s, host, "r"); ok || !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v %v", host, ok, err)
		}
	}
	if text := fmt.Sprintf("%v %+v %#v %s", Credential{"me", secret}, Credential{"me", secret}, Credential{"me", secret}, Credential{"me", secret}); strings.Contains(text, secret) {
		t.Errorf("a credential prints as %s", text)
	}
}

func TestDocker(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	write(t, filepath.Join(dir, "docker-credential-good"), `#!/bin/sh
read server
case $server in
gcr.example) echo '{"ServerURL":"x","Username":"<token>","Secret":"`+secret+`"}' ;;
*) echo "credentials not found in native keychain"; exit 1 ;;
esac`, 0o755)
	write(t, filepath.Join(dir, "docker-credential-bad"), "#!/bin/sh\necho "+secret+" >&2\necho "+secret+"\nexit 3\n", 0o755)
	write(t, filepath.Join(dir, "docker-credential-talks"), "#!/bin/sh\necho "+secret+"\n", 0o755)
	write(t, filepath.Join(dir, "docker-credential-hangs"), "#!/bin/sh\nexec sleep 100\n", 0o755)
	file := write(t, filepath.Join(dir, "config.json"), `{"auths": {
		"https://index.docker.io/v1/": {"auth": "`+base64.StdEncoding.EncodeToString([]byte("hub:"+secret))+`"},
		"reg.example": {"username":"all","password":"`+secret+`"},
		"reg.example/team": {"username":"team","password":"`+secret+`"},
		"stored.example": {}},
		"credHelpers": {"gcr.example":"good","missing.example":"good","bad.example":"bad","talks.example":"talks","hangs.example":"hangs","evil.example":"../../bin/sh"},
		"credsStore": "good"}`, 0o600)
	d := Docker(file)
	for _, c := range []struct{ host, repository, user string }{
		{"docker.io", "library/busybox", "hub"}, {"reg.example", "x", "all"}, {"reg.example", "team/x", "team"},
		{"reg.example", "teams/x", "all"}, {"gcr.example", "x", ""},
	} {
		if got, ok, err := find(t, d, c.host, c.repository); !ok || err != nil || got != (Credential{c.user, secret}) {
			t.Errorf("%s/%s: %v %v %v", c.host, c.repository, got, ok, err)
		}
	}
	for _, host := range []string{"missing.example", "stored.example", "unknown.example"} {
		if _, ok, err := find(t, d, host, "x"); ok || err != nil {
			t.Errorf("%s: %v %v", host, ok, err)
		}
	}
	for _, host := range []string{"bad.example", "talks.example", "evil.example"} {
		if _, ok, err := find(t, d, host, "x"); ok || err == nil {
			t.Errorf("%s: %v %v", host, ok, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, ok, err := d.Find(ctx, "hangs.example", "x"); ok || err == nil {
		t.Errorf("a helper that hangs: %v %v", ok, err)
	}
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, ok, err := find(t, d, "reg.example", "x"); ok || err == nil || !strings.Contains(err.Error(), "chmod 600 "+file) {
		t.Errorf("a file that everybody reads: %v %v", ok, err)
	}
	write(t, file, `{"auths": {"`+secret, 0o600)
	if _, ok, err := find(t, d, "reg.example", "x"); ok || !errdefs.IsFailedPrecondition(err) {
		t.Errorf("damaged file: %v %v", ok, err)
	}
	if _, ok, err := find(t, Docker(filepath.Join(dir, "none")), "reg.example", "x"); ok || err != nil {
		t.Errorf("no file: %v %v", ok, err)
	}
}

func TestKubelet(t *testing.T) {
	dir := t.TempDir()
	calls := filepath.Join(dir, "calls")
	write(t, filepath.Join(dir, "bin", "plugin"), `#!/bin/sh
in=$(cat); echo "$in $1 $WORD" >>`+calls+`
cat <<END
{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Registry","cacheDuration":"1h",
 "auth":{"*.mirror.example":{"username":"me","password":"`+secret+`"},"*.mirror.example/deep":{"username":"deep","password":"`+secret+`"}}}
END
`, 0o755)
	write(t, filepath.Join(dir, "bin", "talks"), "#!/bin/sh\necho "+secret+"\n", 0o755)
	config := write(t, filepath.Join(dir, "config.yaml"), `
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- name: plugin
  matchImages: ["*.mirror.example"]
  defaultCacheDuration: "0s"
  apiVersion: credentialprovider.kubelet.k8s.io/v1
  args: [argument]
  env: [{name: WORD, value: variable}]
- name: talks
  matchImages: [talks.example]
  defaultCacheDuration: 10m
  apiVersion: credentialprovider.kubelet.k8s.io/v1
`, 0o644)
	k := &Kubelet{Config: config, Bin: filepath.Join(dir, "bin")}
	for range 3 {
		if c, ok, err := find(t, k, "a.mirror.example", "x"); !ok || err != nil || c != (Credential{"me", secret}) {
			t.Fatalf("%v %v %v", c, ok, err)
		}
	}
	if c, ok, _ := find(t, k, "a.mirror.example", "deep/x"); !ok || c.User != "deep" {
		t.Errorf("the longer path: %v %v", c, ok)
	}
	b, err := os.ReadFile(calls)
	if err != nil || strings.Count(string(b), "\n") != 1 {
		t.Errorf("the plugin was called: %s %v", b, err)
	}
	var request struct{ Kind, APIVersion, Image string }
	if err := json.NewDecoder(strings.NewReader(string(b))).Decode(&request); err != nil || request.Image != "a.mirror.example/x" || request.Kind != "CredentialProviderRequest" {
		t.Errorf("request %+v %v", request, err)
	}
	if !strings.Contains(string(b), "argument variable") {
		t.Errorf("arguments and variables: %s", b)
	}
	if _, ok, err := find(t, k, "talks.example", "x"); ok || !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a plugin that talks: %v %v", ok, err)
	}
	if _, ok, err := find(t, k, "other.example", "x"); ok || err != nil {
		t.Errorf("a host of no plugin: %v %v", ok, err)
	}
	for _, bad := range []string{"kind: [", "kind: Other\n", "kind: CredentialProviderConfig\nsurprise: 1\n", "kind: CredentialProviderConfig\nproviders: [{name: ../sh}]\n"} {
		write(t, config, bad, 0o644)
		if _, ok, err := find(t, k, "a.mirror.example", "x"); ok || !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%q: %v %v", bad, ok, err)
		}
	}
}

func TestMatches(t *testing.T) {
	for _, c := range []struct {
		pattern, image string
		want           bool
	}{
		{"registry.io:8080/path", "registry.io:8080/path/x", true}, {"registry.io", "registry.io/x", true},
		{"registry.io", "registry.io:8080/x", false}, {"*.io", "registry.io/x", true}, {"*.io", "a.registry.io/x", false},
		{"*.*.io", "a.registry.io/x", true}, {"*", "registry.io/x", false}, {"registry.io/path", "registry.io/other", false},
		{"https://registry.io", "registry.io/x", true}, {"[::1]:5000", "[::1]:5000/x", true}, {"reg?stry.io", "registry.io/x", true},
		{"[", "registry.io/x", false}, {"", "registry.io/x", false},
	} {
		if got := matches(c.pattern, c.image); got != c.want {
			t.Errorf("matches(%q, %q) is %v", c.pattern, c.image, got)
		}
	}
}
