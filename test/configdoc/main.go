// configdoc writes docs/configuration.md out of the documented structs of
// internal/config and their defaults, so that the page cannot be wrong:
//
//	go run ./test/configdoc >docs/configuration.md
package main

import (
	"bytes"
	"cmp"
	"encoding"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"cloister.dev/internal/config"
)

func main() {
	page, err := render("internal/config")
	if err == nil {
		_, err = os.Stdout.Write(page)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "configdoc:", err)
		os.Exit(1)
	}
}

const introduction = `# Configuration

*Made by ` + "`make generate`" + ` out of internal/config; do not edit.*

The daemon reads ` + "`" + config.DefaultPath + "`" + ` and then ` + "`conf.d/*.toml`" + ` beside it in the
order of their names; neither has to exist. With ` + "`--config FILE`" + ` that file is
read instead. A file may name others in ` + "`imports`" + `, which are read after it. Where
several files set a key the last one wins; tables are merged, lists are replaced.
` + "`--root`, `--state`, `--address` and `--log-level`" + ` win over all files.

The form is that of containerd's version 3. A key that does not exist, or has the
wrong type, is an error that names file and line; so is a key of containerd's that
is not honoured yet.

` + "```toml" + `
version = 3

[cloister]
network = "builtin"

[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "crun"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.crun]
runtime_type = "io.containerd.runc.v2"
options = { BinaryName = "/usr/bin/crun" }
` + "```" + `

`

// render makes the page from the package in dir.
func render(dir string) ([]byte, error) {
	docs, err := fieldDocs(dir)
	if err != nil {
		return nil, err
	}
	d := config.Default()
	w := &writer{docs: docs}
	w.WriteString(introduction)
	w.topLevel(d)
	const plugin = "plugins.\"io.containerd."
	w.table(plugin+"cri.v1.images\"", reflect.ValueOf(d.Images))
	w.table(plugin+"cri.v1.runtime\"", reflect.ValueOf(d.Runtime))
	w.table(plugin+"grpc.v1.cri\"", reflect.ValueOf(d.Streaming))
	w.table("cloister", reflect.ValueOf(d.Cloister))
	w.table("device_plugin", reflect.ValueOf(d.DevicePlugin))
	return w.Bytes(), nil
}

// fieldDocs reads the comments of all structs: "Type.Field" → text.
func fieldDocs(dir string) (map[string]string, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return nil, err
	}
	docs, keys := map[string]string{}, map[string]string{}
	for _, name := range files {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
		if err != nil {
			return nil, err
		}
		ast.Inspect(f, func(n ast.Node) bool {
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
					docs[t.Name.Name+"."+id.Name] = sentence(id.Name, field.Doc.Text())
					if key := keyOf(field); key != "" {
						keys[t.Name.Name+"."+id.Name] = key
					}
				}
			}
			return false
		})
	}
	for name, text := range docs {
		own, _, _ := strings.Cut(name, ".")
		docs[name] = camelCase.ReplaceAllStringFunc(text, func(word string) string {
			if key := cmp.Or(keys[word], keys[own+"."+word]); key != "" {
				return "`" + key + "`"
			}
			return word
		})
	}
	return docs, nil
}

// camelCase finds what may be the Go name of a key, alone or with its type.
var camelCase = regexp.MustCompile(`\b([A-Z][a-zA-Z]+\.)?[A-Z]+[a-z]+[A-Z][a-zA-Z]*\b|\b[A-Z][a-zA-Z]+\.[A-Z][a-zA-Z]+\b`)

func keyOf(f *ast.Field) string {
	if f.Tag == nil {
		return ""
	}
	return reflect.StructTag(strings.Trim(f.Tag.Value, "`")).Get("toml")
}

// sentence drops the field's Go name from the beginning of its comment.
func sentence(field, text string) string {
	text = strings.Join(strings.Fields(text), " ")
	text = strings.TrimPrefix(text, field+" ")
	for _, verb := range []string{"is ", "are ", "that is ", "says "} {
		text = strings.TrimPrefix(text, verb)
	}
	text = strings.ReplaceAll(text, "|", "\\|")
	if text == "" {
		return ""
	}
	return strings.ToUpper(text[:1]) + text[1:]
}

