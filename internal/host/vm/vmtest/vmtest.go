// Package vmtest makes a small guest for tests of the rooms around it: its
// first program does what a test tells it over a serial port, one line a
// command. It stands in for the agent, so that those rooms can be tested with a
// real machine and without containers.
package vmtest

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cloister.dev/internal/host/proc"
	"cloister.dev/internal/host/vm/image"
	"cloister.dev/internal/host/vm/image/build"
	"cloister.dev/internal/host/vm/machine"
)

// ControlPort is where the first program takes commands.
const ControlPort = "test"

// bootTime bounds what a guest needs to come up on a busy machine.
const bootTime = 90 * time.Second

// Top is the project's folder.
func Top() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Join(filepath.Dir(file), "../../../..")
}

// QEMU finds the program, or skips the test.
func QEMU(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("machines are started by root")
	}
	name := map[string]string{"amd64": "qemu-system-x86_64", "arm64": "qemu-system-aarch64"}[runtime.GOARCH]
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skip("QEMU is not installed: test/setup vm")
	}
	return path
}

// Guest builds the guest whose first program Session talks with, once for all
// tests of the project.
func Guest(t testing.TB) image.Guest {
	t.Helper()
	QEMU(t)
	cache := guestCache(t)
	defer lock(t, cache)()
	agent := filepath.Join(cache, "testinit")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", agent, "./internal/host/vm/vmtest/testinit")
	cmd.Dir = Top()
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the test's agent: %v\n%s", err, out)
	}
	name := "test-" + digest(t, agent)[:16]
	if g, err := image.Open(cache, name); err == nil {
		return g
	}
	return buildGuest(t, cache, name, agent)
}

// GuestOf builds a guest with an agent, for one test.
func GuestOf(t testing.TB, agent string) image.Guest {
	t.Helper()
	QEMU(t)
	defer lock(t, guestCache(t))()
	return buildGuest(t, t.TempDir(), "of-a-test", agent)
}

// lock keeps other tests out of the cache.
func lock(t testing.TB, cache string) (unlock func()) {
	t.Helper()
	f, err := os.Create(filepath.Join(cache, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		t.Fatal(err)
	}
	return func() { f.Close() }
}

func buildGuest(t testing.TB, root, name, agent string) image.Guest {
	t.Helper()
	g, err := build.Guest(t.Context(), build.Options{Root: root, Name: name, Agent: agent, Cache: filepath.Join(guestCache(t), "packages")})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// guestCache is the folder of what is made or fetched once.
func guestCache(t testing.TB) string {
	t.Helper()
	if _, err := exec.LookPath("apt-get"); err != nil {
		t.Skip("the guest's kernel is a Debian package, and there is no apt-get here")
	}
	if _, err := exec.LookPath("crun"); err != nil {
		t.Skip("crun is not installed: test/setup oci")
	}
	cache := filepath.Join(Top(), ".cache", "guests")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		t.Fatal(err)
	}
	return cache
}

// digest tells guests apart that were made of other programs.
func digest(t testing.TB, agent string) string {
	h := sha256.New()
	files, err := filepath.Glob(filepath.Join(Top(), "internal/host/vm/image/*.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range append(files, agent) {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		h.Write(b)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Reaper runs a reaper until the test has ended. The test may not use os/exec
// meanwhile.
func Reaper(t testing.TB) *proc.Reaper {
	t.Helper()
	r, err := proc.NewReaper(slog.New(slog.DiscardHandler), filepath.Join(t.TempDir(), "exits"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var ran sync.WaitGroup
	ran.Go(func() { r.Run(ctx) })
	t.Cleanup(func() { cancel(); ran.Wait() })
	return r
}

// Dir is a private folder with a short path.
func Dir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "clvm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// Config is a small machine that boots the guest.
func Config(t testing.TB, kind string) machine.Config {
	t.Helper()
	g, qemu := Guest(t), QEMU(t)
	return machine.Config{ID: "test-" + kind, QEMU: qemu, Type: kind, Accel: machine.TCG, Kernel: g.Kernel, Initrd: g.Initrd,
		Size: machine.Size{CPUs: 1, Memory: 256 << 20}, Dir: Dir(t)}
}

// Session talks to the guest's first program.
type Session struct {
	t       testing.TB
	Machine machine.Machine
	conn    *os.File
	lines   *bufio.Reader
}

// Boot starts a machine and waits until the guest takes commands.
func Boot(t testing.TB, r *proc.Reaper, c machine.Config) *Session {
	t.Helper()
	m, err := machine.Start(t.Context(), r, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Kill(context.Background()); err != nil {
			t.Error(err)
		}
		m.Close()
	})
	return Talk(t, m)
}

// Talk waits until the guest of a machine takes commands.
func Talk(t testing.TB, m machine.Machine) *Session {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	defer theirs.Close()
	t.Cleanup(func() { ours.Close() })
	if err := m.AddPort(t.Context(), machine.Port{Name: ControlPort, Direction: machine.BothWays, File: theirs}); err != nil {
		t.Fatal(err)
	}
	s := &Session{t: t, Machine: m, conn: ours, lines: bufio.NewReader(ours)}
	if err := ours.SetReadDeadline(time.Now().Add(bootTime)); err != nil {
		t.Fatal(err)
	}
	if line, err := s.lines.ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("the guest says %q, %v; its console:\n%s", line, err, strings.Join(machine.LastLines(m.Console(context.Background()), 50), "\n"))
	}
	return s
}

// Do has the guest do something and gives its answer.
func (s *Session) Do(command string, args ...string) (string, error) {
	if _, err := io.WriteString(s.conn, strings.Join(append([]string{command}, args...), "\t")+"\n"); err != nil {
		return "", err
	}
	if err := s.conn.SetReadDeadline(time.Now().Add(bootTime)); err != nil {
		return "", err
	}
	line, err := s.lines.ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("%s: %w", command, err)
	}
	status, text, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
	text = strings.ReplaceAll(text, "\x00", "\n")
	if status != "ok" {
		return text, fmt.Errorf("%s: %s", command, text)
	}
	return text, nil
}

// Must is Do for what has to work.
func (s *Session) Must(command string, args ...string) string {
	s.t.Helper()
	out, err := s.Do(command, args...)
	if err != nil {
		s.t.Fatalf("in the guest: %v; its console:\n%s", err, strings.Join(machine.LastLines(s.Machine.Console(context.Background()), 50), "\n"))
	}
	return out
}

// Conn is the raw connection of the control port.
func (s *Session) Conn() (net.Conn, error) { return net.FileConn(s.conn) }

// Virtiofsd finds the program, or skips the test.
func Virtiofsd(t testing.TB) string {
	t.Helper()
	for _, path := range [...]string{"/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"} {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	t.Skip("virtiofsd is not installed: test/setup vm")
	return ""
}
