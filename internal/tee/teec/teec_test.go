package teec_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/tee/teec"
	"cloister.dev/internal/tee/teec/teectest"
)

func TestMemory(t *testing.T) {
	lib := teectest.Build(t)
	lib.Say(t, "total=2097152 free=1048576")
	c := lib.Client(t)
	for range 3 {
		m, err := c.Memory(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if m.TotalKiB != 2097152 || m.FreeKiB != 1048576 {
			t.Errorf("memory: %+v", m)
		}
	}
	want := strings.Repeat("TEEC_InitializeContext\nTEEC_OpenSession\nTEEC_InvokeCommand\nTEEC_CloseSession\nTEEC_FinalizeContext\n", 3)
	if got := lib.Calls(t); got != want {
		t.Errorf("calls:\n%swant:\n%s", got, want)
	}
	// The original divides by 1024 first; so figures in bytes lose what is below a KiB.
	lib.Say(t, "total=2000 free=1999 unit=1")
	if m, err := c.Memory(t.Context()); err != nil || m.TotalKiB != 2000 || m.FreeKiB != 1999 {
		t.Errorf("memory in bytes: %+v, %v", m, err)
	}
	lib.Say(t, "noise unit=1 total=2048 free=1024")
	if m, err := c.Memory(t.Context()); err != nil || m.TotalKiB != 2048 {
		t.Errorf("a library that prints: %+v, %v", m, err)
	}
}

func TestErrors(t *testing.T) {
	lib := teectest.Build(t)
	c := lib.Client(t)
	tests := []struct {
		script, want string
		class        error
		left         string // calls after the failure
	}{
		{"fail=TEEC_InitializeContext:ffff000e:0", "is teecd running", errdefs.ErrUnavailable, "TEEC_InitializeContext\n"},
		{"fail=TEEC_OpenSession:ffff0001:4", "does not take this caller", errdefs.ErrFailedPrecondition, "TEEC_FinalizeContext\n"},
		{"fail=TEEC_OpenSession:ffff000c:3", "out of memory", errdefs.ErrResourceExhausted, "TEEC_FinalizeContext\n"},
		{"fail=TEEC_InvokeCommand:ffff3024:3", "the trusted application died", errdefs.ErrUnavailable, "TEEC_CloseSession\nTEEC_FinalizeContext\n"},
		{"fail=TEEC_InvokeCommand:12345678:2", "gave 0x12345678, origin 2", errdefs.ErrUnavailable, "TEEC_CloseSession\nTEEC_FinalizeContext\n"},
		{"wrap", "makes no sense", errdefs.ErrFailedPrecondition, "TEEC_CloseSession\nTEEC_FinalizeContext\n"},
	}
	for _, tt := range tests {
		t.Run(tt.script, func(t *testing.T) {
			lib.Say(t, tt.script)
			_, err := c.Memory(t.Context())
			if !errors.Is(err, tt.class) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v", err)
			}
			if calls := lib.Calls(t); !strings.HasSuffix(calls, tt.left) {
				t.Errorf("calls:\n%s", calls)
			}
			lib.Say(t, "")
			if _, err := c.Memory(t.Context()); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

// The library takes its process with it, and nothing else.
func TestDeaths(t *testing.T) {
	lib := teectest.Build(t)
	c := lib.Client(t)
	for _, call := range []string{"TEEC_InitializeContext", "TEEC_OpenSession", "TEEC_InvokeCommand", "TEEC_CloseSession"} {
		for script, want := range map[string]string{"crash=": "SIGSEGV", "exit=": "exit status 7", "hang=": "no answer in time"} {
			t.Run(script+call, func(t *testing.T) {
				lib.Say(t, script+call)
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				if script != "hang=" {
					ctx, cancel = context.WithTimeout(t.Context(), 20*time.Second)
				}
				defer cancel()
				start := time.Now()
				_, err := c.Memory(ctx)
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("got %v", err)
				}
				if took := time.Since(start); took > 10*time.Second {
					t.Errorf("the answer took %v", took)
				}
				lib.Say(t, "")
				if _, err := c.Memory(t.Context()); err != nil {
					t.Errorf("afterwards: %v", err)
				}
			})
		}
	}
}

// One caller's hang makes the others wait no longer than they want to.
func TestHangBesideOthers(t *testing.T) {
	lib := teectest.Build(t)
	lib.Say(t, "hang=TEEC_OpenSession")
	c := lib.Client(t)
	var all sync.WaitGroup
	for range 10 {
		all.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
			defer cancel()
			if _, err := c.Memory(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v", err)
			}
		})
	}
	start := time.Now()
	all.Wait()
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("ten callers took %v", took)
	}
}

