package config

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
)

// TestEffectsPage checks that docs/configuration-effects.md names every key of
// the reference file, and only tests that exist.
func TestEffectsPage(t *testing.T) {
	page, err := os.ReadFile("../../docs/configuration-effects.md")
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile("testdata/blocks/reference.toml")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Plugins map[string]map[string]any `toml:"plugins"`
	}
	if err := toml.Unmarshal(data, &file); err != nil {
		t.Fatal(err)
	}
	for _, key := range flat("", file.Plugins["io.containerd.grpc.v1.cri"]) {
		// Some keys stand below a table in that file to which they do not belong.
		bare := key[strings.LastIndexByte(key, '.')+1:]
		if !strings.Contains(string(page), "| `"+key+"` |") && !strings.Contains(string(page), "| `"+bare+"` |") {
			t.Errorf("no row for %s", key)
		}
	}
	tests := testNames(t)
	for _, m := range regexp.MustCompile("`(Test[A-Za-z0-9]+)`").FindAllStringSubmatch(string(page), -1) {
		if !tests[m[1]] {
			t.Errorf("there is no test %s", m[1])
		}
	}
}

func flat(at string, table map[string]any) []string {
	var keys []string
	for k, v := range table {
		path := strings.TrimPrefix(at+"."+k, ".")
		if sub, ok := v.(map[string]any); ok && len(sub) > 0 {
			keys = append(keys, flat(path, sub)...)
		} else {
			keys = append(keys, path)
		}
	}
	return keys
}

func testNames(t *testing.T) map[string]bool {
	names := map[string]bool{}
	declared := regexp.MustCompile(`(?m)^func (Test[A-Za-z0-9]+)\(`)
	for _, pattern := range []string{"../../*/*/*_test.go", "../../*/*/*/*_test.go", "../../*/*/*/*/*_test.go"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range declared.FindAllStringSubmatch(string(data), -1) {
				names[m[1]] = true
			}
		}
	}
	return names
}
