package config

import (
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// Value is one key of the effective configuration.
type Value struct {
	Key   string `json:"key"`
	Value string `json:"value"` // as a file writes it; secrets are not shown
	// From is FILE:LINE, "default", or "derived" from other keys.
	From string `json:"from"`
	// Wrote is the key as it stands there, when that is an older form.
	Wrote string `json:"wrote,omitempty"`

	path keyPath
}

// Inspect loads as Load does and tells where each value comes from.
func Inspect(path string) (Config, []Value, error) {
	l := newLoader()
	if err := l.load(path); err != nil {
		return Config{}, nil, err
	}
	c, err := l.finish()
	if err != nil {
		return Config{}, nil, err
	}
	return c, l.values(c), nil
}

func (l *loader) values(c Config) []Value {
	plain := Default()
	c.Plugins.GRPC.Address, plain.Plugins.GRPC.Address = c.Address, plain.Address
	usual := reflect.ValueOf(documentOf(&plain))
	var all []Value
	walkValues(reflect.ValueOf(documentOf(&c)), nil, false, func(e element) {
		if e.path.equals("imports") {
			return // they are here already
		}
		v := Value{Key: e.path.String(), Value: literal(e.value), From: "default", path: e.path}
		if hides(e.path) {
			v.Value = literalOf(redacted)
		}
		o, set := l.origins[v.Key]
		same := reflect.DeepEqual(valueAt(reflect.ValueOf(documentOf(&c)), e.path), valueAt(usual, e.path))
		switch {
		case e.path.equals("version"):
			v.From = "the newest form"
		case set:
			if v.From = o.place.String(); !o.wrote.equals(e.path...) {
				v.Wrote = o.wrote.String()
			}
		case !same:
			v.From = "derived"
		}
		if _, idle := idle(e.path); idle && v.From == "default" {
			return // nothing to see
		}
		all = append(all, v)
	})
	return all
}

var secretName = form(`(?i)auth|token|secret|password|cookie|key`)

// hides tells of values of a free name whether they may be secrets.
func hides(path keyPath) bool {
	return slices.Contains(path, "headers") && secretName().MatchString(path.last())
}

// WriteValues writes a configuration as a file in the newest form, with the
// origin of each value behind it.
func WriteValues(w io.Writer, values []Value) error {
	var lines []line
	for _, v := range values {
		from := v.From
		if v.Wrote != "" {
			from += ", " + v.Wrote
		}
		lines = append(lines, line{path: v.path, value: v.Value, comment: from})
	}
	return writeTOML(w, lines)
}

// WriteDefault writes the configuration without any file, each key with its
// meaning above it. Keys that change nothing are left out.
func WriteDefault(w io.Writer) error {
	docs, err := fieldDocs()
	if err != nil {
		return err
	}
	d := Default()
	d.Plugins.GRPC.Address = d.Address
	var lines []line
	walkValues(reflect.ValueOf(documentOf(&d)), nil, false, func(e element) {
		if _, idle := idle(e.path); idle {
			return
		}
		l := line{path: e.path, value: literal(e.value)}
		if !e.entry {
			l.above = wrap(docs[fieldName(e.owner, e.field)]+".", 76)
		}
		lines = append(lines, l)
	})
	return writeTOML(w, lines)
}

func wrap(text string, width int) []string {
	var lines []string
	for _, word := range strings.Fields(text) {
		if n := len(lines); n > 0 && len(lines[n-1])+1+len(word) <= width {
			lines[n-1] += " " + word
			continue
		}
		lines = append(lines, word)
	}
	return lines
}

// Migrate writes what one file sets in the newest form, with a comment at each
// key that has changed. It does not follow imports.
func Migrate(w io.Writer, path string) error {
	data, err := readFile(path)
	if err != nil {
		return err
	}
	if _, _, err := newLoader().decode(path, data, 0); err != nil {
		return err
	}
	settings, err := scan(path, data)
	if err != nil {
		return err
	}
	version, err := versionOf(settings, 0)
	if err != nil {
		return err
	}
	m := migrate(settings, version)
	var notes []string
	for _, warn := range m.warnings {
		if !slices.ContainsFunc(m.settings, func(s setting) bool { return strings.HasPrefix(s.wrote.String(), warn.Key) }) {
			notes = append(notes, fmt.Sprintf("%s (line %s) %s", warn.Key, warn.Where[strings.LastIndexByte(warn.Where, ':')+1:], warn.Message))
		}
	}
	lines := []line{{path: keyPath{"version"}, value: fmt.Sprint(newestVersion), above: notes}}
	return writeTOML(w, append(lines, m.lines()...))
}

// lines gives the settings for writing, the last of each key.
func (m *migrated) lines() []line {
	var lines []line
	last := map[string]int{}
	for i, s := range m.settings {
		last[s.path.String()] = i
	}
	told := map[string]bool{} // comments, each is written once
	for i, s := range m.settings {
		if s.path.equals("version") || last[s.path.String()] != i {
			continue
		}
		if s.table {
			if t, _, ok := lookup(s.path); ok && !isLeaf(t) && m.emptyEntry(s) {
				lines = append(lines, line{path: s.path, table: true})
			}
			continue
		}
		l := line{path: s.path, value: literalOf(s.value)}
		for _, c := range m.comments(s) {
			if !told[c+s.path.parent().String()] {
				l.above = append(l.above, c)
			}
			told[c+s.path.parent().String()] = true
		}
		lines = append(lines, l)
	}
	return lines
}

// comments say what was changed about a setting.
func (m *migrated) comments(s setting) []string {
	var all []string
	switch {
	case s.path.equals(s.wrote...):
	case s.path.last() == s.wrote.last():
		all = append(all, "was in the table ["+s.wrote.parent().String()+"]")
	default:
		all = append(all, "was "+s.wrote.String())
	}
	for _, w := range m.warnings {
		if strings.HasPrefix(s.wrote.String(), w.Key) {
			all = append(all, w.Key+" "+w.Message)
		}
	}
	return all
}

// emptyEntry tells whether a table of a map has no keys: that it is there says
// something still.
func (m *migrated) emptyEntry(s setting) bool {
	parent, _, _ := lookup(s.path.parent())
	if parent == nil || parent.Kind() != reflect.Map {
		return false
	}
	return !slices.ContainsFunc(m.settings, func(o setting) bool {
		return len(o.path) > len(s.path) && o.path[:len(s.path)].equals(s.path...)
	})
}

// Explanation is what became of a key, and what it means.
type Explanation struct {
	Key
	// Note tells of a key of an older form.
	Note string `json:"note,omitempty"`
}

// Explain finds the keys that a name means: a whole key of any version, the end
// of one, or a table.
func Explain(name string) ([]Explanation, error) {
	settings, err := scan("key", []byte(name+" = 0"))
	if err != nil || len(settings) == 0 {
		return nil, fmt.Errorf("%q is not written as a key: quote parts with dots, as in plugins.\"%s\".cni: %w", name, runtimePlugin, errdefs.ErrInvalidArgument)
	}
	all, err := Reference()
	if err != nil {
		return nil, err
	}
	asked := settings[len(settings)-1].path
	found := among(all, func(k Key) bool { return len(k.Path) == len(asked) && fitsEnd(k.Path, asked) })
	if len(found) == 0 {
		found = explainOld(all, asked, asked)
	}
	if len(found) == 0 {
		found = among(all, func(k Key) bool { return fitsEnd(k.Path, asked) })
	}
	if len(found) == 0 { // a table: all that is in it
		found = among(all, func(k Key) bool { return len(k.Path) > 1 && fitsEnd(k.Path[:len(k.Path)-1], asked) })
	}
	if len(found) == 0 {
		cri, runtime := plugin(criPlugin), plugin(runtimePlugin)
		handler := runtime.and("containerd", "runtimes", anyName)
		found = explainOld(all, cri.and(asked...), cri.and("containerd").and(asked...), runtime.and(asked...),
			handler.and(asked...), handler.and("options").and(asked...))
	}
	if len(found) > 0 {
		return found, nil
	}
	hint := ""
	if near := nearest(asked.last(), allNames()); near != "" {
		hint = fmt.Sprintf("; did you mean %q?", near)
	}
	return nil, fmt.Errorf("there is no key %s%s: %w", asked, hint, errdefs.ErrNotFound)
}

// fitsEnd tells whether a path of the reference ends like the one asked for,
// whose names of one's own choice may be any.
func fitsEnd(path, asked keyPath) bool {
	if len(asked) > len(path) {
		return false
	}
	for i, part := range path[len(path)-len(asked):] {
		if part != asked[i] && part != anyName {
			return false
		}
	}
	return asked.last() == path[len(path)-1] || len(asked) > 1 && path[len(path)-1] == anyName
}

func among(all []Key, fits func(Key) bool) []Explanation {
	var found []Explanation
	for _, k := range all {
		if fits(k) {
			found = append(found, Explanation{Key: k})
		}
	}
	return found
}

// explainOld looks for a key in the forms that newer versions replaced.
func explainOld(all []Key, places ...keyPath) []Explanation {
	for _, path := range places {
		for version := newestVersion; version > 0; version-- {
			r, _, old := find(rules(), longName(path, version), version)
			to := resolve(path, version)
			if !old || r.why == "" && !isKnown(to) {
				continue
			}
			e := Explanation{Key: keyAt(all, to), Note: fmt.Sprintf("%s is of version %d; now it is %s", path, min(version, r.upto), to)}
			if r.why != "" {
				e.Note = fmt.Sprintf("%s was dropped: %s", path, r.why)
			}
			if e.Key.Key == "" {
				e.Key.Key = path.String()
			}
			return []Explanation{e}
		}
	}
	return nil
}

// keyAt gives the key of a path, or the table of free names that it is in.
func keyAt(all []Key, path keyPath) Key {
	var best Key
	for _, k := range all {
		n := len(k.Path)
		if k.OptionsOf == "" && n > 0 && n <= len(path) && n > len(best.Path) && fitsEnd(k.Path, path[:n]) && (n == len(path) || k.Type == "table") {
			best = k
		}
	}
	return best
}
