package integration

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

const (
	registryPassword = "a-password-for-the-test"
	registryHash     = "$2a$04$24RYVaDh63Kx1QmdPpNe8O/UBgkfcyqZgoVVgXW09i81MNQi.NhtC"
)

// debianRegistry is Debian's docker-registry.
type debianRegistry struct {
	address, dir string
	login        string // a config.json with the credentials of its only user
	ca           string // empty without TLS
	process      *exec.Cmd
}

type debianOptions struct {
	open     bool            // for everybody
	mirrorOf *debianRegistry // an open one; the mirror has TLS
}

// startDebianRegistry runs one until the test ends.
func startDebianRegistry(t *testing.T, o debianOptions) *debianRegistry {
	t.Helper()
	program, err := exec.LookPath("docker-registry")
	if err != nil {
		t.Skip("docker-registry is not installed; run test/setup registry")
	}
	r := &debianRegistry{address: freePort(t), dir: t.TempDir()}
	config := fmt.Sprintf("version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage: {filesystem: {rootdirectory: %s}}\n"+
		"http:\n  addr: %q\n  secret: test\n", filepath.Join(r.dir, "data"), r.address)
	if o.mirrorOf != nil {
		var key string
		r.ca, key = selfSigned(t, r.dir)
		config += fmt.Sprintf("  tls: {certificate: %s, key: %s}\nproxy: {remoteurl: %q}\n", r.ca, key, o.mirrorOf.url())
	}
	if !o.open {
		config += fmt.Sprintf("auth: {htpasswd: {realm: r, path: %s}}\n", save(t, filepath.Join(r.dir, "users"), "me:"+registryHash+"\n", 0o600))
	}
	r.login = save(t, filepath.Join(r.dir, "config.json"), loginFor(t, r.address), 0o600)
	r.process = exec.Command(program, "serve", save(t, filepath.Join(r.dir, "config.yml"), config, 0o600))
	if err := r.process.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.stop)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}}
	eventually(t, 20*time.Second, "docker-registry answers", func() bool {
		resp, err := client.Get(r.url() + "/v2/")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusUnauthorized || o.open
	})
	return r
}

func (r *debianRegistry) stop() { _ = r.process.Process.Kill(); _ = r.process.Wait() }

func (r *debianRegistry) url() string {
	if r.ca != "" {
		return "https://" + r.address
	}
	return "http://" + r.address
}

// blobs counts what it holds.
func (r *debianRegistry) blobs(t *testing.T) int {
	t.Helper()
	list, err := filepath.Glob(filepath.Join(r.dir, "data/docker/registry/v2/blobs/sha256/*/*"))
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// push writes an image and gives its name.
func (r *debianRegistry) push(t *testing.T, repo string, img v1.Image) string {
	t.Helper()
	ref, err := name.ParseReference(r.address+"/"+repo, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img, remote.WithAuth(&authn.Basic{Username: "me", Password: registryPassword})); err != nil {
		t.Fatal(err)
	}
	return ref.Name()
}

func loginFor(t *testing.T, address string) string {
	t.Helper()
	b, err := json.Marshal(map[string]any{"auths": map[string]any{address: map[string]string{
		"auth": base64.StdEncoding.EncodeToString([]byte("me:" + registryPassword))}}})
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func selfSigned(t *testing.T, dir string) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, &c, &c, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	block := func(file, kind string, der []byte) string {
		return save(t, filepath.Join(dir, file), string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})), 0o600)
	}
	return block("cert.pem", "CERTIFICATE", der), block("key.pem", "PRIVATE KEY", private)
}

// writeRegistryHosts makes the shared registry configuration know another one.
func writeRegistryHosts(t *testing.T, host, toml string) {
	t.Helper()
	dir := filepath.Join(here.hosts, host)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	save(t, filepath.Join(dir, "hosts.toml"), toml, 0o644)
}

