package image

import (
	"fmt"
	"os"
	"path/filepath"

	"cloister.dev/internal/image/creds"
)

// Hosts is what of Options may change while the store is open: how registries
// are reached, with whose credentials, and which keys open their images. A pull
// goes on with what it began with.
type Hosts struct {
	// ConfigPath is a list of hosts.toml trees, separated by ":". Empty means
	// /etc/containerd/certs.d:/etc/docker/certs.d. Files are read at each pull.
	ConfigPath string
	// Registries holds mirrors and certificates in their older form. It takes the
	// place of ConfigPath.
	Registries Registries
	// Headers are sent with every request to a configured registry host.
	Headers map[string][]string
	// Credentials are the node's own: for mirrors, and for registries when a pull
	// brings none; may be nil.
	Credentials creds.Source
	// Decryption lists the keys that open encrypted layers, the first that fits
	// wins. Without any, encrypted images are refused.
	Decryption []Decryption
}

// SetHosts replaces what Options said of registries. With an error nothing
// changes.
func (s *Store) SetHosts(h Hosts) error {
	if h.ConfigPath == "" {
		h.ConfigPath = defaultHostsPath
	}
	if !h.Registries.empty() {
		// In a folder of its own: a pull may be reading the one before.
		if err := os.MkdirAll(s.oldHosts(), 0o700); err != nil {
			return fmt.Errorf("registry mirrors: %w", err)
		}
		dir, err := os.MkdirTemp(s.oldHosts(), "")
		if err != nil {
			return fmt.Errorf("registry mirrors: %w", err)
		}
		if err := h.Registries.write(dir); err != nil {
			return fmt.Errorf("registry mirrors: %w", err)
		}
		h.ConfigPath = dir
	}
	s.hosts.Store(&h)
	return nil
}

// oldHosts is where mirrors of the older form are written as hosts.toml.
func (s *Store) oldHosts() string { return filepath.Join(s.o.Root, "hosts") }
