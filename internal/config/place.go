package config

import (
	"errors"
	"fmt"
	"regexp"
	"sort"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2/unstable"
)

// place is where something stands in a file.
type place struct {
	file string
	line int
}

// fault is an error at a place.
func (p place) fault(msg string) error {
	return fmt.Errorf("%s:%d: %s: %w", p.file, p.line, msg, errdefs.ErrInvalidArgument)
}

// key is one key or table header of a file with its full path.
type key struct {
	path  []string
	table bool // a header, or a value that is an inline table
	place place
}

func (k key) dotted() string { return strings.Join(k.path, ".") }

var bareKey = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)

// quoteKey writes a key as a file would.
func quoteKey(path []string) string {
	parts := make([]string, len(path))
	for i, p := range path {
		if parts[i] = p; !bareKey.MatchString(p) {
			parts[i] = fmt.Sprintf("%q", p)
		}
	}
	return strings.Join(parts, ".")
}

// scan lists the keys of a file in their order, without judging them.
func scan(path string, data []byte) ([]key, error) {
	s := scanner{file: path, starts: lineStarts(data)}
	s.parser.Reset(data)
	for s.parser.NextExpression() {
		switch n := s.parser.Expression(); n.Kind {
		case unstable.Table, unstable.ArrayTable:
			s.table = s.add(nil, n, true)
		case unstable.KeyValue:
			s.keyValue(s.table, n)
		}
	}
	if err := s.parser.Error(); err != nil {
		line := len(s.starts)
		var pe *unstable.ParserError
		if errors.As(err, &pe) && pe.Highlight != nil {
			line = s.line(s.parser.Range(pe.Highlight).Offset)
		}
		return nil, place{path, line}.fault(err.Error())
	}
	return s.keys, nil
}

type scanner struct {
	parser unstable.Parser
	file   string
	starts []uint32
	table  []string
	keys   []key
}

// add notes the key of a node beneath a prefix and returns its full path.
func (s *scanner) add(prefix []string, n *unstable.Node, table bool) []string {
	path := append([]string(nil), prefix...)
	line := 1
	for it := n.Key(); it.Next(); {
		part := it.Node()
		path = append(path, string(part.Data))
		line = s.line(part.Raw.Offset)
	}
	s.keys = append(s.keys, key{path, table, place{s.file, line}})
	return path
}

func (s *scanner) keyValue(prefix []string, n *unstable.Node) {
	value := n.Value()
	inline := value.Kind == unstable.InlineTable
	path := s.add(prefix, n, inline)
	if !inline {
		return
	}
	for it := value.Children(); it.Next(); {
		if child := it.Node(); child.Kind == unstable.KeyValue {
			s.keyValue(path, child)
		}
	}
}

func (s *scanner) line(offset uint32) int {
	return sort.Search(len(s.starts), func(i int) bool { return s.starts[i] > offset })
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
