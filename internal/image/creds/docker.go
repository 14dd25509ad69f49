package creds

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
)

const maxConfig = 4 << 20

// Docker is the path of a config.json as "docker login" and "podman login"
// write it. A file that is not there knows no host.
type Docker string

type dockerConfig struct {
	Auths       map[string]Auth   `json:"auths"`
	CredHelpers map[string]string `json:"credHelpers"`
	CredsStore  string            `json:"credsStore"`
}

// Find implements Source: the helper of the host, then the file's own entry,
// then the store of all hosts.
func (d Docker) Find(ctx context.Context, host, repository string) (Credential, bool, error) {
	var c dockerConfig
	b, err := readPrivate(string(d))
	if errors.Is(err, fs.ErrNotExist) {
		return Credential{}, false, nil
	}
	if err != nil {
		return Credential{}, false, err
	}
	if json.Unmarshal(b, &c) != nil { // the error would quote the file
		return Credential{}, false, fmt.Errorf("%s is not valid JSON of Docker's config.json: %w", d, errdefs.ErrFailedPrecondition)
	}
	for key, helper := range c.CredHelpers {
		if hostOf(key) == host {
			return askHelper(ctx, helper, key)
		}
	}
	if a, ok := longest(c.Auths, host, repository); ok {
		cred, found, err := a.credential()
		if err != nil {
			return cred, false, fmt.Errorf("%s, entry of %s: %w", d, host, err)
		}
		if found {
			return cred, true, nil
		}
	}
	if c.CredsStore != "" {
		server := host
		if host == "docker.io" {
			server = "https://index.docker.io/v1/"
		}
		return askHelper(ctx, c.CredsStore, server)
	}
	return Credential{}, false, nil
}

// longest finds the entry of a host, or of the longest part of a repository's
// path that has one of its own.
func longest(auths map[string]Auth, host, repository string) (best Auth, found bool) {
	length := -1
	for key, a := range auths {
		if hostOf(key) != host {
			continue
		}
		if _, rest, ok := strings.Cut(key, "://"); ok {
			key = rest
		}
		_, path, _ := strings.Cut(strings.Trim(key, "/"), "/")
		if path == "v1" || path == "v2" {
			path = "" // of an API, not of a repository
		}
		if path != "" && path != repository && !strings.HasPrefix(repository, path+"/") {
			continue
		}
		if len(path) > length {
			best, found, length = a, true, len(path)
		}
	}
	return best, found
}

// askHelper runs docker-credential-NAME, which answers for one server.
func askHelper(ctx context.Context, name, server string) (Credential, bool, error) {
	if name == "" || name != filepath.Base(name) {
		return Credential{}, false, fmt.Errorf("credential helper %q is not a name: %w", name, errdefs.ErrFailedPrecondition)
	}
	program := "docker-credential-" + name
	out, complaint, err := run(ctx, program, []string{"get"}, nil, []byte(server))
	if err != nil {
		if strings.Contains(complaint, "credentials not found") {
			return Credential{}, false, nil // the protocol has nothing but this sentence
		}
		return Credential{}, false, fmt.Errorf("credential helper %s for %s: %w", program, server, err)
	}
	var answer struct{ Username, Secret string }
	if json.Unmarshal(out, &answer) != nil || answer.Secret == "" {
		return Credential{}, false, fmt.Errorf("credential helper %s for %s gave no credentials: %w", program, server, errdefs.ErrFailedPrecondition)
	}
	if answer.Username == "<token>" {
		answer.Username = ""
	}
	return Credential{answer.Username, answer.Secret}, true, nil
}

// readPrivate reads a file with secrets and refuses one that everybody reads.
func readPrivate(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Size() > maxConfig {
		return nil, fmt.Errorf("%s is no regular file of at most %d bytes: %w", path, maxConfig, errdefs.ErrFailedPrecondition)
	}
	if fi.Mode().Perm()&0o007 != 0 {
		return nil, fmt.Errorf("%s has mode %04o and everybody can read the secrets in it; run chmod 600 %s: %w", path, fi.Mode().Perm(), path, errdefs.ErrFailedPrecondition)
	}
	var buf bytes.Buffer
	_, err = buf.ReadFrom(f)
	return buf.Bytes(), err
}
