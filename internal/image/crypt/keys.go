package crypt

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/containers/ocicrypt/config/pkcs11config"
	"github.com/containers/ocicrypt/utils"
	"go.yaml.in/yaml/v3"
)

const (
	maxKeyFile = 1 << 20
	maxKeys    = 256
	maxWrapped = 64 // wrapped keys of one scheme that are tried
)

// Keys says where the keys of a node are. Files are read at each use, so that
// a key that was added or taken away counts at once.
type Keys struct {
	// Folder holds private keys for JWE, PKCS7 (with their certificates), PGP
	// and PKCS11, recognised by their content, also in folders below it. What
	// others than the owner can read is not used.
	Folder string
	// Providers is the file that OCICRYPT_KEYPROVIDER_CONFIG names elsewhere:
	// JSON that lists key providers to be run or to be called over gRPC.
	Providers string
}

// ring is what is there at one moment.
type ring struct {
	folder, providersFile string
	parameters            []map[string][][]byte // of ocicrypt, one private key in each
	providers             map[string]provider
	unused                []string // why files were passed over
}

func (k Keys) load() (*ring, error) {
	r := &ring{folder: k.Folder, providersFile: k.Providers}
	var err error
	if r.providers, err = readProviders(k.Providers); err != nil {
		return nil, err
	}
	return r, r.readFolder(k.Folder)
}

// readFolder looks at all files. A folder that is not there holds no key.
func (r *ring) readFolder(dir string) error {
	if dir == "" {
		return nil
	}
	var certs [][]byte
	var private []map[string][][]byte
	n := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			return r.trusted(path)
		}
		if n++; n > maxKeys {
			return fmt.Errorf("more than %d files: %w", maxKeys, errdefs.ErrResourceExhausted)
		}
		b, err := readKey(path)
		if err != nil {
			r.unused = append(r.unused, err.Error())
			return nil
		}
		if utils.IsCertificate(b) {
			certs = append(certs, b)
			return nil
		}
		p, why := keyParameters(b)
		if p == nil {
			if why != "" {
				r.unused = append(r.unused, fmt.Sprintf("%s is not used: %s", path, why))
			}
			return nil
		}
		if err := ownerOnly(path); err != nil {
			r.unused = append(r.unused, err.Error())
			return nil
		}
		private = append(private, p)
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("keys in %s: %w", dir, err)
	}
	for _, p := range private {
		if p["privkeys"] != nil && len(certs) > 0 {
			p["x509s"] = certs
		}
	}
	r.parameters = private
	return nil
}

// trusted refuses a folder into which others can put keys.
func (r *ring) trusted(dir string) error {
	fi, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if fi.Mode().Perm()&0o022 != 0 && fi.Mode()&os.ModeSticky == 0 {
		return fmt.Errorf("%s has mode %04o, others may put keys there; run chmod go-w %s: %w", dir, fi.Mode().Perm(), dir, errdefs.ErrFailedPrecondition)
	}
	return nil
}

func readKey(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("%s is not used: %w", path, err)
	}
	if !fi.Mode().IsRegular() || fi.Size() > maxKeyFile {
		return nil, fmt.Errorf("%s is not used: it is no regular file of at most %d bytes", path, maxKeyFile)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%s is not used: %w", path, err)
	}
	return b, nil
}

// ownerOnly refuses a private key that is not private.
func ownerOnly(path string) error {
	fi, err := os.Stat(path)
	if err != nil {
		return err
	}
	if fi.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s is not used: it has mode %04o and others can read it; run chmod 600 %s", path, fi.Mode().Perm(), path)
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s is not used: it belongs to user %d; run chown root %s", path, st.Uid, path)
	}
	return nil
}

// keyParameters recognises a private key. Other files are passed over in
// silence; one that looks like a key and cannot be used says why.
func keyParameters(b []byte) (p map[string][][]byte, why string) {
	if utils.IsPkcs11PrivateKey(b) {
		c, err := pkcs11config.GetUserPkcs11Config()
		if err != nil {
			return nil, "PKCS11: " + err.Error()
		}
		y, err := yaml.Marshal(c)
		if err != nil {
			return nil, "PKCS11: " + err.Error()
		}
		return map[string][][]byte{"pkcs11-yamls": {b}, "pkcs11-config": {y}}, ""
	}
	ok, err := utils.IsPrivateKey(b, nil)
	if utils.IsPasswordError(err) {
		return nil, "the key is protected by a password, which a daemon cannot ask for"
	}
	if ok {
		return map[string][][]byte{"privkeys": {b}, "privkeys-passwords": {nil}}, ""
	}
	if utils.IsGPGPrivateKeyRing(b) {
		return map[string][][]byte{"gpg-privatekeys": {b}}, ""
	}
	return nil, ""
}

func sorted(s []string) []string {
	slices.Sort(s)
	return s
}
