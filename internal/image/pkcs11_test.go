//go:build cgo

package image

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"cloister.dev/internal/image/copy"
	"cloister.dev/internal/image/crypt"
)

// softToken makes a token of SoftHSM with the private key in file, and gives
// the description by which the key is used and the same with another PIN.
func softToken(t *testing.T, file string) (good, bad []byte) {
	t.Helper()
	util := needProgram(t, "softhsm2-util")
	const module = "/usr/lib/softhsm/libsofthsm2.so"
	dir := t.TempDir()
	tokens, conf := filepath.Join(dir, "tokens"), filepath.Join(dir, "softhsm2.conf")
	if err := os.Mkdir(tokens, 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, conf, []byte("directories.tokendir = "+tokens+"\nobjectstore.backend = file\nlog.level = ERROR\n"), 0o600)
	for _, args := range [][]string{
		{"--init-token", "--free", "--label", "node", "--pin", "1234", "--so-pin", "5678"},
		{"--import", file, "--token", "node", "--label", "images", "--id", "01", "--pin", "1234"},
	} {
		cmd := exec.Command(util, append(args, "--module", module)...)
		cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+conf)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("softhsm2-util %v: %v\n%s", args, err, out)
		}
	}
	describe := func(pin string) []byte {
		return fmt.Appendf(nil, "pkcs11:\n  uri: pkcs11:token=node;object=images;id=%%01?module-path=%s&pin-value=%s\nmodule:\n  env:\n    SOFTHSM2_CONF: %s\n", module, pin, conf)
	}
	return describe("1234"), describe("0000")
}

// A node's key may be in a hardware token, of which the folder of keys has a
// description only. Debian's skopeo is too old to encrypt for one.
func TestTokenOpensImage(t *testing.T) {
	private, public, _ := rsaPair(t, t.TempDir(), "token")
	description, badPIN := softToken(t, private)
	t.Setenv("OCICRYPT_CONFIG", "internal")   // any module of the usual folders
	t.Setenv("OCICRYPT_OAEP_HASHALG", "sha1") // SoftHSM knows no other
	good, bad := t.TempDir(), t.TempDir()
	writeFile(t, filepath.Join(good, "token.yaml"), description, 0o600)
	writeFile(t, filepath.Join(bad, "token.yaml"), badPIN, 0o600)

	layer := strings.Repeat("layer ", 1000)
	for _, recipient := range []string{public, filepath.Join(good, "token.yaml")} {
		r, err := crypt.ParseRecipients([]string{"pkcs11:" + recipient}, "")
		if err != nil {
			t.Fatal(err)
		}
		sealed, annotations := seal(t, r, layer)
		if _, err := (crypt.Keys{Folder: bad}).Open(t.Context(), annotations); err == nil || strings.Contains(err.Error(), "0000") {
			t.Errorf("with the wrong PIN: %v", err)
		}
		if got := opened(t, crypt.Keys{Folder: good}, annotations, sealed); got != layer {
			t.Errorf("encrypted for %s, decrypted to %d bytes", recipient, len(got))
		}
	}
	_, short, _ := rsaPairOf(t, 1024, t.TempDir(), "short")
	r, err := crypt.ParseRecipients([]string{"pkcs11:" + short}, "")
	if err != nil {
		t.Fatal(err)
	}
	sealed, annotate, err := r.Encrypt(strings.NewReader(layer), digest.FromString(layer))
	if err == nil {
		_, err = io.Copy(io.Discard, sealed)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := annotate(t.Context()); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "3072") {
		t.Errorf("a key that is too short: %v", err)
	}
	ref := sealedRegistry(t)
	convert(t, ref+":plain", ref+":sealed", "pkcs11:"+public)
	checkSealed(t, ref+":sealed", good, bad)
}

// convert does what "cloister image encrypt" does.
func convert(t *testing.T, from, to, recipient string) {
	t.Helper()
	r, err := crypt.ParseRecipients([]string{recipient}, "")
	if err != nil {
		t.Fatal(err)
	}
	source, err := copy.Parse(from, true)
	if err != nil {
		t.Fatal(err)
	}
	target, err := copy.Parse(to, true)
	if err != nil {
		t.Fatal(err)
	}
	img, err := copy.Load(t.Context(), source)
	if err == nil {
		img, err = copy.Convert(t.Context(), img, "", copy.Encrypt(r, nil, t.TempDir()))
	}
	if err == nil {
		err = copy.Save(t.Context(), target, img)
	}
	if err != nil {
		t.Fatal(err)
	}
}
