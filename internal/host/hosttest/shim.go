// Package hosttest is the test suite of the host: it drives a real
// cloister-shim process over ttrpc with real containers, and so tests a
// backend.Backend the way clients meet it. Every backend runs it.
package hosttest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	hostv1 "cloister.dev/api/host/v1"
)

// binaries builds the shim and the program for containers, once a test run.
var binaries = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("/tmp", "cl-bin")
	if err != nil {
		return "", err
	}
	return dir, errors.Join(build(dir, "cloister.dev/cmd/cloister-shim", raceFlags...), build(dir, "cloister.dev/internal/host/hosttest/testprog"))
})

// build makes a program, a static one where it has no flags: there is nothing
// in the container or the guest that it runs in.
func build(dir, pkg string, flags ...string) error {
	args := append([]string{"build", "-tags", "no_grpc", "-o", dir}, flags...)
	cmd := exec.Command("go", append(args, pkg)...)
	if len(flags) == 0 {
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", pkg, err, out)
	}
	return nil
}

// Shim is a running cloister-shim with a state folder of its own.
type Shim struct {
	t       testing.TB
	Dir     string
	bin     string
	Binary  string // OCI runtime
	on      Target
	keeper  *exec.Cmd
	Task    taskapi.TTRPCTaskService
	Sandbox sandboxapi.TTRPCSandboxService
	Host    hostv1.HostService
	client  *ttrpc.Client
	conn    net.Conn
}

// StartShim runs "cloister-shim keep" until the test ends.
func StartShim(t testing.TB, on Target) *Shim {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("containers need root")
	}
	if _, err := exec.LookPath(on.Runtime); err != nil && on.Runtime != "" {
		t.Skipf("no %s on this machine", on.Runtime)
	}
	bin, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/tmp", "cl")
	if err != nil {
		t.Fatal(err)
	}
	s := &Shim{t: t, Dir: dir, bin: bin, Binary: on.Runtime, on: on}
	t.Cleanup(s.end)
	s.Keep()
	if on.Machine != nil {
		s.startMachine()
	}
	return s
}

