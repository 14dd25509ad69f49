package watch

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// A folder is followed before it is there, while it is replaced, and when it
// comes again.
func TestFolder(t *testing.T) {
	base := t.TempDir()
	dir := filepath.Join(base, "a", "b")
	told := make(chan struct{}, 100)
	w, err := Folder(dir, func() { told <- struct{}{} })
	if err != nil {
		t.Fatal(err)
	}
	wait := func(what string, do func() error) {
		t.Helper()
		for len(told) > 0 {
			<-told
		}
		if err := do(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-told:
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: nothing was told", what)
		}
	}
	write := func(name string) func() error {
		return func() error { return os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600) }
	}
	wait("the folder appears", func() error { return os.MkdirAll(dir, 0o755) })
	wait("a file appears", write("f"))
	wait("a file changes", write("f"))
	wait("a file is replaced", func() error { return os.Rename(filepath.Join(dir, "f"), filepath.Join(dir, "g")) })
	wait("the folder moves away", func() error { return os.Rename(dir, dir+"2") })
	wait("another comes in its place", func() error { return os.Mkdir(dir, 0o755) })
	wait("a file in that one", write("h"))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	for len(told) > 0 {
		<-told
	}
	if err := write("i")(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-told:
		t.Error("told after the end")
	case <-time.After(3 * settleTime):
	}
}

// A folder in which something is written all the time, such as a log beside
// the configuration, hides no change.
func TestBusyFolder(t *testing.T) {
	dir := t.TempDir()
	told := make(chan struct{}, 1000)
	w, err := Folder(dir, func() { told <- struct{}{} })
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	tick := time.NewTicker(settleTime / 10)
	defer tick.Stop()
	limit := time.After(10 * time.Second)
	for {
		select {
		case <-told:
			return
		case <-limit:
			t.Fatal("nothing was told while a file changed")
		case <-tick.C:
			if err := os.WriteFile(filepath.Join(dir, "log"), []byte(time.Now().String()), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
}
