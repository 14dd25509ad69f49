package elf

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

func run(t *testing.T, prog []byte, err error) int {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "prog")
	if err := os.WriteFile(path, prog, 0o700); err != nil {
		t.Fatal(err)
	}
	err = exec.Command(path).Run()
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		return ee.ExitCode()
	}
	if err != nil {
		t.Fatal(err)
	}
	return 0
}

func TestOpen(t *testing.T) {
	for path, want := range map[string]int{
		"/dev/null":            0,
		"/nowhere/at/all":      int(syscall.ENOENT),
		"/dev/null/underneath": int(syscall.ENOTDIR),
	} {
		p, err := Open(path, syscall.O_RDONLY)
		if got := run(t, p, err); got != want {
			t.Errorf("open %s: exit %d, want %d", path, got, want)
		}
	}
}

// TestAssemblers pins the machine code of both machines: the other one cannot
// be run here.
func TestAssemblers(t *testing.T) {
	for _, a := range []assembler{amd64{}, arm64{}} {
		p := &Program{asm: a, labels: map[string]int{}}
		p.Call(1, Int(0), Str("x")).IfZero("end").Goto("end").Label("end").hold()
		b := p.Bytes()
		if len(b) > 1024 || string(b[:4]) != "\x7fELF" {
			t.Errorf("%T: %d bytes", a, len(b))
		}
	}
}
