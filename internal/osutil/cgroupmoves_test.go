package osutil

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// procsFile stands in for cgroup.procs: each write is a line that it gives.
func procsFile(t *testing.T) (m *CgroupMoves, writes chan struct{}) {
	path := filepath.Join(t.TempDir(), "cgroup.procs")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0) // both ends: nobody waits for the other
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	writes = make(chan struct{}, 1000)
	go func() {
		defer close(writes)
		for b := make([]byte, 1); ; {
			if _, err := f.Read(b); err != nil || b[0] != '0' {
				return
			}
			writes <- struct{}{}
		}
	}()
	return &CgroupMoves{procs: path, log: slog.New(slog.DiscardHandler)}, writes
}

func TestCgroupMovesAreQuickWhileHeld(t *testing.T) {
	m, writes := procsFile(t)
	first, second := m.Hold(), m.Hold()
	<-writes
	first()
	for range 10 { // more than could be under way
		<-writes
	}
	second()
	m.keepers.Wait()
	for len(writes) > 0 {
		<-writes
	}
	release := m.Hold() // begins anew
	<-writes
	release()
	m.Close()
}

func TestCgroupMovesAreQuickForAnExpectedStart(t *testing.T) {
	m, writes := procsFile(t)
	began := time.Now()
	m.Expect()
	<-writes
	m.Expect()
	m.keepers.Wait()
	if d := time.Since(began); d < expectTime {
		t.Errorf("given up after %v, a start may come for %v", d, expectTime)
	}
	m.Expect()
	began = time.Now()
	m.Close()
	if d := time.Since(began); d >= expectTime/2 {
		t.Errorf("Close waited %v for a start that did not come", d)
	}
	for len(writes) > 0 {
		<-writes
	}
	m.Expect()
	defer m.Hold()()
	m.Close()
	if len(writes) > 0 {
		t.Error("written after Close")
	}
}

func TestCgroupMovesLeftAlone(t *testing.T) {
	var m *CgroupMoves
	m.Expect()
	m.Hold()()
	m = &CgroupMoves{} // no cgroup found
	m.Expect()
	m.Hold()()
	m.Close()
}

func TestCgroupMovesRefused(t *testing.T) {
	m := &CgroupMoves{procs: t.TempDir(), log: slog.New(slog.DiscardHandler)}
	m.Expect()
	m.keepers.Wait() // at once, and not after expectTime
	if !m.refused || m.keeping || time.Now().After(m.expected) {
		t.Errorf("refused %v, keeping %v", m.refused, m.keeping)
	}
	m.Hold()()
	m.Close()
}

func TestOwnProcs(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"pids/a/b", "unified/u", "u"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, d, "cgroup.procs"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct{ self, want string }{
		{"5:pids:/a/b\n0::/u\n", "pids/a/b/cgroup.procs"},
		{"6:name=systemd:/s\n5:pids:/a/b\n", "pids/a/b/cgroup.procs"},
		{"0::/u\n", "u/cgroup.procs"},
		{"0::/elsewhere\n", ""},
		{"nonsense\n", ""},
	} {
		self := filepath.Join(dir, "self")
		if err := os.WriteFile(self, []byte(tt.self), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := strings.TrimPrefix(ownProcs(self, dir), dir+"/"); got != tt.want {
			t.Errorf("%q: %q, want %q", tt.self, got, tt.want)
		}
	}
}
