// Package creds finds the credentials that a node itself has for a registry:
// those of the configuration file, of Docker's config.json with its helpers,
// and of kubelet's credential provider plugins. They are asked per host, so
// that a mirror gets its own and never those of the registry that it mirrors.
//
// It promises that no secret appears in an error or a log line, that programs
// get a bounded time, and that files are read when they are needed, so that a
// new secret counts at once. It knows nothing of registries' protocols.
package creds

import (
	"context"
	"encoding/base64"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// programTime bounds what a helper or a plugin may take.
const programTime = time.Minute

// Credential is what is shown to a registry. Without a user the secret is an
// identity token. It prints as nothing.
type Credential struct{ User, Secret string }

// String hides the secret.
func (c Credential) String() string { return "credential of " + c.User }

// GoString hides the secret from %#v.
func (c Credential) GoString() string { return c.String() }

// Source is one place where credentials are. Find answers false for a host
// that it does not know.
type Source interface {
	// Find looks for a repository, such as "library/busybox", of a registry host
	// with its port. Docker Hub is "docker.io" whatever its servers are called.
	Find(ctx context.Context, host, repository string) (Credential, bool, error)
}

// Sources asks one after the other.
type Sources []Source

// Find implements Source. A source that fails does not hide the next; its
// error counts when none knows the host.
func (s Sources) Find(ctx context.Context, host, repository string) (Credential, bool, error) {
	host = Hub(host)
	var first error
	for _, source := range s {
		c, ok, err := source.Find(ctx, host, repository)
		if err != nil {
			if first == nil {
				first = err
			}
			continue
		}
		if ok {
			return c, true, nil
		}
	}
	return Credential{}, false, first
}

// Hub gives Docker Hub's several names one.
func Hub(host string) string {
	switch host = strings.ToLower(host); host {
	case "index.docker.io", "registry-1.docker.io", "registry.docker.io":
		return "docker.io"
	}
	return host
}

// Auth has the fields of an entry of Docker's config.json, which are those of
// registry.configs.HOST.auth in containerd's file.
type Auth struct{ Username, Password, Auth, IdentityToken string }

// credential gives what is set first: the identity token, the user, "auth".
func (a Auth) credential() (Credential, bool, error) {
	switch {
	case a.IdentityToken != "":
		return Credential{Secret: a.IdentityToken}, true, nil
	case a.Username != "":
		return Credential{a.Username, a.Password}, true, nil
	case a.Auth == "":
		return Credential{}, false, nil
	}
	b, err := base64.StdEncoding.DecodeString(a.Auth)
	user, secret, ok := strings.Cut(strings.Trim(string(b), "\x00"), ":")
	if err != nil || !ok {
		return Credential{}, false, fmt.Errorf("field auth is not the base64 form of user:password: %w", errdefs.ErrInvalidArgument)
	}
	return Credential{user, secret}, true, nil
}

// Static are the credentials of the configuration file, by host.
type Static map[string]Auth

// Find implements Source.
func (s Static) Find(_ context.Context, host, _ string) (Credential, bool, error) {
	for key, a := range s {
		if hostOf(key) != host {
			continue
		}
		c, ok, err := a.credential()
		if err != nil {
			return c, false, fmt.Errorf("credentials of the configuration for %s: %w", host, err)
		}
		return c, ok, nil
	}
	return Credential{}, false, nil
}

// hostOf is the host in the key of a configuration, which may be a URL.
func hostOf(key string) string {
	if _, rest, ok := strings.Cut(key, "://"); ok {
		key = rest
	}
	host, _, _ := strings.Cut(key, "/")
	return Hub(host)
}
