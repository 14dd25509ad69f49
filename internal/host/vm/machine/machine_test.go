package machine_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cloister.dev/internal/host/vm/machine"
	"cloister.dev/internal/host/vm/vmtest"
)

func TestBoot(t *testing.T) {
	for _, kind := range []string{machine.Microvm, machine.Q35} {
		t.Run(kind, func(t *testing.T) {
			c := vmtest.Config(t, kind)
			r := vmtest.Reaper(t)
			began := time.Now()
			s := vmtest.Boot(t, r, c)
			t.Logf("up after %s", time.Since(began))
			var host unix.Utsname
			if err := unix.Uname(&host); err != nil {
				t.Fatal(err)
			}
			if got := s.Must("uname"); got == unix.ByteSliceToString(host.Release[:]) {
				t.Errorf("the guest runs the host's kernel %s", got)
			}
			if ports, err := s.Machine.Ports(t.Context()); err != nil || !slices.Equal(ports, []string{vmtest.ControlPort}) {
				t.Errorf("ports: %v %v", ports, err)
			}
			end(t, s, "poweroff", "powered off")
		})
	}
}

// end has the guest end itself.
func end(t *testing.T, s *vmtest.Session, how, reason string) {
	t.Helper()
	_, _ = s.Do("end", how)
	select {
	case <-s.Machine.Done():
	case <-time.After(30 * time.Second):
		t.Fatal("the machine does not end")
	}
	if e := s.Machine.Exit(); !strings.Contains(e.Reason, reason) {
		t.Errorf("the machine ended because %q, not %q", e.Reason, reason)
	}
}

