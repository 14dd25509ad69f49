package config

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// origin is where a value comes from.
type origin struct {
	place place
	wrote keyPath // as it stands there
}

// decode lays one file over the configuration and returns its imports. A file
// without a version has that of the file it belongs to, 0 being none.
func (l *loader) decode(path string, data []byte, belongs int) (version int, imports []string, err error) {
	settings, err := scan(path, data)
	if err != nil {
		return 0, nil, err
	}
	version, err = versionOf(settings, belongs)
	if err != nil {
		return 0, nil, err
	}
	m := migrate(settings, version)
	l.warnings = append(l.warnings, m.warnings...)
	doc := documentOf(&l.config)
	var faults []error
	var bad []keyPath // refused tables; their keys need no fault of their own
	for i, s := range m.settings {
		if len(bad) == maxFaults {
			faults = append(faults, place{path, s.place.line}.fault("too many faults; the %d settings from here on were not looked at", len(m.settings)-i))
			break
		}
		if slices.ContainsFunc(bad, func(b keyPath) bool { return len(b) <= len(s.wrote) && b.equals(s.wrote[:len(b)]...) }) {
			continue
		}
		if l.foreign(s) {
			continue
		}
		refused, err := l.set(&doc, s, version)
		if refused != nil {
			bad = append(bad, refused)
		}
		faults = append(faults, err)
	}
	l.settings = append(l.settings, m.settings...)
	return version, doc.Imports, errors.Join(faults...)
}

// maxFaults is how many a person can take in; the search for what was meant
// by a key takes its time.
const maxFaults = 20

// set assigns one setting and notes where it came from.
func (l *loader) set(doc *document, s setting, version int) (refused keyPath, err error) {
	t, _, ok := lookup(s.path)
	if !ok {
		bad, msg := refusal(s, version)
		return bad, s.place.fault("%s", msg)
	}
	l.origins[s.path.String()] = origin{s.place, s.wrote}
	if s.table {
		if isLeaf(t) && t.Kind() != reflect.Map && t.Kind() != reflect.Interface {
			return s.wrote, s.place.fault("%s is %s, not a table", s.wrote, article(kind(t)))
		}
		if parent, _, _ := lookup(s.path.parent()); parent == nil || parent.Kind() != reflect.Map || isLeaf(t) {
			return nil, nil
		}
		s.value = map[string]any{} // an empty table in a map is there
	}
	err = assign(reflect.ValueOf(doc).Elem(), s.path, s.value)
	var unknown *unknownError
	switch {
	case errors.As(err, &unknown):
		if near := nearest(unknown.name, tagsOf(unknown.in)); near != "" {
			return s.wrote, s.place.fault("%s: unknown key %s; did you mean %q?", s.wrote, unknown.name, near)
		}
		return s.wrote, s.place.fault("%s: unknown key %s; known there: %s", s.wrote, unknown.name, strings.Join(tagsOf(unknown.in), ", "))
	case err != nil:
		return s.wrote, s.place.fault("%s %v", s.wrote, err)
	}
	return nil, nil
}

func tagsOf(t reflect.Type) []string {
	var names []string
	for _, f := range fields(t) {
		names = append(names, f.Tag.Get("toml"))
	}
	return names
}

// foreign tells whether a setting is of a plugin that Cloister has never heard
// of. Some builds of containerd have such: their tables are passed over. What
// looks like a slip of the pen is none.
func (l *loader) foreign(s setting) bool {
	if len(s.path) < 2 || s.path[0] != "plugins" || !strings.HasPrefix(s.path[1], "io.containerd.") && strings.Count(s.path[1], ".") < 3 {
		return false
	}
	if _, _, ok := lookup(s.path[:2]); ok || nearest(s.path[1], tagsOf(reflect.TypeFor[pluginTables]())) != "" {
		return false
	}
	key := s.wrote[:min(2, len(s.wrote))].String()
	if !slices.ContainsFunc(l.warnings, func(w Warning) bool { return w.Key == key }) {
		l.warnings = append(l.warnings, Warning{Where: s.place.String(), Key: key, Message: "has no effect: Cloister has no such plugin"})
	}
	return true
}

func versionOf(settings []setting, belongs int) (int, error) {
	for _, s := range settings {
		if !s.path.equals("version") {
			continue
		}
		v, ok := s.value.(int64)
		if !ok || v < 1 || v > newestVersion {
			return 0, s.place.fault("version is %s; there are versions 1 to %d", describe(s.value), newestVersion)
		}
		return int(v), nil
	}
	return max(belongs, 1), nil
}

// fault is an error about a key, at the place where it was set last.
func (l *loader) fault(path keyPath, format string, args ...any) error {
	msg := fmt.Sprintf(format, args...)
	for at := path; len(at) > 0; at = at.parent() {
		if o, ok := l.origins[at.String()]; ok {
			return o.place.fault("%s", msg)
		}
	}
	return place{"configuration", 0}.fault("%s", msg)
}
