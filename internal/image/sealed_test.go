package image

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containers/ocicrypt/keywrap/keyprovider"
	keyproviderpb "github.com/containers/ocicrypt/utils/keyprovider"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"

	"cloister.dev/internal/image/crypt"
)

const plainSecret = "the plaintext that nobody may find on the disk"

// sealedRegistry is a docker-registry with an image that skopeo encrypted.
func sealedRegistry(t *testing.T, recipient ...string) (ref string) {
	t.Helper()
	d := serveDocker(t, dockerOptions{})
	img := imageOf(t, nil, fileLayer(t, "open", []byte("anybody may")), fileLayer(t, "secret", []byte(plainSecret)))
	from := "docker://" + newRegistry(t).push(t, "app", "1", img)
	args := []string{"copy", "--format", "oci", "--src-tls-verify=false", "--dest-tls-verify=false", from, "docker://" + d.host + "/app:plain"}
	skopeo(t, args...)
	args[5], args[6] = args[6], "docker://"+d.host+"/app:sealed" // the same configuration, so the same ID
	for _, r := range recipient {
		args = append(args, "--encryption-key", r)
	}
	skopeo(t, args...)
	return d.host + "/app"
}

func withKeys(folder string) func(*Options) {
	return func(o *Options) { o.Decryption = []Decryption{{Keys: crypt.Keys{Folder: folder}}} }
}

// holds says whether any file below a folder has the text in it.
func holds(t *testing.T, dir, text string) bool {
	t.Helper()
	found := false
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			b, err := os.ReadFile(path)
			found = found || err == nil && bytes.Contains(b, []byte(text))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestSkopeoEncrypted(t *testing.T) {
	dir, keys := t.TempDir(), t.TempDir()
	jwe, jwePub, _ := rsaPair(t, dir, "jwe")
	p7, _, p7Cert := rsaPair(t, dir, "p7")
	copyTo := func(files ...string) string {
		folder, err := os.MkdirTemp(keys, "")
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			writeFile(t, filepath.Join(folder, filepath.Base(f)), b, 0o600)
		}
		return folder
	}
	other, _, otherCert := rsaPair(t, dir, "other")
	for name, c := range map[string]struct {
		recipient, good, bad string
	}{
		"jwe":   {"jwe:" + jwePub, copyTo(jwe, other), copyTo(other)},
		"pkcs7": {"pkcs7:" + p7Cert, copyTo(p7, p7Cert, other), copyTo(other, otherCert)},
	} {
		t.Run(name, func(t *testing.T) {
			ref := sealedRegistry(t, c.recipient) + ":sealed"
			checkSealed(t, ref, c.good, c.bad)
		})
	}
}

// checkSealed pulls an encrypted image with good and with bad keys.
func checkSealed(t *testing.T, ref, good, bad string) {
	t.Helper()
	s := openStore(t, withKeys(bad))
	_, err := s.Pull(t.Context(), PullRequest{Ref: ref})
	if !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "no key of this node opens the image") {
		t.Errorf("with the wrong key: %v", err)
	}
	t.Log(err)
	if err := s.collectNow(t.Context()); err != nil {
		t.Error(err)
	}
	if holds(t, s.o.Root, plainSecret) {
		t.Error("the wrong key left plaintext on the disk")
	}
	s = openStore(t, withKeys(good))
	img := mustPull(t, s, ref)
	b, err := os.ReadFile(filepath.Join(mounted(t, s, img), "secret"))
	if err != nil || string(b) != plainSecret {
		t.Errorf("decrypted file: %q %v", b, err)
	}
}

func TestSkopeoDecryptsPGP(t *testing.T) {
	gpg := needProgram(t, "gpg")
	home, keys := t.TempDir(), t.TempDir()
	run := func(args ...string) []byte {
		t.Helper()
		cmd := exec.Command(gpg, append([]string{"--homedir", home, "--batch", "--pinentry-mode", "loopback", "--passphrase", ""}, args...)...)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("gpg %v: %v", args, err)
		}
		return out
	}
	if err := os.Chmod(home, 0o700); err != nil {
		t.Fatal(err)
	}
	run("--quick-generate-key", "Ada <ada@example.com>", "rsa2048", "encrypt,sign", "never")
	t.Cleanup(func() { _ = exec.Command("gpgconf", "--homedir", home, "--kill", "all").Run() })
	t.Setenv("GNUPGHOME", home)
	public := run("--export")
	writeFile(t, filepath.Join(home, "pubring.gpg"), public, 0o600) // where skopeo looks
	ring := filepath.Join(t.TempDir(), "ring")
	writeFile(t, ring, public, 0o600)
	writeFile(t, filepath.Join(keys, "ada.gpg"), run("--export-secret-keys"), 0o600)
	layer := strings.Repeat("layer ", 1000)
	r, err := crypt.ParseRecipients([]string{"pgp:" + ring + ":ada@example.com"}, "")
	if err != nil {
		t.Fatal(err)
	}
	sealed, annotations := seal(t, r, layer)
	if got := opened(t, crypt.Keys{Folder: keys}, annotations, sealed); got != layer {
		t.Errorf("decrypted to %d bytes", len(got))
	}
	checkSealed(t, sealedRegistry(t, "pgp:ada@example.com")+":sealed", keys, t.TempDir())
}