// Keep starts a keeper and connects.
func (s *Shim) Keep() {
	s.t.Helper()
	log, err := os.OpenFile(filepath.Join(s.Dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	s.keeper = exec.Command(filepath.Join(s.bin, "cloister-shim"), "keep", "--state", s.Dir, "--backend", s.on.Backend, "--log-level", "debug")
	s.keeper.Stdout, s.keeper.Stderr = log, log
	s.keeper.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := s.keeper.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.Connect()
}

// Connect dials the shim, in place of an older connection.
func (s *Shim) Connect() {
	s.t.Helper()
	if s.client != nil {
		s.client.Close()
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
		c, err := net.Dial("unix", filepath.Join(s.Dir, "shim.sock"))
		if err == nil {
			s.conn = c
			s.client = ttrpc.NewClient(c)
			s.Task, s.Sandbox, s.Host = taskapi.NewTTRPCTaskClient(s.client), sandboxapi.NewTTRPCSandboxClient(s.client), hostv1.NewHostClient(s.client)
			if _, err = s.Host.Info(s.ctx(), &hostv1.InfoRequest{}); err == nil {
				return
			}
			s.client.Close()
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("the shim does not answer: %v\n%s", err, s.Log())
		}
	}
}

// Log is what the shim logged.
func (s *Shim) Log() string {
	b, _ := os.ReadFile(filepath.Join(s.Dir, "log"))
	return string(b)
}

func (s *Shim) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	s.t.Cleanup(cancel)
	return ctx
}

// ServerPid is the pid of the serving process.
func (s *Shim) ServerPid() int {
	s.t.Helper()
	r, err := s.Host.Info(s.ctx(), &hostv1.InfoRequest{})
	if err != nil {
		s.t.Fatal(err)
	}
	return int(r.Pid)
}

// KillServer kills the serving process as a crash would, and connects to the
// one that the keeper starts.
func (s *Shim) KillServer() {
	s.t.Helper()
	if err := syscall.Kill(s.ServerPid(), syscall.SIGKILL); err != nil {
		s.t.Fatal(err)
	}
	s.Connect()
}

// KillAll kills keeper and serving process, and starts a new pair.
func (s *Shim) KillAll() {
	s.t.Helper()
	pid := s.ServerPid()
	if err := errors.Join(s.keeper.Process.Kill(), syscall.Kill(pid, syscall.SIGKILL)); err != nil {
		s.t.Fatal(err)
	}
	_ = s.keeper.Wait()
	s.Keep()
}

func (s *Shim) end() {
	if strings.Contains(s.Log(), "DATA RACE") {
		s.t.Errorf("data race in the shim:\n%s", s.Log())
	}
	if s.t.Failed() {
		s.t.Logf("log of the shim:\n%s", s.Log())
	}
	ids, _ := os.ReadDir(filepath.Join(s.Dir, "tasks"))
	for _, id := range ids {
		s.Remove(id.Name())
	}
	sandboxes, _ := os.ReadDir(filepath.Join(s.Dir, "sandboxes"))
	for _, id := range sandboxes {
		if _, err := s.Sandbox.ShutdownSandbox(s.ctx(), &sandboxapi.ShutdownSandboxRequest{SandboxID: id.Name()}); err != nil {
			s.t.Errorf("shut sandbox %s down: %v", id.Name(), err)
		}
	}
	s.client.Close()
	out, err := exec.Command(filepath.Join(s.bin, "cloister-shim"), "stop", "--state", s.Dir, "--force").CombinedOutput()
	if err != nil {
		s.t.Errorf("stop the shim: %v\n%s", err, out)
	}
	var killed *exec.ExitError // by the test itself
	if err := s.keeper.Wait(); err != nil && !errors.As(err, &killed) {
		s.t.Errorf("the keeper ended with %v", err)
	}
	os.RemoveAll(s.Dir)
}

// Remove kills and deletes a task, whatever its state.
func (s *Shim) Remove(id string) {
	_, _ = s.Task.Kill(s.ctx(), &taskapi.KillRequest{ID: id, Signal: 9, All: true})
	if r, err := s.Host.Inspect(s.ctx(), &hostv1.InspectRequest{Id: id}); err == nil && r.Pid != 0 {
		_, _ = s.Task.Wait(s.ctx(), &taskapi.WaitRequest{ID: id})
	}
	if _, err := s.Task.Delete(s.ctx(), &taskapi.DeleteRequest{ID: id}); err != nil {
		s.t.Errorf("delete %s: %v", id, err)
	}
}

// Container describes a test container.
type Container struct {
	ID       string
	Args     []string // of testprog
	Options  *hostv1.TaskOptions
	Terminal bool
	Spec     func(*specs.Spec)
}

// LogPath is where a container's log is written.
func (s *Shim) LogPath(id string) string { return filepath.Join(s.Dir, "log-"+id) }

// Bundle makes a bundle for c.
func (s *Shim) Bundle(c *Container) string {
	s.t.Helper()
	bundle := filepath.Join(s.Dir, "bundle-"+c.ID)
	rootfs := filepath.Join(bundle, "rootfs")
	prog, err := os.ReadFile(filepath.Join(s.bin, "testprog"))
	if err == nil {
		err = errors.Join(os.MkdirAll(filepath.Join(rootfs, "proc"), 0o755), os.MkdirAll(filepath.Join(rootfs, "dev"), 0o755))
	}
	if _, serr := os.Stat(filepath.Join(rootfs, "prog")); err == nil && serr != nil {
		err = os.WriteFile(filepath.Join(rootfs, "prog"), prog, 0o755)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	spec := &specs.Spec{
		Version:     "1.0.2",
		Annotations: map[string]string{"io.kubernetes.cri.sandbox-id": s.on.sandbox()},
		Root:        &specs.Root{Path: "rootfs"},
		Process:     &specs.Process{Args: append([]string{"/prog"}, c.Args...), Cwd: "/", Env: []string{"PATH=/"}, Terminal: c.Terminal},
		Mounts: []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"newinstance", "ptmxmode=0666"}}},
		Linux: &specs.Linux{CgroupsPath: "/cl-hosttest/" + filepath.Base(s.Dir) + "-" + c.ID, Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}}},
	}
	if c.Spec != nil {
		c.Spec(spec)
	}
	b, err := json.Marshal(spec)
	if err == nil {
		err = os.WriteFile(filepath.Join(bundle, "config.json"), b, 0o600)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return bundle
}

