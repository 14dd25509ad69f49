package config

import (
	"encoding"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"
)

// document is the shape of a file in its newest form, version 4. Its pointers
// lead into a Config, so that a file is laid over what is there.
type document struct {
	// Version is the form of the file: 1 to 4 as in containerd, 4 being the
	// newest. A file without it is of version 1; a drop-in has that of the file it
	// belongs to.
	Version int `toml:"version" since:"1.0"`
	// Root is the folder for what outlives a reboot: content, snapshots, databases.
	Root *string `toml:"root" since:"1.0"`
	// State is the folder for what a reboot may take: sockets, bundles, pinned namespaces.
	State *string `toml:"state" since:"1.0"`
	// Temp is the folder for temporary files; empty is one below root.
	Temp *string `toml:"temp" since:"1.6"`
	// OOMScore is the daemon's own oom_score_adj; 0 leaves it.
	OOMScore *int `toml:"oom_score" since:"1.0"`
	// RequiredPlugins are ids of plugins without which containerd does not start.
	RequiredPlugins *[]string `toml:"required_plugins" since:"1.3"`
	// DisabledPlugins are ids of plugins that containerd does without.
	DisabledPlugins *[]string `toml:"disabled_plugins" since:"1.0"`
	// Imports are files that are read after this one; patterns are expanded,
	// relative paths start at this file's folder.
	Imports []string `toml:"imports" since:"1.3"`

	Debug  debugTable `toml:"debug" since:"1.0"`
	Cgroup *Cgroup    `toml:"cgroup" since:"1.0"`
	// Timeouts bound the calls of containerd to its shims, by name.
	Timeouts *map[string]Duration `toml:"timeouts" since:"1.3"`

	Plugins pluginTables `toml:"plugins" since:"1.0"`
	// StreamProcessors decrypt layers, by name.
	StreamProcessors *map[string]StreamProcessor `toml:"stream_processors" since:"1.3"`
	// ProxyPlugins are snapshotters that other programs serve, by name.
	ProxyPlugins *map[string]ProxyPlugin `toml:"proxy_plugins" since:"1.1"`

	Cloister     *Cloister     `toml:"cloister"`
	DevicePlugin *DevicePlugin `toml:"device_plugin"`
}

// debugTable is [debug]: the log.
type debugTable struct {
	// Level is one of debug, info, warn, error.
	Level *string `toml:"level" since:"1.0"`
	// Format is text or json.
	Format *string `toml:"format" since:"1.3"`
	// LogTraceID adds the ids of traces to log lines.
	LogTraceID *bool `toml:"log_trace_id" since:"2.2"`
}

type pluginTables struct {
	Images    *Images    `toml:"io.containerd.cri.v1.images" since:"2.0"`
	Runtime   *Runtime   `toml:"io.containerd.cri.v1.runtime" since:"2.0"`
	Streaming *Streaming `toml:"io.containerd.grpc.v1.cri" since:"1.0"`
	*Plugins
}

func documentOf(c *Config) document {
	return document{
		Version: newestVersion, Root: &c.Root, State: &c.State, Temp: &c.Temp, OOMScore: &c.OOMScore,
		RequiredPlugins: &c.RequiredPlugins, DisabledPlugins: &c.DisabledPlugins,
		Debug:  debugTable{&c.LogLevel, &c.LogFormat, &c.LogTraceID},
		Cgroup: &c.Cgroup, Timeouts: &c.Timeouts,
		Plugins:          pluginTables{&c.Images, &c.Runtime, &c.Streaming, &c.Plugins},
		StreamProcessors: &c.StreamProcessors, ProxyPlugins: &c.ProxyPlugins, Cloister: &c.Cloister, DevicePlugin: &c.DevicePlugin,
	}
}

func shape() reflect.Type { return reflect.TypeFor[document]() }

// isLeaf tells values from tables among structs.
func isLeaf(t reflect.Type) bool {
	return t.Kind() != reflect.Struct || reflect.PointerTo(t).Implements(reflect.TypeFor[encoding.TextUnmarshaler]())
}

func deref(t reflect.Type) reflect.Type {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	return t
}

// fields are the keys of a table, those of embedded tables among them.
func fields(t reflect.Type) []reflect.StructField {
	var all []reflect.StructField
	for _, f := range reflect.VisibleFields(t) {
		if f.Tag.Get("toml") != "" {
			all = append(all, f)
		}
	}
	return all
}

func fieldOf(t reflect.Type, name string) (reflect.StructField, bool) {
	all := fields(t)
	i := slices.IndexFunc(all, func(f reflect.StructField) bool { return f.Tag.Get("toml") == name })
	if i < 0 {
		return reflect.StructField{}, false
	}
	return all[i], true
}

// lookup gives the type of what is at a path. Without a hit it tells how many
// parts of the path were known.
func lookup(path keyPath) (t reflect.Type, known int, ok bool) {
	t = shape()
	for i, part := range path {
		switch {
		case t.Kind() == reflect.Map:
			t = deref(t.Elem())
		case t.Kind() == reflect.Interface:
			return t, len(path), true
		case isLeaf(t):
			return t, len(path), true // a table in place of a value: assign says so
		default:
			f, found := fieldOf(t, part)
			if !found {
				return nil, i, false
			}
			t = deref(f.Type)
		}
	}
	return t, len(path), true
}

