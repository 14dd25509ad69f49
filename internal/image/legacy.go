package image

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/image/creds"
)

// Registries are mirrors and certificates in the form that containerd had
// before hosts.toml. They are turned into that form when the store opens.
type Registries struct {
	// Mirrors are endpoints by registry host, tried in their order before the
	// registry itself. "*" stands for all hosts that are not named.
	Mirrors map[string][]string
	// TLS is by host, of mirrors and registries alike.
	TLS map[string]RegistryTLS
}

// RegistryTLS names the files of a host's certificates.
type RegistryTLS struct {
	SkipVerify    bool
	CA, Cert, Key string
}

func (r Registries) empty() bool { return len(r.Mirrors)+len(r.TLS) == 0 }

// write makes dir a tree of hosts.toml.
func (r Registries) write(dir string) error {
	hosts := make(map[string]bool)
	for h := range r.Mirrors {
		hosts[h] = true
	}
	for h := range r.TLS {
		hosts[h] = true
	}
	for host := range hosts {
		text, err := r.hostsFile(host)
		if err != nil {
			return err
		}
		name := host
		if host == "*" {
			name = "_default"
		}
		if name != filepath.Base(name) || strings.HasPrefix(name, ".") {
			return fmt.Errorf("registry host %s is not a host name: %w", quoted(host), errdefs.ErrInvalidArgument)
		}
		if err := os.MkdirAll(filepath.Join(dir, name), 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name, "hosts.toml"), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

func (r Registries) hostsFile(host string) (string, error) {
	var b strings.Builder
	if host != "*" && creds.Hub(host) != "docker.io" {
		fmt.Fprintf(&b, "server = %s\n", tomlString("https://"+host))
	}
	r.writeTLS(&b, host)
	endpoints := r.Mirrors[host]
	if host != "*" && len(endpoints) == 0 {
		endpoints = r.Mirrors["*"]
	}
	for _, e := range endpoints {
		if !strings.Contains(e, "://") {
			e = "https://" + e
		}
		u, err := url.Parse(e)
		if err != nil || u.Host == "" {
			return "", fmt.Errorf("mirror %s of registry %s is not a URL: %w", quoted(e), quoted(host), errdefs.ErrInvalidArgument)
		}
		if u.Host == host {
			continue // the registry itself comes last
		}
		fmt.Fprintf(&b, "[host.%s]\ncapabilities = [\"pull\", \"resolve\"]\n", tomlString(e))
		if strings.Trim(u.Path, "/") != "" {
			fmt.Fprintln(&b, "override_path = true")
		}
		r.writeTLS(&b, u.Host)
	}
	return b.String(), nil
}

func (r Registries) writeTLS(b *strings.Builder, host string) {
	t := r.TLS[host]
	if t.SkipVerify {
		fmt.Fprintln(b, "skip_verify = true")
	}
	if t.CA != "" {
		fmt.Fprintf(b, "ca = %s\n", tomlString(t.CA))
	}
	if t.Cert != "" {
		fmt.Fprintf(b, "client = [[%s, %s]]\n", tomlString(t.Cert), tomlString(cmp.Or(t.Key, t.Cert)))
	}
}

// tomlString writes a basic string: JSON's are a part of TOML's.
func tomlString(s string) string {
	b, err := json.Marshal(s)
	if err != nil {
		return `""`
	}
	return string(b)
}
