package config

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// checkKeys judges every key of a file against the shape of document. All
// faults are reported, not only the first.
func checkKeys(keys []key) error {
	var faults []error
	var bad []string // a refused table; its keys need no fault of their own
	for _, k := range keys {
		if bad != nil && len(k.path) > len(bad) && slices.Equal(bad, k.path[:len(bad)]) {
			continue
		}
		known, ok := lookup(k.path)
		if ok {
			continue
		}
		bad = k.path[:known+1]
		faults = append(faults, k.place.fault(refusal(bad)))
	}
	return errors.Join(faults...)
}

// lookup follows a path through the shape. Without a hit it tells how many
// parts of the path were known.
func lookup(path []string) (known int, ok bool) {
	t := reflect.TypeFor[document]()
	for i, part := range path {
		for t.Kind() == reflect.Pointer {
			t = t.Elem()
		}
		switch t.Kind() {
		case reflect.Struct:
			f, found := fieldOf(t, part)
			if !found {
				return i, false
			}
			t = f.Type
		case reflect.Map:
			t = t.Elem()
		case reflect.Interface:
			return len(path), true
		default:
			// A value where a table was written: the decoder says so with the types.
			return len(path), true
		}
	}
	return len(path), true
}

func fieldOf(t reflect.Type, name string) (reflect.StructField, bool) {
	for i := range t.NumField() {
		if f := t.Field(i); f.Tag.Get("toml") == name {
			return f, true
		}
	}
	return reflect.StructField{}, false
}

// refusal says why a path whose last part is not known is refused, and what
// to do about it.
func refusal(path []string) string {
	if reason, ok := later(path); ok {
		return fmt.Sprintf("%s is not supported yet (%s); remove it", quoteKey(path), reason)
	}
	msg := "unknown key " + quoteKey(path)
	parent := reflect.TypeFor[document]()
	if t, ok := typeAt(path[:len(path)-1]); ok {
		parent = t
	}
	name := path[len(path)-1]
	if near := nearest(name, fieldNames(parent)); near != "" {
		return fmt.Sprintf("%s; did you mean %q?", msg, near)
	}
	if table := ownerOf(reflect.TypeFor[document](), nil, name); table != nil {
		return fmt.Sprintf("%s; it belongs in the table [%s]", msg, quoteKey(table))
	}
	return fmt.Sprintf("%s; known there: %s", msg, strings.Join(fieldNames(parent), ", "))
}

func typeAt(path []string) (reflect.Type, bool) {
	t := reflect.TypeFor[document]()
	for _, part := range path {
		for t.Kind() == reflect.Pointer {
			t = t.Elem()
		}
		switch t.Kind() {
		case reflect.Struct:
			f, ok := fieldOf(t, part)
			if !ok {
				return nil, false
			}
			t = f.Type
		case reflect.Map:
			t = t.Elem()
		default:
			return nil, false
		}
	}
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	return t, t.Kind() == reflect.Struct
}

func fieldNames(t reflect.Type) []string {
	var names []string
	for i := range t.NumField() {
		if n := t.Field(i).Tag.Get("toml"); n != "" {
			names = append(names, n)
		}
	}
	return names
}

// ownerOf finds the table that has a key of this name, wherever it is.
func ownerOf(t reflect.Type, at []string, name string) []string {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t.Kind() == reflect.Map {
		at, t = append(slices.Clone(at), "NAME"), t.Elem()
	}
	if t.Kind() != reflect.Struct {
		return nil
	}
	if _, ok := fieldOf(t, name); ok && len(at) > 0 {
		return at
	}
	for i := range t.NumField() {
		f := t.Field(i)
		if tag := f.Tag.Get("toml"); tag != "" {
			if found := ownerOf(f.Type, append(slices.Clone(at), tag), name); found != nil {
				return found
			}
		}
	}
	return nil
}

// nearest is the candidate that a slip of the pen most likely meant, or "".
func nearest(name string, candidates []string) string {
	best, bestDistance := "", min(len(name)/3+1, 4)
	for _, c := range candidates {
		if d := distance(name, c); d < bestDistance || (d == bestDistance && best == "") {
			best, bestDistance = c, d
		}
	}
	return best
}

// distance is the edit distance of two keys. Case and separators count for
// nothing, so that "binDir" finds "bin_dir".
func distance(a, b string) int {
	fold := func(s string) []rune {
		return []rune(strings.ToLower(strings.NewReplacer("_", "", "-", "").Replace(s)))
	}
	x, y := fold(a), fold(b)
	row := make([]int, len(y)+1)
	for j := range row {
		row[j] = j
	}
	for i := range x {
		prev := row[0]
		row[0] = i + 1
		for j := range y {
			cost := prev
			if x[i] != y[j] {
				cost++
			}
			prev, row[j+1] = row[j+1], min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(y)]
}
