package config

import (
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"

	"github.com/pelletier/go-toml/v2"
)

// RuncOptions are the options of handlers of io.containerd.runc.v2: runc, crun
// and runsc.
type RuncOptions struct {
	// BinaryName is the OCI runtime: a path, or a name that is looked up in PATH.
	BinaryName string `toml:"BinaryName" since:"1.2"`
	// Root is the runtime's state folder.
	Root string `toml:"Root" since:"1.2"`
	// SystemdCgroup makes the runtime create cgroups through systemd.
	SystemdCgroup bool `toml:"SystemdCgroup" since:"1.2"`
	// NoNewKeyring keeps the session keyring of the caller.
	NoNewKeyring bool `toml:"NoNewKeyring" since:"1.2"`
	// NoPivotRoot changes the root without pivot_root, for nodes that run from a RAM disk.
	NoPivotRoot bool `toml:"NoPivotRoot" since:"1.2"`
	// ShimCgroup is the cgroup of the handler's external shims.
	ShimCgroup string `toml:"ShimCgroup" since:"1.2"`
	// IoUID owns the pipes of containers.
	IoUID uint32 `toml:"IoUid" since:"1.2"`
	// IoGID is the group of the pipes of containers.
	IoGID uint32 `toml:"IoGid" since:"1.2"`
	// CriuImagePath is where checkpoints are written and read.
	CriuImagePath string `toml:"CriuImagePath" since:"1.6"`
	// CriuWorkPath is where criu works and logs.
	CriuWorkPath string `toml:"CriuWorkPath" since:"1.6"`
}

// ShimOptions are the options of handlers with any other shim. Keys besides
// these make the text of ConfigBody, where there is no ConfigPath.
type ShimOptions struct {
	// TypeURL is the name by which the shim knows the type of its configuration.
	TypeURL string `toml:"TypeUrl" since:"1.3"`
	// ConfigPath is the shim's configuration file.
	ConfigPath string `toml:"ConfigPath" since:"1.3"`
	// ConfigBody is the text of a configuration; it stands in for ConfigPath.
	ConfigBody string `toml:"ConfigBody" since:"1.6"`
}

// optionTypes gives the typed options of a runtime_type: one line makes a type
// known to the validation, the reference and `cloister config explain`. What is
// not here has ShimOptions.
func optionTypes() map[string]reflect.Type {
	return map[string]reflect.Type{
		RuncType:    reflect.TypeFor[RuncOptions](),
		MachineType: reflect.TypeFor[MachineOptions](),
	}
}

// RuncOptions gives the options types. An empty runtime_type counts as runc's.
func (h Handler) RuncOptions() (RuncOptions, error) {
	var o RuncOptions
	return o, h.DecodeOptions(&o)
}

// ShimOptions gives the options types.
func (h Handler) ShimOptions() (ShimOptions, error) {
	var o ShimOptions
	known := map[string]any{}
	for _, name := range tagsOf(reflect.TypeFor[ShimOptions]()) {
		if v, ok := h.Options[name]; ok {
			known[name] = v
		}
	}
	if err := (Handler{Options: known}).DecodeOptions(&o); err != nil {
		return o, err
	}
	if o.ConfigPath == "" && o.ConfigBody == "" && len(h.Options) > len(known) {
		body, err := toml.Marshal(h.Options)
		if err != nil {
			return o, fmt.Errorf("write the options as ConfigBody: %w", err)
		}
		o.ConfigBody = string(body)
	}
	return o, nil
}

// IsRunc tells whether the handler's options are those of runc's shim.
func (h Handler) IsRunc() bool { return h.RuntimeType == "" || h.RuntimeType == RuncType }

// optionError is about one option of a handler.
type optionError struct{ name, msg string }

func (e *optionError) Error() string { return e.msg }

// DecodeOptions puts the options where target points, a struct whose fields
// have toml tags.
func (h Handler) DecodeOptions(target any) error {
	v := reflect.ValueOf(target)
	known := tagsOf(v.Type().Elem())
	for _, name := range slices.Sorted(maps.Keys(h.Options)) {
		err := assign(v, keyPath{name}, h.Options[name])
		var unknown *unknownError
		switch {
		case errors.As(err, &unknown):
			return &optionError{name, unknownOption(name, known)}
		case err != nil:
			return &optionError{name, fmt.Sprintf("the option %s %v", name, err)}
		}
	}
	return nil
}

// SystemdCgroup tells whether cgroups are made through systemd: the handlers of
// a node have one driver, and those that nobody configured have it too.
func (c Config) SystemdCgroup() bool {
	for _, h := range c.Runtime.Containerd.Runtimes {
		if o, err := h.RuncOptions(); err == nil && h.IsRunc() && o.SystemdCgroup {
			return true
		}
	}
	return c.Cloister.CgroupDriver == "systemd"
}

// checkOptions judges the options of a handler by its runtime_type.
func (h Handler) checkOptions() error {
	if h.IsMachine() {
		return h.checkMachine()
	}
	t, ok := optionTypes()[h.RuntimeType]
	switch {
	case h.IsMachine():
		return h.checkMachine()
	case ok:
		return h.DecodeOptions(reflect.New(t).Interface())
	case h.RuntimeType == "":
		_, err := h.RuncOptions()
		return err
	}
	_, err := h.ShimOptions()
	return err
}

func unknownOption(name string, known []string) string {
	if near := nearest(name, known); near != "" {
		return fmt.Sprintf("unknown option %s; did you mean %q?", name, near)
	}
	return fmt.Sprintf("unknown option %s; known there: %v", name, known)
}
