package config

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"sort"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// place is where something stands in a file.
type place struct {
	file string
	line int
}

func (p place) String() string { return fmt.Sprintf("%s:%d", p.file, p.line) }

// fault is an error at a place.
func (p place) fault(format string, args ...any) error {
	return fmt.Errorf("%s: %s: %w", p, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}

// keyPath is a key with the tables that it is in.
type keyPath []string

// form is a regular expression, compiled when it is first used: this package
// is in programs whose start is waited for, a guest's first one among them.
func form(expr string) func() *regexp.Regexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(expr) })
}

var bareKey = form(`^[A-Za-z0-9_-]+$`)

// String writes the key as a file would.
func (k keyPath) String() string {
	parts := make([]string, len(k))
	for i, p := range k {
		if parts[i] = p; !bareKey().MatchString(p) {
			parts[i] = fmt.Sprintf("%q", p)
		}
	}
	return strings.Join(parts, ".")
}

// and is the key of something in the table k.
func (k keyPath) and(parts ...string) keyPath { return slices.Concat(k, parts) }

func (k keyPath) parent() keyPath { return k[:len(k)-1] }
func (k keyPath) last() string    { return k[len(k)-1] }

func (k keyPath) equals(parts ...string) bool { return slices.Equal(k, parts) }

// setting is what one line of a file sets.
type setting struct {
	path  keyPath // in the form of the newest version, once migrated
	wrote keyPath // as it stands in the file
	value any     // of a table header: nil
	table bool    // a header: it says that the table is there
	// dropped: the key is gone from the newest form, and another stands for it
	dropped bool
	place   place
}

// scan lists the settings of a file in their order, without judging them. A
// list of tables is one setting.
func scan(path string, data []byte) ([]setting, error) {
	if bytes.Count(data, []byte("=")) > 2*maxSettings { // before the parser, whose time grows with the square
		return nil, place{path, 1}.fault("there are more than %d settings", maxSettings)
	}
	var values map[string]any
	if err := toml.Unmarshal(data, &values); err != nil {
		return nil, syntaxError(path, err)
	}
	s := scanner{file: path, starts: lineStarts(data), values: values}
	s.parser.Reset(data)
	for s.parser.NextExpression() {
		switch n := s.parser.Expression(); n.Kind {
		case unstable.Table:
			s.header(n)
		case unstable.ArrayTable:
			s.array(n)
		case unstable.KeyValue:
			s.keyValue(s.table, n)
		}
	}
	if err := s.parser.Error(); err != nil { // not after a successful Unmarshal
		return nil, place{path, len(s.starts)}.fault("%v", err)
	}
	if len(s.settings) > maxSettings {
		return nil, place{path, s.settings[maxSettings].place.line}.fault("there are more than %d settings", maxSettings)
	}
	return s.settings, nil
}

// maxSettings bounds one file: a configuration is written by people.
const maxSettings = 5_000

func syntaxError(path string, err error) error {
	var de *toml.DecodeError
	if !errors.As(err, &de) {
		return fmt.Errorf("%s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	row, _ := de.Position()
	return place{path, row}.fault("%s", strings.TrimPrefix(de.Error(), "toml: "))
}

type scanner struct {
	parser   unstable.Parser
	file     string
	starts   []uint32
	values   map[string]any
	table    keyPath
	arrays   []keyPath // lists of tables so far
	settings []setting
}

// key gives the full path of a node's key beneath a table, and its place.
func (s *scanner) key(table keyPath, n *unstable.Node) (keyPath, place) {
	path := slices.Clone(table)
	line := 1
	for it := n.Key(); it.Next(); {
		part := it.Node()
		path = append(path, string(part.Data))
		line = sort.Search(len(s.starts), func(i int) bool { return s.starts[i] > part.Raw.Offset })
	}
	return path, place{s.file, line}
}

func (s *scanner) add(path keyPath, at place, value any, table bool) {
	s.settings = append(s.settings, setting{path: path, wrote: path, value: value, table: table, place: at})
}

func (s *scanner) header(n *unstable.Node) {
	path, at := s.key(nil, n)
	if s.table = path; !s.inArray(path) {
		s.add(path, at, nil, true)
	}
}

func (s *scanner) array(n *unstable.Node) {
	path, at := s.key(nil, n)
	if s.table = path; !s.inArray(path) {
		s.arrays = append(s.arrays, path)
		s.add(path, at, s.valueAt(path), false)
	}
}

func (s *scanner) inArray(path keyPath) bool {
	return slices.ContainsFunc(s.arrays, func(a keyPath) bool { return len(a) <= len(path) && slices.Equal(a, path[:len(a)]) })
}

func (s *scanner) keyValue(table keyPath, n *unstable.Node) {
	path, at := s.key(table, n)
	if s.inArray(path) {
		return
	}
	value := n.Value()
	if value.Kind != unstable.InlineTable {
		s.add(path, at, s.valueAt(path), false)
		return
	}
	s.add(path, at, nil, true)
	for it := value.Children(); it.Next(); {
		if child := it.Node(); child.Kind == unstable.KeyValue {
			s.keyValue(path, child)
		}
	}
}

func (s *scanner) valueAt(path keyPath) any {
	var v any = s.values
	for _, part := range path {
		m, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		v = m[part]
	}
	return v
}

func lineStarts(data []byte) []uint32 {
	starts := []uint32{0}
	for i, b := range data {
		if b == '\n' {
			starts = append(starts, uint32(i+1))
		}
	}
	return starts
}