// TestPorts copies through the guest from a pipe to a pipe, and closes.
func TestPorts(t *testing.T) {
	s := vmtest.Boot(t, vmtest.Reaper(t), vmtest.Config(t, machine.Microvm))
	inR, inW := pipe(t)
	outR, outW := pipe(t)
	for _, p := range []machine.Port{{Name: "in", Direction: machine.ToGuest, File: inR}, {Name: "out", Direction: machine.FromGuest, File: outW}} {
		if err := s.Machine.AddPort(t.Context(), p); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Machine.AddPort(t.Context(), machine.Port{Name: "out", Direction: machine.FromGuest, File: outW}); err == nil {
		t.Error("a second port of the same name was added")
	}
	inR.Close()
	outW.Close()
	const size = 8 << 20
	go func() {
		inW.Write(make([]byte, size))
		inW.Close()
	}()
	got := make(chan int64, 1)
	go func() { n, _ := io.Copy(io.Discard, outR); got <- n }()
	if n := s.Must("copy", "in", "out"); n != "8388608" {
		t.Errorf("the guest copied %s bytes", n)
	}
	for _, name := range []string{"in", "out", "never-there"} {
		if err := s.Machine.RemovePort(t.Context(), name); err != nil {
			t.Error(err)
		}
	}
	// The last copy of the pipe's end was QEMU's.
	select {
	case n := <-got:
		if n != size {
			t.Errorf("%d bytes came out", n)
		}
	case <-time.After(20 * time.Second):
		t.Error("QEMU keeps a removed port's file")
	}
	if ports, err := s.Machine.Ports(t.Context()); err != nil || !slices.Equal(ports, []string{vmtest.ControlPort}) {
		t.Errorf("ports: %v %v", ports, err)
	}
}

// TestPortThatWasCutOff finds a port that whoever added it was killed over: the
// character device is there, with the file, and no device yet.
func TestPortThatWasCutOff(t *testing.T) {
	r := vmtest.Reaper(t)
	s := vmtest.Boot(t, r, vmtest.Config(t, machine.Microvm))
	state := s.Machine.State()
	s.Machine.Close()
	c, err := net.Dial("unix", filepath.Join(state.Dir, "qmp.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	answers := bufio.NewScanner(c)
	for _, say := range []string{"", `{"execute": "qmp_capabilities"}`,
		`{"execute": "chardev-add", "arguments": {"id": "c-cut", "backend": {"type": "null", "data": {}}}}`} {
		if _, err := io.WriteString(c, say); err != nil {
			t.Fatal(err)
		}
		if !answers.Scan() || strings.Contains(answers.Text(), `"error"`) {
			t.Fatalf("%s: %s %v", say, answers.Text(), answers.Err())
		}
	}
	c.Close()
	m, err := machine.Attach(t.Context(), r, state, nil)
	if err != nil {
		t.Fatal(err)
	}
	s.Machine = m
	if ports, err := m.Ports(t.Context()); err != nil || !slices.Contains(ports, "cut") {
		t.Errorf("ports: %v %v", ports, err)
	}
	if err := m.RemovePort(t.Context(), "cut"); err != nil {
		t.Error(err)
	}
	_, w := pipe(t)
	if err := m.AddPort(t.Context(), machine.Port{Name: "cut", Direction: machine.FromGuest, File: w}); err != nil {
		t.Errorf("add it again: %v", err)
	}
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// TestAttach finds a machine again as after a crash, by its state and by its
// folder alone.
func TestAttach(t *testing.T) {
	r := vmtest.Reaper(t)
	s := vmtest.Boot(t, r, vmtest.Config(t, machine.Microvm))
	state := s.Machine.State()
	for _, st := range []machine.State{state, {ID: state.ID, Type: state.Type, Dir: state.Dir}} {
		s.Machine.Close()
		m, err := machine.Attach(t.Context(), r, st, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := m.State(); got.Pid != state.Pid || got.Start != state.Start {
			t.Errorf("found %+v, want %+v", got, state)
		}
		if ports, err := m.Ports(t.Context()); err != nil || len(ports) != 1 {
			t.Errorf("ports: %v %v", ports, err)
		}
		s.Machine = m
	}
	// The guest ends while nobody is attached: its reason is found afterwards.
	s.Machine.Close()
	c, err := s.Conn()
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(c, "end\tpanic\n")
	m, err := machine.Attach(t.Context(), r, state, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	select {
	case <-m.Done():
	case <-time.After(30 * time.Second):
		t.Fatal("a machine whose guest has panicked does not end")
	}
	if e := m.Exit(); !strings.Contains(e.Reason, "guest") {
		t.Errorf("reason %q", e.Reason)
	}
	if text := string(m.Console(t.Context())); !strings.Contains(text, "Attempted to kill init") {
		t.Errorf("the console lacks the panic:\n%s", text)
	}
	gone, err := machine.Attach(t.Context(), r, state, nil)
	if err != nil {
		t.Fatal(err)
	}
	<-gone.Done()
}

func TestKilled(t *testing.T) {
	s := vmtest.Boot(t, vmtest.Reaper(t), vmtest.Config(t, machine.Microvm))
	began := time.Now()
	if err := unix.Kill(s.Machine.State().Pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-s.Machine.Done()
	e := s.Machine.Exit()
	if e.Status != 137 || !strings.Contains(e.Reason, "SIGKILL") || time.Since(began) > 2*time.Second {
		t.Errorf("%+v after %s", e, time.Since(began))
	}
	if err := s.Machine.Pause(t.Context()); !errdefs.IsUnavailable(err) {
		t.Errorf("pause a dead machine: %v", err)
	}
}

// TestDisk plugs a disk into a running machine of each type.
func TestDisk(t *testing.T) {
	for _, kind := range []string{machine.Microvm, machine.Q35} {
		t.Run(kind, func(t *testing.T) {
			s := vmtest.Boot(t, vmtest.Reaper(t), vmtest.Config(t, kind))
			path := filepath.Join(t.TempDir(), "disk")
			if err := os.WriteFile(path, append([]byte("the disk's first bytes"), make([]byte, 1<<20)...), 0o600); err != nil {
				t.Fatal(err)
			}
			d := machine.Disk{ID: "layer-1", Path: path, ReadOnly: true}
			if err := s.Machine.AddDisk(t.Context(), d); err != nil {
				t.Fatal(err)
			}
			if err := s.Machine.AddDisk(t.Context(), d); err == nil {
				t.Error("the same disk was added twice")
			}
			for _, m := range []string{"virtio_scsi", "sd_mod"} {
				s.Must("modprobe", m)
			}
			await(t, s, "the disk", func() bool { out, _ := s.Do("ls", "/sys/block"); return strings.Contains(out, "sda") })
			if err := s.Machine.RemoveDisk(t.Context(), "layer-1"); err != nil {
				t.Fatal(err)
			}
			await(t, s, "the disk's end", func() bool { out, _ := s.Do("ls", "/sys/block"); return !strings.Contains(out, "sda") })
			if err := s.Machine.RemoveDisk(t.Context(), "layer-1"); err != nil {
				t.Error("remove an absent disk:", err)
			}
			d.Path = "/nowhere/at/all"
			if err := s.Machine.AddDisk(t.Context(), d); err == nil || !strings.Contains(err.Error(), "/nowhere/at/all") {
				t.Errorf("a disk that is not there: %v", err)
			}
		})
	}
}

func await(t *testing.T, s *vmtest.Session, what string, f func() bool) {
	t.Helper()
	for began := time.Now(); !f(); {
		if time.Since(began) > 20*time.Second {
			t.Fatalf("no sign of %s; console:\n%s", what, s.Machine.Console(context.Background()))
		}
	}
}

func TestResize(t *testing.T) {
	c := vmtest.Config(t, machine.Q35)
	c.MaxSize = machine.Size{CPUs: 2, Memory: 512 << 20}
	s := vmtest.Boot(t, vmtest.Reaper(t), c)
	s.Must("modprobe", "virtio_mem")
	for _, want := range []machine.Size{{CPUs: 2, Memory: 512 << 20}, {CPUs: 2, Memory: 256 << 20}} {
		got, err := s.Machine.Resize(t.Context(), want)
		if err != nil || got != want {
			t.Errorf("resized to %+v, not %+v: %v", got, want, err)
		}
	}
	if got := s.Must("online"); got != "0-1" {
		t.Errorf("the guest has the processors %s", got)
	}
	if _, err := s.Machine.Resize(t.Context(), machine.Size{CPUs: 3, Memory: 256 << 20}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("too large: %v", err)
	}
}

// TestBadInput: each fault is an error that names it, and nothing is left.
func TestBadInput(t *testing.T) {
	r := vmtest.Reaper(t)
	for name, c := range map[string]struct {
		change func(*machine.Config)
		says   string
	}{
		"no QEMU":        {func(c *machine.Config) { c.QEMU = "/nowhere/qemu" }, "/nowhere/qemu"},
		"no kernel":      {func(c *machine.Config) { c.Kernel = "/nowhere/kernel" }, "/nowhere/kernel"},
		"type":           {func(c *machine.Config) { c.Type = "pc" }, "pc"},
		"accelerator":    {func(c *machine.Config) { c.Accel = "hvf" }, "hvf"},
		"memory":         {func(c *machine.Config) { c.Size.Memory = 1 << 20 }, "memory"},
		"parameter":      {func(c *machine.Config) { c.Params = []string{"a b"} }, "a b"},
		"comma in CPU":   {func(c *machine.Config) { c.CPU = "max\nx" }, "CPU"},
		"resize microvm": {func(c *machine.Config) { c.MaxSize = machine.Size{CPUs: 4, Memory: 1 << 30} }, "q35"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := vmtest.Config(t, machine.Microvm)
			c.change(&cfg)
			m, err := machine.Start(t.Context(), r, cfg)
			if err == nil {
				m.Kill(context.Background())
				t.Fatal("it started")
			}
			if !strings.Contains(err.Error(), c.says) {
				t.Errorf("the error does not name %q: %v", c.says, err)
			}
			if left, _ := os.ReadDir(cfg.Dir); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	c := vmtest.Config(t, machine.Microvm)
	if _, err := machine.Start(ctx, vmtest.Reaper(t), c); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// TestBare measures what the guest's kernel needs alone.
func TestBare(t *testing.T) {
	reaper := vmtest.Reaper(t) // one: a second would take its children's ends
	for _, kind := range []string{machine.Microvm, machine.Q35} {
		c := vmtest.Config(t, kind)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		took, err := machine.Bare(ctx, reaper, c)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %v", kind, took)
		if left, _ := os.ReadDir(c.Dir); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
}

// TestProbeKVM: the probe answers within seconds, whatever this machine is.
func TestProbeKVM(t *testing.T) {
	c := vmtest.Config(t, machine.Microvm)
	began := time.Now()
	_, err := machine.ProbeKVM(t.Context(), vmtest.Reaper(t), c)
	t.Logf("after %v: %v", time.Since(began), err)
	if time.Since(began) > 10*time.Second {
		t.Error("it took too long")
	}
	if _, serr := os.Stat("/dev/kvm"); serr != nil && err == nil {
		t.Error("KVM works without its device")
	}
	if left, _ := os.ReadDir(c.Dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