// A mirror of Debian's making, with a certificate and a password of its own,
// fetches for the node what it has not. When it is down the registry itself is
// asked.
func TestPullThroughAMirror(t *testing.T) {
	needRoot(t)
	upstream := startDebianRegistry(t, debianOptions{open: true})
	mirror := startDebianRegistry(t, debianOptions{mirrorOf: upstream})
	writeRegistryHosts(t, upstream.address, fmt.Sprintf("server = %q\n[host.%q]\ncapabilities = [\"pull\", \"resolve\"]\nca = %q\n", upstream.url(), mirror.url(), mirror.ca))
	n := own(t, testnode.Options{Extra: fmt.Sprintf("version = 3\n[cloister.credentials]\ndocker_configs = [%q]\n", mirror.login)})
	image := func(tag string) string {
		return upstream.push(t, "team/app:"+tag, hostileImage(t, func(c *imageConfig) { c.Labels = map[string]string{"tag": tag} }))
	}
	if _, err := pull(t.Context(), n, image("1")); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "the mirror keeps what it fetched", func() bool { return mirror.blobs(t) > 0 })
	mirror.stop()
	ref := image("2")
	if _, err := pull(t.Context(), n, ref); err != nil {
		t.Errorf("with the mirror down: %v", err)
	}
	upstream.stop()
	_, err := pull(t.Context(), n, ref)
	wantError(t, err, codes.Unavailable, upstream.address)
	if log := n.LogTail(10000); strings.Contains(log, registryPassword) {
		t.Error("the log holds the password")
	}
}

const providerPlugin = `#!/bin/sh
echo '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Registry","cacheDuration":"0s",
"auth":{"%s":{"username":"me","password":"%s"}}}'
`

const providerConfig = `apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- name: plugin
  matchImages: ["%s"]
  defaultCacheDuration: "0s"
  apiVersion: credentialprovider.kubelet.k8s.io/v1
`

// Credentials are those of the files as they are now, wherever the
// configuration as it is now says that they are.
func TestCredentialsFollowTheirFiles(t *testing.T) {
	needRoot(t)
	registry := startDebianRegistry(t, debianOptions{})
	writeRegistryHosts(t, registry.address, fmt.Sprintf("server = %q\n", registry.url()))
	ref := registry.push(t, "team/app:1", here.base(t))
	dir := t.TempDir()
	login, provider := filepath.Join(dir, "config.json"), filepath.Join(dir, "provider.yaml")
	table := "[cloister.credentials]\ndocker_configs = [%q]\nprovider_config = %q\nprovider_bin_dir = %q\n"
	save(t, filepath.Join(dir, "bin/plugin"), fmt.Sprintf(providerPlugin, registry.address, registryPassword), 0o755)
	save(t, provider, fmt.Sprintf(providerConfig, "none.example"), 0o600)
	n := own(t, testnode.Options{Extra: "version = 4\n" + fmt.Sprintf(table, login, provider, filepath.Join(dir, "bin"))})
	works := func(when string, want bool) {
		t.Helper()
		_, err := pull(t.Context(), n, ref)
		if want && err != nil {
			t.Errorf("%s: %v", when, err)
		} else if !want {
			wantError(t, err, codes.Unauthenticated, "credentials")
		}
	}
	works("without credentials", false)
	save(t, login, loginFor(t, registry.address), 0o600)
	works("after the login", true)
	save(t, login, `{"auths":{}}`, 0o600)
	works("after the logout", false)
	save(t, provider, fmt.Sprintf(providerConfig, registry.address), 0o600)
	works("with a plugin", true)
	if err := os.Remove(filepath.Join(dir, "bin/plugin")); err != nil {
		t.Fatal(err)
	}
	save(t, provider, fmt.Sprintf(providerConfig, "none.example"), 0o600)
	works("with a plugin for another registry", false)
	reload(t, n, fmt.Sprintf(table, registry.login, provider, filepath.Join(dir, "bin")))
	works("with another file", true)
	reload(t, n, fmt.Sprintf("[plugins.\"io.containerd.cri.v1.images\".registry.configs.%q.auth]\nusername = \"me\"\npassword = %q\n", registry.address, registryPassword))
	works("with credentials of the configuration", true)
	reload(t, n, "")
	works("with none again", false)
	extra(t, n, fmt.Sprintf("[cloister.credentials]\ndocker_configs = [%q]\n", registry.login))
	eventually(t, 20*time.Second, "a changed file acts without a signal", func() bool {
		_, err := pull(t.Context(), n, ref)
		return err == nil
	})
}

