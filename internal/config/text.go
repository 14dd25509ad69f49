package config

import (
	"bytes"
	"encoding"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// line is one key of a file that is written.
type line struct {
	path    keyPath
	table   bool     // the table is named even if it has no key
	value   string   // as a file writes it
	above   []string // comments over it
	comment string   // behind it
}

// writeTOML writes keys as a file, each table once, the comments with them.
// Keys without a table come first.
func writeTOML(w io.Writer, lines []line) error {
	var out bytes.Buffer
	var tables []keyPath
	for _, l := range lines {
		if t := l.tablePath(); !slices.ContainsFunc(tables, func(have keyPath) bool { return have.equals(t...) }) {
			tables = append(tables, t)
		}
	}
	slices.SortStableFunc(tables, func(a, b keyPath) int { return min(len(a), 1) - min(len(b), 1) })
	for _, t := range tables {
		if len(t) > 0 {
			if out.Len() > 0 {
				out.WriteByte('\n')
			}
			fmt.Fprintf(&out, "[%s]\n", t)
		}
		for _, l := range lines {
			if !l.tablePath().equals(t...) {
				continue
			}
			for _, c := range l.above {
				fmt.Fprintln(&out, strings.TrimRight("# "+c, " "))
			}
			if l.table {
				continue
			}
			fmt.Fprintf(&out, "%s = %s", keyPath{l.path.last()}, l.value)
			if l.comment != "" {
				fmt.Fprintf(&out, " # %s", l.comment)
			}
			out.WriteByte('\n')
		}
	}
	_, err := w.Write(out.Bytes())
	return err
}

func (l line) tablePath() keyPath {
	if l.table {
		return l.path
	}
	return l.path.parent()
}

// literal writes a value as a file does.
func literal(v reflect.Value) string {
	if m, ok := v.Interface().(encoding.TextMarshaler); ok {
		b, err := m.MarshalText()
		if err == nil {
			return literalOf(string(b))
		}
	}
	if v.Kind() == reflect.Slice && v.Len() == 0 {
		return "[]"
	}
	if v.Kind() == reflect.Map && v.Len() == 0 {
		return "{}"
	}
	return literalOf(v.Interface())
}

func literalOf(v any) string {
	var out bytes.Buffer
	enc := toml.NewEncoder(&out)
	enc.SetTablesInline(true)
	if err := enc.Encode(map[string]any{"v": v}); err != nil {
		return fmt.Sprintf("%q", fmt.Sprint(v))
	}
	text := strings.TrimSpace(strings.TrimPrefix(out.String(), "v = "))
	if !strings.ContainsAny(text, "\"\\") {
		text = strings.ReplaceAll(text, "'", `"`) // what people write
	}
	return text
}
