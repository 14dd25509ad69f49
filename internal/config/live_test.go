package config

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// livingNode is a Live over files, with what it applied.
type livingNode struct {
	*Live
	path    string
	mu      sync.Mutex
	applied []Config
	refuse  error
}

func startLive(t *testing.T, path string) *livingNode {
	t.Helper()
	n := &livingNode{path: path}
	load := func() (Config, error) { return Load(path) }
	boot, err := load()
	if err != nil {
		t.Fatal(err)
	}
	n.Live = NewLive(boot, Follow{Load: load, Log: slog.New(slog.DiscardHandler), Apply: func(c Config) error {
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.refuse == nil {
			n.applied = append(n.applied, c)
		}
		return n.refuse
	}})
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

func (n *livingNode) until(t *testing.T, what string, ok func(LiveState) bool) LiveState {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; {
		s := n.State()
		if ok(s) {
			return s
		}
		if time.Now().After(end) {
			t.Fatalf("%s: still generation %d, refused %v", what, s.Generation, s.Refused)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestLiveFollowsFiles(t *testing.T) {
	dir := t.TempDir()
	path := write(t, dir, "config.toml", "version = 4\nimports = [\"more/*.toml\"]\n[debug]\nlevel = \"warn\"\n")
	n := startLive(t, path)

	write(t, dir, "config.toml", "version = 4\nimports = [\"more/*.toml\"]\n[debug]\nlevel = \"debug\"\n")
	n.until(t, "a changed file", func(s LiveState) bool { return s.Generation == 2 && s.Config.LogLevel == "debug" })
	write(t, dir, "more/10.toml", "[debug]\nlevel = \"error\"\n")
	n.until(t, "a drop-in in a new folder", func(s LiveState) bool { return s.Generation == 3 && s.Config.LogLevel == "error" })

	write(t, dir, "more/10.toml", "[debug]\nlevl = \"error\"\n")
	s := n.until(t, "a bad file", func(s LiveState) bool { return s.Refused != nil })
	if s.Generation != 3 || s.Config.LogLevel != "error" || !strings.Contains(s.Refused.Error(), `did you mean "level"?`) {
		t.Errorf("after a bad file: %d, %s, %v", s.Generation, s.Config.LogLevel, s.Refused)
	}
	write(t, dir, "more/10.toml", "[debug]\nlevel = \"error\"\n")
	s = n.until(t, "the file is as it was", func(s LiveState) bool { return s.Refused == nil })
	if s.Generation != 3 || len(n.applied) != 2 {
		t.Errorf("the same again came into force: generation %d, applied %d", s.Generation, len(n.applied))
	}
	if err := os.RemoveAll(filepath.Join(dir, "more")); err != nil {
		t.Fatal(err)
	}
	n.until(t, "the drop-in is gone", func(s LiveState) bool { return s.Generation == 4 && s.Config.LogLevel == "debug" })
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	s = n.until(t, "the file is gone", func(s LiveState) bool { return s.Refused != nil })
	if !errors.Is(s.Refused, os.ErrNotExist) || s.Config.LogLevel != "debug" {
		t.Errorf("without its file: %+v", s.Refused)
	}
}

func TestLiveWhenTold(t *testing.T) {
	n := startLive(t, write(t, t.TempDir(), "config.toml", "version = 4\n"))
	n.Reload() // though nothing has changed
	n.until(t, "told", func(s LiveState) bool { return s.Generation == 2 })

	n.mu.Lock()
	n.refuse = errors.New("no such handler")
	n.mu.Unlock()
	n.Reload()
	s := n.until(t, "what cannot be applied", func(s LiveState) bool { return s.Refused != nil })
	if s.Generation != 2 || s.Refused.Error() != "no such handler" {
		t.Errorf("got %+v", s)
	}
}

func TestLiveTellsWhatWaits(t *testing.T) {
	n := startLive(t, write(t, t.TempDir(), "config.toml", "version = 4\n"))
	write(t, filepath.Dir(n.path), "config.toml", `version = 4
root = "/elsewhere"
temp = "/nowhere"
[debug]
level = "debug"
[proxy_plugins.nydus]
type = "snapshot"
address = "/run/nydus.sock"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata]
runtime_type = "io.containerd.kata.v2"
`)
	s := n.until(t, "a changed file", func(s LiveState) bool { return s.Generation == 2 })
	same(t, "waiting", s.Waiting, []string{"proxy_plugins.nydus.address", "proxy_plugins.nydus.type", "root"})
	write(t, filepath.Dir(n.path), "config.toml", "version = 4\n")
	s = n.until(t, "changed back", func(s LiveState) bool { return s.Generation == 3 })
	same(t, "waiting", len(s.Waiting), 0)
}

func TestDeprecatedCanBeIgnored(t *testing.T) {
	const mirrors = `version = 3
[plugins."io.containerd.cri.v1.images".registry.mirrors.x]
endpoint = ["https://x"]
[plugins."io.containerd.cri.v1.runtime"]
ignore_deprecation_warnings = [%s]
[timeouts]
x = "1s"
`
	for list, want := range map[string]int{"": 1, `'plugins."io.containerd.cri.v1.images".registry.mirrors'`: 0, `"*"`: 0, `"other"`: 1} {
		c := load(t, strings.ReplaceAll(mirrors, "%s", list))
		if got := c.Deprecated(); len(got) != want || len(c.Warnings) != 2 {
			t.Errorf("with %s: %v of %v", list, got, c.Warnings)
		}
	}
}
