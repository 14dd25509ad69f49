package container

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestSealed(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "program")
	install := func(from string) {
		t.Helper()
		b, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(program+".new", b, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(program+".new", program); err != nil {
			t.Fatal(err)
		}
	}
	runs := func(path string) bool { return exec.Command(path).Run() == nil }

	install("/bin/true")
	var s sealed
	path, release := s.path(program)
	defer release()
	if path == program {
		t.Fatal("a small program was not copied")
	}
	if !runs(path) {
		t.Error("the copy of true failed")
	}
	if f, err := os.OpenFile(path, os.O_WRONLY, 0); err == nil {
		if _, err := f.Write([]byte("overwritten")); err == nil {
			t.Error("the copy can be written to")
		}
		f.Close()
	}
	again, release := s.path(program)
	defer release()
	if again != path {
		t.Error("the program was copied a second time")
	}

	install("/bin/false")
	upgraded, release := s.path(program)
	defer release()
	if runs(upgraded) {
		t.Error("after an upgrade the old program still runs")
	}
	if !runs(path) {
		t.Error("an execution of the old copy that was under way failed")
	}
}

func TestSealedLeavesAlone(t *testing.T) {
	dir := t.TempDir()
	script := filepath.Join(dir, "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nexit 0\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	big := filepath.Join(dir, "big")
	if err := os.WriteFile(big, []byte("\x7fELF"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(big, maxSealed+1); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{script, big, filepath.Join(dir, "absent")} {
		var s sealed
		path, release := s.path(p)
		release()
		if path != p {
			t.Errorf("%s is run as %s, want itself", filepath.Base(p), path)
		}
	}
}
