package imports

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"testing"
)

// A file or function beyond the first figure is worth a look; beyond the
// second it has two purposes.
const (
	maxFileLines        = 500
	wantedFunctionLines = 60
	maxFunctionLines    = 80
)

func TestLengths(t *testing.T) {
	for _, p := range list(t) {
		for _, name := range p.GoFiles {
			path := filepath.Join(p.Dir, name)
			fset := token.NewFileSet()
			f, err := parser.ParseFile(fset, path, nil, parser.ParseComments)
			if err != nil {
				t.Errorf("%v", err)
				continue
			}
			if ast.IsGenerated(f) {
				continue
			}
			if lines := fset.File(f.Pos()).LineCount(); lines > maxFileLines {
				t.Errorf("%s/%s has %d lines, at most %d: which second purpose could move out?", p.room(), name, lines, maxFileLines)
			}
			functionLengths(t, fset, f, p.room()+"/"+name)
		}
	}
}

func functionLengths(t *testing.T, fset *token.FileSet, f *ast.File, name string) {
	t.Helper()
	for _, d := range f.Decls {
		fn, ok := d.(*ast.FuncDecl)
		if !ok {
			continue
		}
		lines := fset.Position(fn.End()).Line - fset.Position(fn.Pos()).Line + 1
		switch {
		case lines > maxFunctionLines:
			t.Errorf("%s: %s has %d lines, at most %d", name, fn.Name.Name, lines, maxFunctionLines)
		case lines > wantedFunctionLines:
			t.Logf("%s: %s has %d lines; %d are the aim", name, fn.Name.Name, lines, wantedFunctionLines)
		}
	}
}