// A helper that waits in the kernel does not die when it is killed. Who asks
// learns that in time, no second one is started, and all is well once it is gone.
func TestHelperThatCannotBeKilled(t *testing.T) {
	const hierarchy = "/sys/fs/cgroup/freezer" // of cgroup v1, which holds back even SIGKILL
	if _, err := os.Stat(filepath.Join(hierarchy, "cgroup.procs")); err != nil || os.Geteuid() != 0 {
		t.Skip("needs root and the freezer of cgroup v1, which stands in for a driver that hangs")
	}
	group := filepath.Join(hierarchy, "cl-teec-"+filepath.Base(t.TempDir())+strconv.Itoa(os.Getpid()))
	if err := os.Mkdir(group, 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(file, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(group, file), []byte(text), 0); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := os.Remove(group); err != nil {
			t.Error(err)
		}
	})
	lib := teectest.Build(t)
	c := lib.Client(t)
	if _, err := c.Memory(t.Context()); err != nil {
		t.Fatal(err)
	}
	helpers := processes(t, lib.Options().Program)
	if len(helpers) != 1 {
		t.Fatalf("helpers are %v", helpers)
	}
	write("cgroup.procs", helpers[0])
	write("freezer.state", "FROZEN")
	defer write("freezer.state", "THAWED")
	for _, want := range []string{"no answer in time", "the TEE hangs"} {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		start := time.Now()
		_, err := c.Memory(ctx)
		cancel()
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), helpers[0]) {
			t.Errorf("got %v", err)
		}
		if took := time.Since(start); took > 10*time.Second {
			t.Errorf("the answer took %v", took)
		}
	}
	if now := processes(t, lib.Options().Program); len(now) != 1 {
		t.Errorf("helpers are %v", now)
	}
	write("freezer.state", "THAWED")
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		_, err := c.Memory(t.Context())
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("afterwards: %v", err)
		}
	}
}

// processes lists those of a program.
func processes(t *testing.T, program string) (pids []string) {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if exe, err := os.Readlink(l); err == nil && exe == program {
			pids = append(pids, filepath.Base(filepath.Dir(l)))
		}
	}
	return pids
}

func TestBadOptions(t *testing.T) {
	lib := teectest.Build(t)
	dir := t.TempDir()
	text := filepath.Join(dir, "text.so")
	if err := os.WriteFile(text, []byte("not a library"), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name   string
		change func(o *teec.Options)
		want   string
		atOnce bool
	}{
		{"no such library", func(o *teec.Options) { o.Library = "/nowhere/libteec.so" }, "/nowhere/libteec.so", false},
		{"not a library", func(o *teec.Options) { o.Library = text }, "text.so", false},
		{"another library", func(o *teec.Options) { o.Library = "libm.so.6" }, "it is not a TEE client library", false},
		{"another UUID", func(o *teec.Options) { o.UUID = "00000000-0000-0000-0000-000000000000" }, "no trusted application of this UUID", false},
		{"not a UUID", func(o *teec.Options) { o.UUID = "e3d37f4a" }, "ta_uuid", true},
		{"no library", func(o *teec.Options) { o.Library = "" }, "library is empty", true},
		{"a login that does not exist", func(o *teec.Options) { o.Login = "root" }, "login", true},
		{"no helper", func(o *teec.Options) { o.Program = "/nowhere/cloister-teec" }, "/nowhere/cloister-teec", false},
		{"a helper that is none", func(o *teec.Options) { o.Program = "/bin/true" }, "ended its process", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o := lib.Options()
			tt.change(&o)
			c, err := teec.New(o)
			if err == nil {
				defer c.Close()
				_, err = c.Memory(t.Context())
			} else if !tt.atOnce {
				t.Errorf("refused before it was tried: %v", err)
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// A helper whose client is gone goes, too, even while the library hangs.
func TestHelperEndsWithItsClient(t *testing.T) {
	lib := teectest.Build(t)
	lib.Say(t, "hang=TEEC_OpenSession")
	cmd := exec.Command(lib.Options().Program)
	in, to, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	from, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	cmd.ExtraFiles, cmd.Env = []*os.File{in, out}, append(os.Environ(), "CLOISTER_TEEC=1")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	in.Close()
	out.Close()
	if _, err := to.WriteString(`{"op":"memory","options":{"Library":"` + lib.Options().Library + `","UUID":"` + lib.Options().UUID + `","Login":"identify"}}` + "\n"); err != nil {
		t.Fatal(err)
	}
	lib.Wait(t, "TEEC_OpenSession")
	to.Close()
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("it ended with %v", err)
		}
	case <-time.After(10 * time.Second):
		_ = cmd.Process.Kill()
		t.Error("it did not end")
	}
	if out, err := exec.Command(lib.Options().Program).CombinedOutput(); err == nil || !strings.Contains(string(out), "started by cloister") {
		t.Errorf("by hand: %v, %s", err, out)
	}
}
