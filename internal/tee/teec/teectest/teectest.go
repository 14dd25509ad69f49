// Package teectest builds a stand-in for a vendor's TEE client library, in C,
// and the helper program, for the tests of those who use them. It needs cc.
package teectest

import (
	_ "embed" // the library's source
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cloister.dev/internal/tee/teec"
)

//go:embed libteec.c.txt
var source string

// Library is a built stand-in.
type Library struct {
	dir  string
	path string
	prog string
}

// Build compiles library and helper. The environment of the test is changed:
// the helper inherits from it where the library's script is.
func Build(t testing.TB) *Library {
	t.Helper()
	cc, err := exec.LookPath("cc")
	if err != nil {
		t.Skip("a C compiler builds the stand-in for libteec.so:", err)
	}
	dir := t.TempDir()
	l := &Library{dir: dir, path: filepath.Join(dir, "libteec.so"), prog: filepath.Join(dir, teec.Helper)}
	c := filepath.Join(dir, "libteec.c")
	if err := os.WriteFile(c, []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, nil, cc, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", l.path, c)
	run(t, []string{"CGO_ENABLED=0"}, "go", "build", "-o", l.prog, "cloister.dev/cmd/"+teec.Helper)
	setenv(t, "STANDIN", filepath.Join(dir, "script"))
	setenv(t, "STANDIN_LOG", filepath.Join(dir, "calls"))
	l.Say(t, "")
	return l
}

type setter interface{ Setenv(key, value string) }

func setenv(t testing.TB, key, value string) { t.(setter).Setenv(key, value) }

func run(t testing.TB, env []string, program string, args ...string) {
	t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", program, err, out)
	}
}

// Options reach the stand-in as a vendor's library is reached by default.
func (l *Library) Options() teec.Options {
	const uuid = "e3d37f4a-f24c-48d0-8884-3bdd6c44e988"
	return teec.Options{Program: l.prog, Library: l.path, UUID: uuid, TAPath: "/data/" + uuid + ".sec", Login: teec.LoginIdentify}
}

// Client asks the stand-in until the test ends.
func (l *Library) Client(t testing.TB) *teec.Client {
	t.Helper()
	c, err := teec.New(l.Options())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// Say replaces the script and forgets the calls; see the source for its words.
func (l *Library) Say(t testing.TB, script string) {
	t.Helper()
	fresh := filepath.Join(l.dir, "script.new")
	if err := os.WriteFile(fresh, []byte(script), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(fresh, filepath.Join(l.dir, "script")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(l.dir, "calls"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Calls are those since the last script, a line each.
func (l *Library) Calls(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(l.dir, "calls"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// Wait waits until a call was made.
func (l *Library) Wait(t testing.TB, call string) {
	t.Helper()
	tick, limit := time.NewTicker(5*time.Millisecond), time.After(20*time.Second)
	defer tick.Stop()
	for !strings.Contains(l.Calls(t), call+"\n") {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatalf("%s was not called", call)
		}
	}
}
