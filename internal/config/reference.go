package config

import (
	"cmp"
	"embed"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"reflect"
	"slices"
	"strings"
	"sync"
)

// The comments of the structs are the text of the reference: one source for
// the program and for docs/configuration.md.
//
//go:embed *.go
var sources embed.FS

// Key is what there is to know of one key.
type Key struct {
	// Path is the key with its tables; NAME is a name of one's own choice.
	Path []string `json:"path"`
	// Key is the path as a file writes it.
	Key     string `json:"key"`
	Type    string `json:"type"`
	Default string `json:"default"` // as a file writes it, "" for none
	Meaning string `json:"meaning"`
	Since   string `json:"since"`
	// Idle is why the key changes nothing here, if so.
	Idle string `json:"idle,omitempty"`
	// Live keys take effect without a restart of the daemon.
	Live bool `json:"live"`
	// OptionsOf is the runtime_type whose option this is; Path is the option then.
	OptionsOf string `json:"optionsOf,omitempty"`
}

// otherTypes stands in Key.OptionsOf for all that have no options of their own.
const otherTypes = "any other runtime_type"

// Reference lists all keys in the order of their tables, the values of a table
// before the tables in it; last come the options of handlers.
func Reference() ([]Key, error) {
	docs, err := fieldDocs()
	if err != nil {
		return nil, err
	}
	d := Default()
	d.Address = socketIn(d.State)
	var all []Key
	walkValues(reflect.ValueOf(documentOf(&d)), nil, true, func(e element) {
		all = append(all, e.key(docs))
	})
	options := optionTypes()
	for _, kind := range append(slices.Sorted(mapKeys(options)), otherTypes) {
		t, ok := options[kind]
		if !ok {
			t = reflect.TypeFor[ShimOptions]()
		}
		walkValues(reflect.New(t).Elem(), nil, true, func(e element) {
			k := e.key(docs)
			k.OptionsOf, k.Live, k.Idle = kind, true, ""
			all = append(all, k)
		})
	}
	return all, nil
}

func mapKeys[V any](m map[string]V) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// element is a key with its value.
type element struct {
	path  keyPath
	owner reflect.Type // the struct that has it
	field reflect.StructField
	value reflect.Value
	// entry: it stands in a map, and has no field of its own
	entry bool
}

func (e element) key(docs map[string]string) Key {
	k := Key{Path: e.path, Key: e.path.String(), Type: typeName(e.field.Type), Default: literal(e.value),
		Meaning: docs[fieldName(e.owner, e.field)], Since: "Cloister"}
	if s := e.field.Tag.Get("since"); s != "" {
		k.Since = "containerd " + s
	}
	if e.value.Kind() == reflect.Map || e.value.Kind() == reflect.Slice {
		if e.value.Len() == 0 {
			k.Default = ""
		}
	}
	k.Idle, _ = idle(e.path)
	k.Live = isLive(e.path)
	if e.path.equals("version") {
		k.Default = ""
	}
	return k
}

// typeName is the type of a key in words.
func typeName(t reflect.Type) string {
	t = deref(t)
	switch {
	case t == reflect.TypeFor[Duration]():
		return "duration"
	case t.Kind() == reflect.Map && !isLeaf(deref(t.Elem())):
		return "tables by name"
	case t.Kind() == reflect.Map && t.Elem().Kind() == reflect.Slice:
		return "table of lists"
	case t.Kind() == reflect.Slice && !isLeaf(t.Elem()):
		return "list of tables"
	}
	return kind(t)
}

// fieldName names a field as docs do. Embedded fields belong to their own
// struct.
func fieldName(owner reflect.Type, f reflect.StructField) string {
	for _, i := range f.Index[:len(f.Index)-1] {
		owner = deref(owner.Field(i).Type)
	}
	return owner.Name() + "." + f.Name
}

// walkValues visits the keys of a table with their values, and then the tables
// in it. With shape, a map of tables is visited as one table called NAME.
func walkValues(v reflect.Value, at keyPath, shape bool, visit func(element)) {
	var tables []element
	for _, f := range fields(v.Type()) {
		e := element{path: at.and(f.Tag.Get("toml")), owner: v.Type(), field: f, value: v.FieldByIndex(f.Index)}
		for e.value.Kind() == reflect.Pointer {
			e.value = e.value.Elem()
		}
		t := e.value.Type()
		switch {
		case !isLeaf(t):
			tables = append(tables, e)
		case t.Kind() == reflect.Map && !isLeaf(deref(t.Elem())):
			if shape {
				visit(e)
				e.path, e.value = e.path.and(anyName), reflect.New(deref(t.Elem())).Elem()
				tables = append(tables, e)
				continue
			}
			for _, name := range sortedKeys(e.value) {
				tables = append(tables, element{path: e.path.and(name.String()), owner: e.owner, field: f, value: e.value.MapIndex(name)})
			}
		case t.Kind() == reflect.Map && !shape:
			for _, name := range sortedKeys(e.value) {
				tables = append(tables, element{path: e.path.and(name.String()), owner: e.owner, field: f, value: e.value.MapIndex(name), entry: true})
			}
		default:
			visit(e)
		}
	}
	for _, e := range tables {
		if e.entry {
			visit(e)
			continue
		}
		walkValues(e.value, e.path, shape, visit)
	}
}

