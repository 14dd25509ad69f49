package integration

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// An image that our own command encrypted into Debian's registry, behind basic
// authentication, runs on a node that has the key, with the configuration that
// containerd has for it; without the key it does not, though it is there.
func TestEncryptedImage(t *testing.T) {
	needRoot(t)
	registry := startDebianRegistry(t, debianOptions{})
	keys, public := keyFolder(t)
	ref := registry.address + "/team/busybox:sealed"
	// An image of its own: who has the plain form of one needs no key.
	source := push(t, hostileImage(t, func(c *imageConfig) { c.Labels = map[string]string{"sealed": "yes"} }))
	from := here.registry.Addr + strings.TrimPrefix(source, "test.example")
	tool(t, []string{"DOCKER_CONFIG=" + filepath.Dir(registry.login)}, "image", "encrypt", from, ref, "--recipient", "jwe:"+public)
	if out := tool(t, []string{"DOCKER_CONFIG=" + filepath.Dir(registry.login)}, "image", "inspect", ref, "--keys", keys); !strings.Contains(out, "jwe") || !strings.Contains(out, "yes") {
		t.Errorf("inspect says %s", out)
	}
	n := own(t, testnode.Options{Extra: fmt.Sprintf(`version = 3
[cloister.credentials]
docker_configs = [%q]

[stream_processors."io.containerd.ocicrypt.decoder.v1.tar.gzip"]
accepts = ["application/vnd.oci.image.layer.v1.tar+gzip+encrypted"]
returns = "application/vnd.oci.image.layer.v1.tar+gzip"
path = "ctd-decoder"
args = ["--decryption-keys-path", %q]
env = ["OCICRYPT_KEYPROVIDER_CONFIG=/nonexistent"]
`, registry.login, keys)})
	writeRegistryHosts(t, registry.address, fmt.Sprintf("server = %q\n", registry.url()))
	if _, err := pull(t.Context(), n, ref); err != nil {
		t.Fatal(err)
	}
	p := runPod(t, n)
	c := p.create(ref, []string{"sh", "-c", "echo decrypted"})
	c.start()
	c.ended()
	if log := c.log(); !strings.Contains(log, "decrypted") {
		t.Errorf("log %q", log)
	}
	key := filepath.Join(keys, "node.pem")
	if err := os.Rename(key, key+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(key+".away", 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := p.tryCreate(t.Context(), containerConfig(ref, []string{"true"}))
	wantError(t, err, codes.PermissionDenied, "no key of this node opens the image", "chmod 600")
	_, err = pull(t.Context(), n, ref)
	wantError(t, err, codes.PermissionDenied, "no key of this node opens the image")
	if b, err := os.ReadFile(filepath.Join(n.Dir, "daemon.log")); err != nil || bytes.Contains(b, []byte(registryPassword)) {
		t.Errorf("the log holds the password, or: %v", err)
	}
}

// Damage on the disk is found and repaired; unused images are listed and removed.
func TestContentRepairAndPrune(t *testing.T) {
	n := own(t, testnode.Options{})
	p := runPod(t, n)
	p.sh("sleep 1000")
	if out := cloister(t, n, "image", "prune", "--older-than", "0s", "--dry-run"); strings.Contains(out, "busybox") || !strings.Contains(out, "cloister.dev/demo:1") {
		t.Errorf("prune would remove %s", out)
	}
	blobs, err := filepath.Glob(filepath.Join(n.Root(), "images/content/blobs/sha256/*"))
	if err != nil || len(blobs) == 0 {
		t.Fatal(blobs, err)
	}
	for _, b := range blobs[:2] {
		if err := os.Chmod(b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(b, 1); err != nil {
			t.Fatal(err)
		}
	}
	if out := fsck(t, n); out != "" {
		t.Errorf("fsck without --content finds %s", out)
	}
	if out := fsck(t, n, "--content"); !strings.Contains(out, "data loss") {
		t.Errorf("fsck --content says %s", out)
	}
	fsck(t, n, "--content", "--repair")
	if out := fsck(t, n, "--content"); out != "" {
		t.Errorf("after the repair fsck finds %s", out)
	}
	cloister(t, n, "image", "prune", "--older-than", "0s")
	list, err := n.Image.ListImages(t.Context(), &cri.ListImagesRequest{})
	if err != nil || len(list.Images) != 1 || !strings.Contains(fmt.Sprint(list.Images[0].RepoTags), "busybox") {
		t.Errorf("images %v %v", list, err)
	}
}

// keyFolder makes a folder with a private key, and its public key elsewhere.
func keyFolder(t *testing.T) (folder, public string) {
	t.Helper()
	folder = t.TempDir()
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&k.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	public = filepath.Join(t.TempDir(), "node.pub")
	for file, block := range map[string]*pem.Block{
		filepath.Join(folder, "node.pem"): {Type: "PRIVATE KEY", Bytes: private}, public: {Type: "PUBLIC KEY", Bytes: der},
	} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return folder, public
}

// tool runs the command line without a daemon.
func tool(t *testing.T, env []string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(here.bin, "cloister"), args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("cloister %v: %v: %s", args, err, out)
	}
	return string(out)
}

// cloister runs the command line against a node.
func cloister(t *testing.T, n *testnode.Node, args ...string) string {
	t.Helper()
	return tool(t, []string{"CLOISTER_ADDRESS=" + n.Socket}, args...)
}