func seal(t *testing.T, r *crypt.Recipients, plain string) ([]byte, map[string]string) {
	t.Helper()
	sealed, annotate, err := r.Encrypt(strings.NewReader(plain), digest.FromString(plain))
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	if _, err := buf.ReadFrom(sealed); err != nil {
		t.Fatal(err)
	}
	annotations, err := annotate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return buf.Bytes(), annotations
}

func opened(t *testing.T, k crypt.Keys, annotations map[string]string, sealed []byte) string {
	t.Helper()
	key, err := k.Open(t.Context(), annotations)
	if err != nil {
		t.Fatal(err)
	}
	if s := fmt.Sprintf("%v %+v %#v", key, key, key); strings.Contains(s, "symkey") || strings.Contains(s, "[123") {
		t.Errorf("the key prints as %s", s)
	}
	plain, err := key.Decrypt(bytes.NewReader(sealed))
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	if _, err := buf.ReadFrom(plain); err != nil {
		t.Fatal(err)
	}
	return buf.String()
}

// A key that was taken away counts for what is on the node already.
func TestAuthorisedAgain(t *testing.T) {
	dir, keys := t.TempDir(), t.TempDir()
	private, public, _ := rsaPair(t, dir, "k")
	ref := sealedRegistry(t, "jwe:"+public)
	b, err := os.ReadFile(private)
	if err != nil {
		t.Fatal(err)
	}
	key := filepath.Join(keys, "k.pem")
	writeFile(t, key, b, 0o600)
	s := openStore(t, withKeys(keys))
	img := mustPull(t, s, ref+":sealed")
	if _, err := s.PrepareRootfs(t.Context(), "with-key", img, RootfsOptions{}); err != nil {
		t.Fatal(err)
	}
	writeFile(t, key, b, 0o644)
	_, err = s.Pull(t.Context(), PullRequest{Ref: ref + ":sealed"})
	if !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "chmod 600 "+key) {
		t.Errorf("with a key that others can read: %v", err)
	}
	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Pull(t.Context(), PullRequest{Ref: ref + ":sealed"}); !errdefs.IsPermissionDenied(err) {
		t.Errorf("pull without the key: %v", err)
	}
	if _, err := s.PrepareRootfs(t.Context(), "without-key", img, RootfsOptions{}); !errdefs.IsPermissionDenied(err) {
		t.Errorf("root file system without the key: %v", err)
	}
	// Who has the plain image needs no key.
	plain := mustPull(t, s, ref+":plain")
	if plain.ID != img.ID {
		t.Fatalf("images %s and %s", plain.ID, img.ID)
	}
	if _, err := s.PrepareRootfs(t.Context(), "plain", plain, RootfsOptions{}); err != nil {
		t.Error(err)
	}
}

// An image that only claims the layers of an encrypted one does not get them.
func TestClaimedLayers(t *testing.T) {
	dir, keys := t.TempDir(), t.TempDir()
	private, public, _ := rsaPair(t, dir, "k")
	ref := sealedRegistry(t, "jwe:"+public)
	b, err := os.ReadFile(private)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(keys, "k.pem"), b, 0o600)
	for _, discard := range []bool{false, true} {
		s := openStore(t, func(o *Options) { withKeys(keys)(o); o.DiscardUnpackedLayers = discard })
		img := mustPull(t, s, ref+":sealed")
		var cfg v1.ConfigFile
		if err := json.Unmarshal(img.ConfigJSON, &cfg); err != nil {
			t.Fatal(err)
		}
		reg := newRegistry(t)
		claim := imageOf(t, func(c *v1.ConfigFile) { c.RootFS = cfg.RootFS }, fileLayer(t, "a", []byte("a")), fileLayer(t, "b", []byte("b")))
		_, err = s.Pull(t.Context(), PullRequest{Ref: reg.push(t, "thief", "1", claim)})
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "does not hold what the image configuration promises") {
			t.Errorf("discard %v: %v", discard, err)
		}
		if n := len(s.List()); n != 1 {
			t.Errorf("%d images", n)
		}
	}
}

// Bytes that were changed under way are noticed, and not kept.
func TestTamperedLayer(t *testing.T) {
	r := recipientOf(t)
	sealed, annotations := seal(t, r.recipients, plainSecret)
	sealed[3] ^= 1
	key, err := r.keys.Open(t.Context(), annotations)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := key.Decrypt(bytes.NewReader(sealed))
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	if _, err := buf.ReadFrom(plain); !errdefs.IsDataLoss(err) {
		t.Errorf("tampered layer: %v", err)
	}
}

type recipient struct {
	recipients *crypt.Recipients
	keys       crypt.Keys
}

func recipientOf(t *testing.T) recipient {
	t.Helper()
	dir, keys := t.TempDir(), t.TempDir()
	private, public, _ := rsaPair(t, dir, "k")
	if err := os.Rename(private, filepath.Join(keys, "k")); err != nil {
		t.Fatal(err)
	}
	r, err := crypt.ParseRecipients([]string{"jwe:" + public}, "")
	if err != nil {
		t.Fatal(err)
	}
	return recipient{r, crypt.Keys{Folder: keys}}
}

