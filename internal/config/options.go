package config

import (
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
)

// RuncOptions are the options of a handler whose shim is runc's.
type RuncOptions struct {
	// BinaryName is the OCI runtime: a path, or a name that is looked up in PATH.
	BinaryName string
	// Root is the runtime's state folder.
	Root string
	// SystemdCgroup makes the runtime create cgroups through systemd.
	SystemdCgroup bool
	// NoNewKeyring keeps the session keyring of the caller.
	NoNewKeyring bool
}

// ShimOptions are the options of a handler with any other shim.
type ShimOptions struct {
	TypeURL    string
	ConfigPath string
	// ConfigBody is the text of a configuration; it stands in for ConfigPath.
	ConfigBody string
}

// RuncOptions gives the options types. An empty runtime_type counts as runc's.
func (h Handler) RuncOptions() (RuncOptions, error) {
	var o RuncOptions
	err := assign(h.Options, map[string]any{
		"BinaryName": &o.BinaryName, "Root": &o.Root, "SystemdCgroup": &o.SystemdCgroup,
		"NoNewKeyring": &o.NoNewKeyring,
	})
	return o, err
}

// ShimOptions gives the options types.
func (h Handler) ShimOptions() (ShimOptions, error) {
	var o ShimOptions
	err := assign(h.Options, map[string]any{
		"TypeUrl": &o.TypeURL, "ConfigPath": &o.ConfigPath, "ConfigBody": &o.ConfigBody,
	})
	return o, err
}

// IsRunc tells whether the handler's options are those of runc's shim.
func (h Handler) IsRunc() bool { return h.RuntimeType == "" || h.RuntimeType == RuncType }

// optionError is about one option of a handler.
type optionError struct{ name, msg string }

func (e *optionError) Error() string { return e.msg }

// assign puts the values of an options table where targets points.
func assign(options map[string]any, targets map[string]any) error {
	known := slices.Sorted(maps.Keys(targets))
	for _, name := range slices.Sorted(maps.Keys(options)) {
		target, ok := targets[name]
		if !ok {
			return &optionError{name, unknownOption(name, known)}
		}
		if !set(target, options[name]) {
			return &optionError{name, fmt.Sprintf("the option %s is a %s, not %T %v",
				name, reflect.TypeOf(target).Elem(), options[name], options[name])}
		}
	}
	return nil
}

func unknownOption(name string, known []string) string {
	if reason, ok := laterOptions()[name]; ok {
		return fmt.Sprintf("the option %s is not supported yet (%s); remove it", name, reason)
	}
	if near := nearest(name, known); near != "" {
		return fmt.Sprintf("unknown option %s; did you mean %q?", name, near)
	}
	return fmt.Sprintf("unknown option %s; known there: %v", name, known)
}

func set(target, value any) bool {
	switch t := target.(type) {
	case *string:
		v, ok := value.(string)
		*t = v
		return ok
	case *bool:
		v, ok := value.(bool)
		*t = v
		return ok
	case *uint32:
		v, ok := value.(int64)
		*t = uint32(v)
		return ok && v >= 0 && v <= math.MaxUint32
	case *[]string:
		return setStrings(t, value)
	}
	return false
}

func setStrings(to *[]string, value any) bool {
	list, ok := value.([]any)
	if !ok {
		return false
	}
	var all []string
	for _, e := range list {
		s, ok := e.(string)
		if !ok {
			return false
		}
		all = append(all, s)
	}
	*to = all
	return true
}
