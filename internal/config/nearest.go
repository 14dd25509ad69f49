package config

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// refusal says why a key is refused, and what was meant: version is that of
// its file, in whose terms it is answered.
func refusal(s setting, version int) (bad keyPath, msg string) {
	_, known, _ := lookup(s.path)
	below := len(s.path) - known // parts from the unknown one on
	bad = s.wrote[:max(len(s.wrote)-below+1, 1)]
	msg = "unknown key " + bad.String()
	if version > 2 {
		for _, old := range []int{3, 2} {
			if now := resolve(bad, old); !now.equals(bad...) && isKnown(now) {
				return bad, fmt.Sprintf("%s: it is from version %d, since version %d it is %s", msg, old, old+1, now)
			}
		}
	}
	there := keysIn(bad.parent(), version)
	if near := nearest(bad.last(), there); near != "" {
		return bad, fmt.Sprintf("%s; did you mean %q?", msg, near)
	}
	if table := ownerOf(shape(), nil, bad.last()); table != nil {
		return bad, fmt.Sprintf("%s; it belongs in the table [%s]", msg, table)
	}
	if len(there) == 0 {
		return bad, msg
	}
	return bad, fmt.Sprintf("%s; known there: %s", msg, strings.Join(there, ", "))
}

func isKnown(path keyPath) bool {
	if path == nil {
		return false
	}
	_, _, ok := lookup(path)
	return ok
}

// keysIn lists the keys of a table as files of a version know it.
func keysIn(table keyPath, version int) []string {
	var names []string
	try := func(name string) {
		if isKnown(resolve(table.and(name), version)) && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	for _, name := range allNames() {
		try(name)
	}
	for _, r := range rules() {
		try(r.from.last())
	}
	slices.Sort(names)
	return names
}

// allNames are the names that any table has a key of, without the names of maps.
func allNames() []string {
	var names []string
	walkTypes(shape(), nil, func(path keyPath, _ reflect.StructField) {
		if name := path.last(); !slices.Contains(names, name) {
			names = append(names, name)
		}
	})
	for short := range shortPlugins() {
		names = append(names, short)
	}
	return names
}

// anyName stands for the names of a map of tables.
const anyName = "NAME"

// walkTypes visits all keys of a table and of the tables in it.
func walkTypes(t reflect.Type, at keyPath, visit func(keyPath, reflect.StructField)) {
	for _, f := range fields(t) {
		path := at.and(f.Tag.Get("toml"))
		visit(path, f)
		elem := deref(f.Type)
		if elem.Kind() == reflect.Map {
			path, elem = path.and(anyName), deref(elem.Elem())
		}
		if !isLeaf(elem) {
			walkTypes(elem, path, visit)
		}
	}
}

// ownerOf finds the first table that has a key of this name.
func ownerOf(t reflect.Type, at keyPath, name string) (owner keyPath) {
	walkTypes(t, at, func(path keyPath, _ reflect.StructField) {
		if owner == nil && len(path) > 1 && path.last() == name {
			owner = path.parent()
		}
	})
	return owner
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
	if len(x) > 200 || len(y) > 200 {
		return max(len(x), len(y)) // no slip of the pen
	}
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