func sortedKeys(m reflect.Value) []reflect.Value {
	return slices.SortedFunc(slices.Values(m.MapKeys()), func(a, b reflect.Value) int { return cmp.Compare(a.String(), b.String()) })
}

// fieldDocs gives the comments of all structs: "Type.Field" → text. They are
// read once and not changed.
var fieldDocs = sync.OnceValues(readFieldDocs)

func readFieldDocs() (map[string]string, error) {
	files, err := fs.Glob(sources, "*.go")
	if err != nil {
		return nil, fmt.Errorf("list the sources of the reference: %w", err)
	}
	docs, keys := map[string]string{}, map[string]string{}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		text, err := sources.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("read the sources of the reference: %w", err)
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, text, parser.ParseComments)
		if err != nil {
			return nil, fmt.Errorf("read the sources of the reference: %w", err)
		}
		ast.Inspect(f, func(n ast.Node) bool { return noteStruct(n, docs, keys) })
	}
	for name, text := range docs {
		own, _, _ := strings.Cut(name, ".")
		docs[name] = goName().ReplaceAllStringFunc(text, func(word string) string {
			if key := cmp.Or(keys[word], keys[own+"."+word]); key != "" {
				return "`" + key + "`"
			}
			return word
		})
	}
	return docs, nil
}

// noteStruct notes the comments and keys of a struct's fields.
func noteStruct(n ast.Node, docs, keys map[string]string) bool {
	t, ok := n.(*ast.TypeSpec)
	if !ok {
		return true
	}
	s, ok := t.Type.(*ast.StructType)
	if !ok {
		return false
	}
	for _, field := range s.Fields.List {
		for _, id := range field.Names {
			name := t.Name.Name + "." + id.Name
			docs[name] = sentence(id.Name, field.Doc.Text())
			if field.Tag != nil {
				keys[name] = reflect.StructTag(strings.Trim(field.Tag.Value, "`")).Get("toml")
			}
		}
	}
	return false
}

// goName finds what may be the Go name of a key, alone or with its type.
var goName = form(`\b([A-Z][a-zA-Z]+\.)?[A-Z]+[a-z]+[A-Z][a-zA-Z]*\b|\b[A-Z][a-zA-Z]+\.[A-Z][a-zA-Z]+\b`)

// sentence drops the field's Go name from the beginning of its comment.
func sentence(field, text string) string {
	text = strings.Join(strings.Fields(text), " ")
	text = strings.TrimPrefix(text, field+" ")
	for _, verb := range []string{"is ", "are ", "that is ", "says "} {
		text = strings.TrimPrefix(text, verb)
	}
	if text == "" {
		return ""
	}
	return strings.TrimSuffix(strings.ToUpper(text[:1])+text[1:], ".")
}

// liveKeys take effect without a restart of the daemon. A table stands for all
// in it.
func liveKeys() []keyPath {
	return []keyPath{
		{"debug", "level"},
		plugin(imagesPlugin, "registry"),
		plugin(imagesPlugin, "runtime_platforms"),
		plugin(imagesPlugin, "image_decryption"),
		{"stream_processors"},
		{"cloister", "credentials"},
		plugin(runtimePlugin, "cni"),
		plugin(runtimePlugin, "containerd", "runtimes"),
		plugin(runtimePlugin, "containerd", "default_runtime_name"),
		plugin(runtimePlugin, "ignore_deprecation_warnings"),
		{"cloister", "cgroup_driver"},
		{"cloister", "handlers"},
	}
}

func isLive(path keyPath) bool {
	return slices.ContainsFunc(liveKeys(), func(k keyPath) bool { return len(k) <= len(path) && k.equals(path[:len(k)]...) })
}

// Change is a key that was dropped.
type Change struct{ Key, Instead string }

// Dropped lists the keys that were dropped, in the form of version 2 where
// they had one.
func Dropped() []Change {
	var all []Change
	for _, r := range rules() {
		if r.why == "" {
			continue
		}
		instead := r.why
		if r.to == nil {
			instead = "no effect: " + r.why
		}
		all = append(all, Change{strings.ReplaceAll(r.from.String(), `"*"`, anyName), instead})
	}
	return all
}