const imageKeys = `version = 3
[plugins."io.containerd.cri.v1.images"]
snapshotter = "native"
[plugins."io.containerd.cri.v1.images".image_decryption]
key_model = ""
[plugins."io.containerd.cri.v1.images".registry]
config_path = %q
[plugins."io.containerd.cri.v1.images".runtime_platforms.placed]
snapshotter = "erofs"
[plugins."io.containerd.cri.v1.images".runtime_platforms.foreign]
platform = "linux/s390x"
[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "plain"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.plain]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.layered]
runtime_type = "io.containerd.runc.v2"
snapshotter = "overlayfs"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.placed]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.foreign]
runtime_type = "io.containerd.runc.v2"
`

// TestEffectsOfImageKeys shows what the keys of the images' table do.
func TestEffectsOfImageKeys(t *testing.T) {
	needRoot(t)
	if _, err := exec.LookPath("mkfs.erofs"); err != nil {
		t.Skip("mkfs.erofs is not installed; run test/setup registry")
	}
	registry := startDebianRegistry(t, debianOptions{})
	target, err := url.Parse("http://" + here.registry.Addr)
	if err != nil {
		t.Fatal(err)
	}
	var asked atomic.Int32
	proxy := httputil.NewSingleHostReverseProxy(target)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	hosts := t.TempDir()
	save(t, filepath.Join(hosts, "_default/hosts.toml"), fmt.Sprintf("[host.%q]\ncapabilities = [\"pull\", \"resolve\"]\n", server.URL), 0o644)
	save(t, filepath.Join(hosts, registry.address, "hosts.toml"), fmt.Sprintf("server = %q\n", registry.url()), 0o644)
	n := own(t, testnode.Options{Extra: fmt.Sprintf(imageKeys, hosts)})
	if asked.Load() == 0 {
		t.Error("config_path: images came from elsewhere")
	}
	t.Run("snapshotter", func(t *testing.T) { effectsOfSnapshotters(t, n) })
	t.Run("platform", func(t *testing.T) { effectOfPlatform(t, n, registry) })
	t.Run("key_model", func(t *testing.T) { effectOfKeyModel(t, n, registry) })
}

// effectOfPlatform: one tag stands for an image on each handler, also when a
// container or an image volume is made of it.
func effectOfPlatform(t *testing.T, n *testnode.Node, registry *debianRegistry) {
	var index v1.ImageIndex = empty.Index
	for _, arch := range []string{runtime.GOARCH, "s390x"} {
		img := hostileImage(t, nil, file{path: "/arch", data: []byte(arch)})
		cf, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		cf = cf.DeepCopy()
		cf.Architecture = arch
		if img, err = mutate.ConfigFile(img, cf); err != nil {
			t.Fatal(err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
	}
	ref, err := name.ParseReference(registry.address+"/two/platforms:1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(ref, index, remote.WithAuth(&authn.Basic{Username: "me", Password: registryPassword})); err != nil {
		t.Fatal(err)
	}
	ids := map[string]string{}
	for _, handler := range []string{"", "foreign"} {
		r, err := n.Image.PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref.Name(), RuntimeHandler: handler},
			Auth: &cri.AuthConfig{Username: "me", Password: registryPassword}})
		if err != nil {
			t.Fatal(err)
		}
		ids[handler] = r.ImageRef
	}
	if ids[""] == ids["foreign"] {
		t.Fatalf("both platforms have image %s", ids[""])
	}
	for _, handler := range []string{"", "foreign"} {
		p := runHandlerPod(t, n, handler)
		r, err := n.Runtime.CreateContainer(t.Context(), &cri.CreateContainerRequest{PodSandboxId: p.id, SandboxConfig: p.cfg, Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "c"}, Image: &cri.ImageSpec{Image: ref.Name()}, Command: []string{"/nothing"},
			Mounts: []*cri.Mount{{ContainerPath: "/volume", Image: &cri.ImageSpec{Image: ref.Name()}, Readonly: true}}}})
		if err != nil {
			t.Fatal(err)
		}
		status, err := n.Runtime.ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: r.ContainerId})
		if err != nil {
			t.Fatal(err)
		}
		if status.Status.ImageId != ids[handler] {
			t.Errorf("handler %q: a container of image %s, pulled was %s", handler, status.Status.ImageId, ids[handler])
		}
		want := map[string]string{"": runtime.GOARCH, "foreign": "s390x"}[handler]
		for _, file := range []string{"rootfs/arch", "images/0/arch"} {
			b, err := os.ReadFile(filepath.Join(n.State(), "containers", r.ContainerId, file))
			if err != nil || string(b) != want {
				t.Errorf("handler %q: %s says %q (%v), want %q", handler, file, b, err, want)
			}
		}
	}
}