// Create makes a task with its log at LogPath.
func (s *Shim) Create(c Container) error {
	s.t.Helper()
	bundle := s.Bundle(&c)
	o := &hostv1.TaskOptions{}
	if c.Options != nil {
		proto.Merge(o, c.Options)
	}
	o.BinaryName, o.SandboxId = s.Binary, s.on.sandbox()
	if o.Log == nil {
		o.Log = &hostv1.Log{Path: s.LogPath(c.ID), MaxLineBytes: 16384}
	}
	_, err := s.Task.Create(s.ctx(), &taskapi.CreateTaskRequest{ID: c.ID, Bundle: bundle, Terminal: c.Terminal, Options: pack(s.t, o)})
	return errgrpc.ToNative(err)
}

// Run makes and starts a task.
func (s *Shim) Run(c Container) (pid int) {
	s.t.Helper()
	if err := s.Create(c); err != nil {
		s.t.Fatalf("create %s: %v", c.ID, err)
	}
	r, err := s.Task.Start(s.ctx(), &taskapi.StartRequest{ID: c.ID})
	if err != nil {
		s.t.Fatalf("start %s: %v", c.ID, err)
	}
	return int(r.Pid)
}

// Wait waits for a task's end and inspects it.
func (s *Shim) Wait(id string) *hostv1.InspectResponse {
	s.t.Helper()
	if _, err := s.Task.Wait(s.ctx(), &taskapi.WaitRequest{ID: id}); err != nil {
		s.t.Fatalf("wait for %s: %v", id, err)
	}
	r, err := s.Host.Inspect(s.ctx(), &hostv1.InspectRequest{Id: id})
	if err != nil {
		s.t.Fatal(err)
	}
	return r
}

func pack(t testing.TB, m proto.Message) *anypb.Any {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return &anypb.Any{TypeUrl: string(m.ProtoReflect().Descriptor().FullName()), Value: b}
}

// Entry is one line of a CRI log.
type Entry struct {
	Stream, Tag, Text string
}

// ReadLog parses a CRI log; a malformed line fails the test.
func (s *Shim) ReadLog(id string) []Entry {
	s.t.Helper()
	b, err := os.ReadFile(s.LogPath(id))
	if err != nil {
		s.t.Fatal(err)
	}
	if len(b) > 0 && b[len(b)-1] != '\n' {
		s.t.Errorf("the log of %s ends inside an entry", id)
	}
	var entries []Entry
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		if len(f) != 4 {
			s.t.Fatalf("log of %s: malformed entry %q", id, line)
		}
		if _, err := time.Parse(time.RFC3339Nano, f[0]); err != nil || len(f[1]) != 6 || f[2] != "F" && f[2] != "P" {
			s.t.Fatalf("log of %s: malformed entry %q", id, line)
		}
		entries = append(entries, Entry{f[1], f[2], f[3]})
	}
	return entries
}

// CheckLines fails unless the log holds the lines that "testprog lines n"
// writes, each once and in order.
func (s *Shim) CheckLines(id string, n int) {
	s.t.Helper()
	next := map[string]int{}
	for _, e := range s.ReadLog(id) {
		f := strings.Fields(e.Text)
		i := next[e.Stream]
		next[e.Stream]++
		want := map[string]string{"stdout": "out " + strconv.Itoa(i) + " " + strings.Repeat("x", i%97) + ".",
			"stderr": "err " + strconv.Itoa(i) + " " + strings.Repeat("y", i%89) + "."}[e.Stream]
		if e.Text != want || e.Tag != "F" {
			s.t.Fatalf("log of %s: entry %d of %s is %q %v, want %q", id, i, e.Stream, e.Text, f, want)
		}
	}
	if next["stdout"] != n || next["stderr"] != n {
		s.t.Fatalf("log of %s: %v lines, want %d of each", id, next, n)
	}
}