// wrapping is a key provider: it wraps by reversing, and gives what it wrapped.
type wrapping struct{ calls int }

func (w *wrapping) handle(in []byte) ([]byte, error) {
	w.calls++
	var req keyprovider.KeyProviderKeyWrapProtocolInput
	if err := json.Unmarshal(in, &req); err != nil {
		return nil, err
	}
	var resp keyprovider.KeyProviderKeyWrapProtocolOutput
	turn := func(b []byte) []byte {
		out := make([]byte, len(b))
		for i, c := range b {
			out[len(b)-1-i] = c
		}
		return out
	}
	if req.Operation == keyprovider.OpKeyWrap {
		resp.KeyWrapResults.Annotation = turn(req.KeyWrapParams.OptsData)
	} else {
		if len(req.KeyUnwrapParams.Dc.Parameters) > 0 {
			return nil, fmt.Errorf("the node's private keys were sent")
		}
		resp.KeyUnwrapResults.OptsData = turn(req.KeyUnwrapParams.Annotation)
	}
	return json.Marshal(resp)
}

type wrappingService struct {
	keyproviderpb.UnimplementedKeyProviderServiceServer
	wrapping
}

func (w *wrappingService) call(in *keyproviderpb.KeyProviderKeyWrapProtocolInput) (*keyproviderpb.KeyProviderKeyWrapProtocolOutput, error) {
	b, err := w.handle(in.GetKeyProviderKeyWrapProtocolInput())
	return &keyproviderpb.KeyProviderKeyWrapProtocolOutput{KeyProviderKeyWrapProtocolOutput: b}, err
}

func (w *wrappingService) WrapKey(_ context.Context, in *keyproviderpb.KeyProviderKeyWrapProtocolInput) (*keyproviderpb.KeyProviderKeyWrapProtocolOutput, error) {
	return w.call(in)
}

func (w *wrappingService) UnWrapKey(_ context.Context, in *keyproviderpb.KeyProviderKeyWrapProtocolInput) (*keyproviderpb.KeyProviderKeyWrapProtocolOutput, error) {
	return w.call(in)
}

// TestKeyProvider is also the program of the command provider.
func TestKeyProvider(t *testing.T) {
	if os.Getenv("CLOISTER_TEST_KEY_PROVIDER") != "" {
		var in bytes.Buffer
		if _, err := in.ReadFrom(os.Stdin); err != nil {
			os.Exit(1)
		}
		out, err := new(wrapping).handle(in.Bytes())
		if err != nil {
			os.Exit(1)
		}
		_, _ = os.Stdout.Write(out)
		os.Exit(0)
	}
	dir := t.TempDir()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	service := new(wrappingService)
	server := grpc.NewServer()
	keyproviderpb.RegisterKeyProviderServiceServer(server, service)
	go func() { _ = server.Serve(l) }()
	t.Cleanup(server.Stop)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "providers.json")
	writeFile(t, file, fmt.Appendf(nil, `{"key-providers":{
		"cmd":{"cmd":{"path":"/usr/bin/env","args":["CLOISTER_TEST_KEY_PROVIDER=1",%q,"-test.run=^TestKeyProvider$"]}},
		"far":{"grpc":%q},
		"dumb":{"cmd":{"path":"/bin/echo","args":["secret-in-the-answer"]}},
		"slow":{"cmd":{"path":"/bin/sleep","args":["60"]}}}}`, self, l.Addr().String()), 0o600)
	for _, name := range []string{"cmd", "far"} {
		r, err := crypt.ParseRecipients([]string{"provider:" + name + ":parameter"}, file)
		if err != nil {
			t.Fatal(err)
		}
		sealed, annotations := seal(t, r, plainSecret)
		if got := opened(t, crypt.Keys{Providers: file}, annotations, sealed); got != plainSecret {
			t.Errorf("%s: decrypted to %q", name, got)
		}
		if _, err := (crypt.Keys{}).Open(t.Context(), annotations); !errdefs.IsPermissionDenied(err) {
			t.Errorf("%s without the provider: %v", name, err)
		}
		annotations["org.opencontainers.image.enc.keys.provider.slow"] = annotations["org.opencontainers.image.enc.keys.provider."+name]
		delete(annotations, "org.opencontainers.image.enc.keys.provider."+name)
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		if _, err := (crypt.Keys{Providers: file}).Open(ctx, annotations); err == nil || ctx.Err() == nil {
			t.Errorf("a key provider that hangs: %v", err)
		}
		cancel()
	}
	if service.calls < 2 {
		t.Errorf("the service was called %d times", service.calls)
	}
	_, err = crypt.Keys{Providers: file}.Open(t.Context(), map[string]string{"org.opencontainers.image.enc.keys.provider.dumb": "eA=="})
	if err == nil || strings.Contains(err.Error(), "secret-in") {
		t.Errorf("a key provider that talks: %v", err)
	}
}
