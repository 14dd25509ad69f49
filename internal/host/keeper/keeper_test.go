package keeper

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFiles plays two lives of a server against one keeper.
func TestFiles(t *testing.T) {
	k := &keeper{Options: Options{Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler)}, files: map[string]int{}}
	life := func(f func(*Store, map[string]*os.File)) { t.Helper(); life(t, k, f) }
	open := func(text string) *os.File { t.Helper(); return open(t, k.Dir, text) }
	life(func(s *Store, held map[string]*os.File) {
		if len(held) != 0 {
			t.Errorf("held at first: %v", held)
		}
		for _, name := range []string{"a/1", "a/2", "b/1", "c"} {
			s.Put(name, open(strings.ReplaceAll(name, "/", "-")))
		}
		s.Put("c", open("newer"))
		s.Clear("a/")
		s.Drop("nothing")
		s.Put(strings.Repeat("x", maxMessage), open("too-long"))
	})
	if k.quit.Load() {
		t.Error("told to quit")
	}
	// The name that was too long ended that life's sending, not the keeper.
	life(func(s *Store, held map[string]*os.File) {
		got := map[string]string{}
		for name, f := range held {
			b := make([]byte, 20)
			n, _ := f.Read(b)
			got[name] = string(b[:n])
		}
		if len(got) != 2 || got["b/1"] != "b-1" || got["c"] != "newer" {
			t.Errorf("held: %v", got)
		}
		s.Drop("b/1")
		s.Drop("c")
		s.Quit()
	})
	if len(k.files) != 0 || !k.quit.Load() {
		t.Errorf("files %v, quit %v", k.files, k.quit.Load())
	}
	var none *Store // a server without a keeper
	none.Put("x", open("x"))
	none.Drop("x")
	none.Clear("")
	none.Quit()
}

// life connects a server to k, lets f use it, and ends it as a kill does.
func life(t *testing.T, k *keeper, f func(*Store, map[string]*os.File)) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	k.giveBack(pair[0])
	ended := make(chan struct{})
	go k.receive(pair[0], ended)
	s, held, err := Connect(pair[1], slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	f(s, held)
	for _, h := range held {
		h.Close()
	}
	unix.Close(pair[1])
	<-ended
}

// open makes a file that holds its own name.
func open(t *testing.T, dir, name string) *os.File {
	t.Helper()
	p := filepath.Join(dir, name)
	if err := os.WriteFile(p, []byte(name), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}