func effectsOfSnapshotters(t *testing.T, n *testnode.Node) {
	unpacked := func(snapshotter string) int {
		list, err := filepath.Glob(filepath.Join(n.Root(), "images/snapshots", snapshotter, "snapshots/*"))
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	if unpacked("native") == 0 || unpacked("overlayfs") > 1 || unpacked("erofs") > 1 { // one is a mark that goes
		t.Errorf("snapshotter: native has %d, overlayfs %d, erofs %d", unpacked("native"), unpacked("overlayfs"), unpacked("erofs"))
	}
	spec := &cri.ImageSpec{Image: busybox, RuntimeHandler: "placed"}
	if _, err := n.Image.PullImage(t.Context(), &cri.PullImageRequest{Image: spec}); err != nil {
		t.Fatal(err)
	}
	if unpacked("erofs") == 0 {
		t.Error("runtime_platforms: a pull for the handler unpacked elsewhere")
	}
	for _, c := range []struct{ handler, kind, below string }{
		{"", "", ""}, {"layered", "overlay", "/snapshots/overlayfs/"}, {"placed", "overlay", "/snapshots/erofs/"},
	} {
		p := runHandlerPod(t, n, c.handler)
		ctr := p.idle(func(cfg *cri.ContainerConfig) {
			cfg.Mounts = []*cri.Mount{{ContainerPath: "/volume", Image: &cri.ImageSpec{Image: demo}, Readonly: true}}
		})
		root := strings.Fields(ctr.run("grep ' / ' /proc/mounts"))
		if len(root) < 4 || c.kind == "" && root[2] == "overlay" || c.kind != "" && (root[2] != c.kind || !strings.Contains(root[3], c.below)) {
			t.Errorf("handler %q: root file system %v", c.handler, root)
		}
		var st syscall.Statfs_t
		if err := syscall.Statfs(filepath.Join(n.State(), "containers", ctr.id, "images/0"), &st); err != nil {
			t.Fatal(err)
		}
		const erofs = 0xe0f5e1e2 // the image has one layer
		if (uint32(st.Type) == erofs) != (c.handler == "placed") {
			t.Errorf("handler %q: image volume on a file system of type %x", c.handler, st.Type)
		}
		ctr.stop(0)
	}
	for _, handler := range []string{"", "placed"} {
		r, err := n.Image.ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: busybox, RuntimeHandler: handler}})
		if err != nil || r.Image == nil {
			t.Errorf("ImageStatus for handler %q: %v %v", handler, r, err)
		}
	}
}

func effectOfKeyModel(t *testing.T, n *testnode.Node, registry *debianRegistry) {
	_, public := keyFolder(t)
	source := push(t, hostileImage(t, func(c *imageConfig) { c.Labels = map[string]string{"sealed": "no key"} }))
	ref := registry.address + "/team/busybox:sealed"
	tool(t, []string{"DOCKER_CONFIG=" + filepath.Dir(registry.login)}, "image", "encrypt", here.registry.Addr+strings.TrimPrefix(source, "test.example"), ref, "--recipient", "jwe:"+public)
	_, err := n.Image.PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}, Auth: &cri.AuthConfig{Username: "me", Password: registryPassword}})
	wantError(t, err, codes.PermissionDenied, "decrypts no images", "key_model")
}
