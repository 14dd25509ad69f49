// Package config reads Cloister's configuration: containerd's version 3 file
// with a table of our own beside it. It promises that every key is either
// honoured or refused with file, line and remedy, and that a file which is
// absent means the defaults.
//
// It does nothing with what it read: the structs are handed down as they are,
// and only this package and cmd know that TOML was involved.
package config

import (
	"path/filepath"
	"strings"
	"time"
)

// Config is the effective configuration: defaults, then the main file, then
// its drop-ins in order, the later value winning.
type Config struct {
	// Root holds what outlives a reboot: content, snapshots, databases.
	Root string
	// State holds what a reboot may take: sockets, bundles, pinned namespaces.
	State string
	// Address is the path of the CRI socket.
	Address string
	// LogLevel is one of debug, info, warn, error.
	LogLevel string
	// LogFormat is text or json.
	LogFormat string

	// LogTraceID adds the ids of traces to log lines.
	LogTraceID bool
	// Temp is for temporary files; empty is a folder below Root.
	Temp string
	// OOMScore is the daemon's own oom_score_adj; 0 leaves it.
	OOMScore int

	Images    Images
	Runtime   Runtime
	Streaming Streaming
	Plugins   Plugins
	// StreamProcessors decrypt layers, by name.
	StreamProcessors map[string]StreamProcessor
	// ProxyPlugins are snapshotters that other programs serve, by name.
	ProxyPlugins map[string]ProxyPlugin
	// Timeouts are containerd's, by name.
	Timeouts map[string]Duration
	// RequiredPlugins and DisabledPlugins are ids of containerd's plugins.
	RequiredPlugins []string
	DisabledPlugins []string
	Cgroup          Cgroup
	Cloister        Cloister
	// DevicePlugin is [device_plugin].
	DevicePlugin DevicePlugin

	// Warnings are about keys of the files that are old, or have no effect.
	Warnings []Warning
	// Files are the files that were read, in order; empty when none was there.
	Files []string
	// Folders are where those files are, and where others are looked for.
	Folders []string
	// Ephemeral comes from the command line: a clean stop also ends the resident
	// shims in which nothing runs.
	Ephemeral bool
}

// SetState moves the state folder, and with it the socket when the socket lay
// at its default place in the old one.
func (c *Config) SetState(dir string) {
	if c.Address == socketIn(c.State) {
		c.Address = socketIn(dir)
	}
	c.State = dir
}

// SetAddress moves the socket; unix:///PATH is taken too.
func (c *Config) SetAddress(address string) { c.Address = strings.TrimPrefix(address, "unix://") }

func socketIn(state string) string { return filepath.Join(state, "cloister.sock") }

// Duration is a time.Duration that is written "5m0s" in the file.
type Duration struct{ time.Duration }

// UnmarshalText reads the form of time.ParseDuration; "" is zero.
func (d *Duration) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		d.Duration = 0
		return nil
	}
	v, err := time.ParseDuration(string(b))
	d.Duration = v
	return err
}

// MarshalText writes the form of time.Duration.String.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// Cgroup is [cgroup].
type Cgroup struct {
	// Path is the daemon's own cgroup.
	Path string `toml:"path" since:"1.0"`
}

// Secret is a value that is in no log, error or dump.
type Secret struct{ text string }

const redacted = "REDACTED"

// Reveal gives the value to whoever has to use it.
func (s Secret) Reveal() string { return s.text }

// UnmarshalText takes the value as it is.
func (s *Secret) UnmarshalText(b []byte) error {
	s.text = string(b)
	return nil
}

// MarshalText hides the value, also from JSON and slog.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// String tells only whether there is a value.
func (s Secret) String() string {
	if s.text == "" {
		return ""
	}
	return redacted
}

// GoString hides the value from %#v.
func (s Secret) GoString() string { return s.String() }