// assign puts a value where path leads from v. What is on the way is made.
func assign(v reflect.Value, path keyPath, value any) error {
	if v.Kind() == reflect.Pointer {
		return assign(v.Elem(), path, value)
	}
	if len(path) == 0 {
		return assignValue(v, value)
	}
	switch {
	case v.Kind() == reflect.Map:
		elem := reflect.New(v.Type().Elem()).Elem()
		if old := v.MapIndex(reflect.ValueOf(path[0])); old.IsValid() {
			elem.Set(old)
		}
		if err := assign(elem, path[1:], value); err != nil {
			return err
		}
		if v.IsNil() {
			v.Set(reflect.MakeMap(v.Type()))
		}
		v.SetMapIndex(reflect.ValueOf(path[0]), elem)
		return nil
	case v.Kind() == reflect.Interface:
		m, _ := v.Interface().(map[string]any)
		if m == nil {
			m = map[string]any{}
		}
		if err := assign(reflect.ValueOf(&m).Elem(), path, value); err != nil {
			return err
		}
		v.Set(reflect.ValueOf(m))
		return nil
	case isLeaf(v.Type()):
		return &typeError{kind(v.Type()), "a table"}
	}
	f, ok := fieldOf(v.Type(), path[0])
	if !ok {
		return &unknownError{path[0], v.Type()}
	}
	return assign(v.FieldByIndex(f.Index), path[1:], value)
}

// typeError says that a value is not of the key's type.
type typeError struct{ want, got string }

func (e *typeError) Error() string { return "is " + article(e.want) + ", not " + e.got }

func article(noun string) string {
	if strings.ContainsRune("aeiou", rune(noun[0])) {
		return "an " + noun
	}
	return "a " + noun
}

// unknownError says that a table has no such key.
type unknownError struct {
	name string
	in   reflect.Type
}

func (e *unknownError) Error() string { return fmt.Sprintf("%q is unknown", e.name) }

func assignValue(v reflect.Value, value any) error {
	if u, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		return assignText(v, u, value)
	}
	wrong := &typeError{kind(v.Type()), describe(value)}
	switch v.Kind() {
	case reflect.Interface:
		v.Set(reflect.ValueOf(value))
		return nil
	case reflect.Slice:
		return assignList(v, value)
	case reflect.Struct, reflect.Map:
		m, ok := value.(map[string]any)
		if !ok {
			return wrong
		}
		for name, child := range m {
			if err := assign(v, keyPath{name}, child); err != nil {
				return err
			}
		}
		return nil
	}
	ok := false
	switch x := value.(type) {
	case string:
		if ok = v.Kind() == reflect.String; ok {
			v.SetString(x)
		}
	case bool:
		if ok = v.Kind() == reflect.Bool; ok {
			v.SetBool(x)
		}
	case int64:
		return assignNumber(v, x)
	case float64:
		if ok = v.CanFloat(); ok {
			v.SetFloat(x)
		}
	}
	if !ok {
		return wrong
	}
	return nil
}

func assignText(v reflect.Value, u encoding.TextUnmarshaler, value any) error {
	text, ok := value.(string)
	if _, secret := u.(*Secret); !ok && secret {
		return &typeError{kind(v.Type()), "what is there"}
	}
	if !ok {
		return &typeError{kind(v.Type()), describe(value)}
	}
	if err := u.UnmarshalText([]byte(text)); err != nil {
		return &typeError{kind(v.Type()), fmt.Sprintf("%q", text)}
	}
	return nil
}

func assignNumber(v reflect.Value, x int64) error {
	wrong := &typeError{kind(v.Type()), fmt.Sprint(x)}
	switch {
	case v.CanInt() && !v.OverflowInt(x):
		v.SetInt(x)
	case v.CanUint() && x >= 0 && !v.OverflowUint(uint64(x)):
		v.SetUint(uint64(x))
	case v.CanFloat():
		v.SetFloat(float64(x))
	default:
		return wrong
	}
	return nil
}

func assignList(v reflect.Value, value any) error {
	list, ok := value.([]any)
	if !ok {
		return &typeError{kind(v.Type()), describe(value)}
	}
	if len(list) == 0 {
		v.SetZero() // an empty list and none are one
		return nil
	}
	out := reflect.MakeSlice(v.Type(), len(list), len(list))
	for i, child := range list {
		if err := assignValue(out.Index(i), child); err != nil {
			return fmt.Errorf("element %d: %w", i, err)
		}
	}
	v.Set(out)
	return nil
}

// describe names the type of what stands in a file, with short values.
func describe(value any) string {
	switch x := value.(type) {
	case string:
		return "the string " + fmt.Sprintf("%.80q", x)
	case bool, int64, float64:
		return fmt.Sprint(x)
	case []any:
		return "a list"
	case map[string]any, nil:
		return "a table"
	case time.Time:
		return "a time"
	}
	return fmt.Sprintf("%.80v", value)
}

// kind names the type of a key.
func kind(t reflect.Type) string {
	switch t {
	case reflect.TypeFor[Duration]():
		return `duration such as "5m0s"`
	case reflect.TypeFor[Secret]():
		return "string"
	}
	switch t.Kind() {
	case reflect.Bool:
		return "boolean"
	case reflect.Int, reflect.Uint32:
		return "integer"
	case reflect.Float64:
		return "number"
	case reflect.Slice:
		return "list of " + kind(t.Elem()) + "s"
	case reflect.Map, reflect.Struct:
		return "table"
	}
	return "string"
}