type writer struct {
	bytes.Buffer
	docs map[string]string
}

const heading = "| key | type | default | meaning |\n| --- | --- | --- | --- |\n"

func (w *writer) topLevel(d config.Config) {
	w.WriteString("## Top level\n\n" + heading)
	w.row("version", "integer", "", "Has to be 3")
	w.row("root", "string", code(d.Root), w.docs["Config.Root"])
	w.row("state", "string", code(d.State), w.docs["Config.State"])
	w.row("imports", "list of strings", "", "Files that are read after this one; patterns are expanded, relative paths start at this file's folder")
	w.WriteString("\n## [grpc]\n\n" + heading)
	w.row("address", "string", code(d.Address), w.docs["Config.Address"]+" It is in the state folder unless it is set.")
	w.WriteString("\n## [debug]\n\n" + heading)
	w.row("level", "string", code(d.LogLevel), w.docs["Config.LogLevel"])
	w.row("format", "string", code(d.LogFormat), w.docs["Config.LogFormat"])
}

// table writes the keys of a struct, and then the tables within it.
func (w *writer) table(name string, v reflect.Value) {
	fmt.Fprintf(w, "\n## [%s]\n\n%s", name, heading)
	type inner struct {
		name  string
		value reflect.Value
	}
	var tables []inner
	for i := range v.NumField() {
		f, fv := v.Type().Field(i), v.Field(i)
		key := f.Tag.Get("toml")
		doc := w.docs[v.Type().Name()+"."+f.Name]
		switch {
		case isTable(f.Type):
			tables = append(tables, inner{name + "." + key, fv})
		case f.Type.Kind() == reflect.Map && f.Type.Elem().Kind() == reflect.Struct:
			w.row(key, "tables by name", "", doc+" See below")
			tables = append(tables, inner{name + "." + key + ".NAME", reflect.Zero(f.Type.Elem())})
		default:
			w.row(key, kind(f.Type), value(fv), doc)
		}
	}
	for _, t := range tables {
		w.table(t.name, t.value)
	}
}

func isTable(t reflect.Type) bool {
	return t.Kind() == reflect.Struct && !reflect.PointerTo(t).Implements(reflect.TypeFor[encoding.TextUnmarshaler]())
}

func (w *writer) row(key, kind, def, meaning string) {
	fmt.Fprintf(w, "| `%s` | %s | %s | %s |\n", key, kind, def, strings.TrimSuffix(meaning, "."))
}

func kind(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Struct:
		return "duration"
	case reflect.Bool:
		return "boolean"
	case reflect.Int:
		return "integer"
	case reflect.Slice:
		return "list of strings"
	case reflect.Map:
		return "table"
	}
	return "string"
}

// value writes a default as a file would.
func value(v reflect.Value) string {
	if m, ok := v.Interface().(encoding.TextMarshaler); ok {
		b, err := m.MarshalText()
		if err == nil {
			return code(string(b))
		}
	}
	if v.Kind() == reflect.String {
		return code(v.String())
	}
	if v.Kind() == reflect.Map && v.Len() == 0 || v.Kind() == reflect.Slice && v.Len() == 0 {
		return ""
	}
	if v.Kind() == reflect.Map {
		var pairs []string
		for _, k := range v.MapKeys() {
			pairs = append(pairs, fmt.Sprintf("%s = %q", k, v.MapIndex(k)))
		}
		slices.Sort(pairs)
		return "`{ " + strings.Join(pairs, ", ") + " }`"
	}
	b, err := json.Marshal(v.Interface())
	if err != nil {
		return ""
	}
	return "`" + string(b) + "`"
}

func code(s string) string {
	if s == "" {
		return "`\"\"`"
	}
	return fmt.Sprintf("`%q`", s)
}
