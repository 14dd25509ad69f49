package hosttest

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	hostv1 "cloister.dev/api/host/v1"
)

func testResources(s *Shim) {
	s.Run(Container{ID: "res", Args: []string{"sleep", "100"}, Options: onStart})
	defer s.Remove("res")
	limit := int64(64 << 20)
	b, err := json.Marshal(specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}})
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := s.Task.Update(s.ctx(), &taskapi.UpdateTaskRequest{ID: "res", Resources: &anypb.Any{Value: b}}); err != nil {
		s.t.Error(err)
	}
	st, err := s.Task.Stats(s.ctx(), &taskapi.StatsRequest{ID: "res"})
	if err != nil {
		s.t.Fatal(err)
	}
	if !strings.HasPrefix(st.Stats.TypeUrl, "io.containerd.cgroups.v") || len(st.Stats.Value) == 0 {
		s.t.Errorf("stats %v", st.Stats)
	}
	p, err := s.Task.Pids(s.ctx(), &taskapi.PidsRequest{ID: "res"})
	if err != nil || len(p.Processes) != 1 {
		s.t.Errorf("pids %v %v", p, err)
	}
	if _, err := s.Task.Pause(s.ctx(), &taskapi.PauseRequest{ID: "res"}); err != nil {
		s.t.Error(err)
	}
	state, err := s.Task.State(s.ctx(), &taskapi.StateRequest{ID: "res"})
	if err != nil || state.Status != tasktypes.Status_PAUSED {
		s.t.Errorf("%v %v", state, err)
	}
	if _, err := s.Task.Resume(s.ctx(), &taskapi.ResumeRequest{ID: "res"}); err != nil {
		s.t.Error(err)
	}
	if _, err := s.Task.Pause(s.ctx(), &taskapi.PauseRequest{ID: "res"}); err != nil {
		s.t.Error(err)
	}
	s.kill("res", syscall.SIGKILL) // a paused one dies too
	if r := s.Wait("res"); r.ExitStatus != 137 {
		s.t.Errorf("%v", r)
	}
}

func testSandbox(s *Shim) {
	for _, share := range []bool{false, true} {
		id := fmt.Sprintf("sb-%v", share)
		if _, err := s.Sandbox.CreateSandbox(s.ctx(), &sandboxapi.CreateSandboxRequest{SandboxID: id, BundlePath: s.Dir,
			Options: pack(s.t, &hostv1.SandboxOptions{SharePid: share, CgroupPath: "/cl-hosttest-" + filepath.Base(s.Dir)})}); err != nil {
			s.t.Fatal(err)
		}
		r, err := s.Sandbox.StartSandbox(s.ctx(), &sandboxapi.StartSandboxRequest{SandboxID: id})
		if err != nil {
			s.t.Fatal(err)
		}
		if share == (r.Pid == 0) {
			s.t.Errorf("%s: pid %d", id, r.Pid)
		}
		if share {
			s.inNamespace("in-"+id, fmt.Sprintf("/proc/%d/ns/pid", r.Pid), "")
			s.KillServer()
		}
		st, err := s.Sandbox.SandboxStatus(s.ctx(), &sandboxapi.SandboxStatusRequest{SandboxID: id})
		if err != nil || st.State != "SANDBOX_READY" || st.Pid != r.Pid {
			s.t.Errorf("%v %v", st, err)
		}
		for range 2 {
			if _, err := s.Sandbox.StopSandbox(s.ctx(), &sandboxapi.StopSandboxRequest{SandboxID: id, TimeoutSecs: 5}); err != nil {
				s.t.Error(err)
			}
		}
		if _, err := s.Sandbox.WaitSandbox(s.ctx(), &sandboxapi.WaitSandboxRequest{SandboxID: id}); err != nil {
			s.t.Error(err)
		}
		for range 2 {
			if _, err := s.Sandbox.ShutdownSandbox(s.ctx(), &sandboxapi.ShutdownSandboxRequest{SandboxID: id}); err != nil {
				s.t.Error(err)
			}
		}
		_, err = s.Sandbox.SandboxStatus(s.ctx(), &sandboxapi.SandboxStatusRequest{SandboxID: id})
		if !errdefs.IsNotFound(errgrpc.ToNative(err)) {
			s.t.Errorf("status of a forgotten sandbox: %v", err)
		}
	}
	if left, _ := filepath.Glob("/sys/fs/cgroup/*/cl-hosttest-" + filepath.Base(s.Dir)); len(left) > 0 {
		s.t.Errorf("cgroups left: %v", left)
	}
}

// inNamespace runs a container in a held PID namespace, where it is not PID 1.
func (s *Shim) inNamespace(id, pidns, userns string) {
	s.t.Helper()
	s.Run(Container{ID: id, Args: []string{"pid"}, Options: onStart, Spec: func(sp *specs.Spec) {
		sp.Linux.Namespaces[0].Path = pidns
		if userns != "" {
			m := []specs.LinuxIDMapping{{HostID: 1 << 20, Size: 1 << 16}}
			sp.Linux.UIDMappings, sp.Linux.GIDMappings = m, m
			sp.Linux.Namespaces = append(sp.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace, Path: userns})
		}
	}})
	if r := s.Wait(id); r.ExitStatus != 0 {
		s.t.Errorf("%v", r)
	}
	if l := s.ReadLog(id); len(l) != 1 || l[0].Text == "1" {
		s.t.Errorf("pid in the shared namespace: %v", l)
	}
	s.Remove(id)
}

func testSandboxUserNamespace(s *Shim) {
	// Somebody who holds a user namespace open.
	ids := []syscall.SysProcIDMap{{HostID: 1 << 20, Size: 1 << 16}}
	c := exec.Command(filepath.Join(s.bin, "testprog"), "sleep", "60")
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids}
	if err := c.Start(); err != nil {
		s.t.Skipf("no user namespaces here: %v", err)
	}
	defer func() {
		_ = c.Process.Kill()
		_ = c.Wait()
	}()
	userns := fmt.Sprintf("/proc/%d/ns/user", c.Process.Pid)
	if _, err := s.Sandbox.CreateSandbox(s.ctx(), &sandboxapi.CreateSandboxRequest{SandboxID: "sbu", BundlePath: s.Dir,
		Options: pack(s.t, &hostv1.SandboxOptions{SharePid: true, UserNamespace: userns})}); err != nil {
		s.t.Fatal(err)
	}
	r, err := s.Sandbox.StartSandbox(s.ctx(), &sandboxapi.StartSandboxRequest{SandboxID: "sbu"})
	if err != nil {
		s.t.Fatal(err)
	}
	want, _ := os.Readlink(userns)
	if got, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/user", r.Pid)); err != nil || got != want {
		s.t.Errorf("holder is in %s, want %s: %v", got, want, err)
	}
	if own, _ := os.Readlink("/proc/self/ns/pid"); own == readlink(fmt.Sprintf("/proc/%d/ns/pid", r.Pid)) {
		s.t.Error("holder has no PID namespace of its own")
	}
	if _, err := s.Sandbox.ShutdownSandbox(s.ctx(), &sandboxapi.ShutdownSandboxRequest{SandboxID: "sbu"}); err != nil {
		s.t.Error(err)
	}
}

func readlink(path string) string {
	s, _ := os.Readlink(path)
	return s
}

func testBadInput(s *Shim) {
	for _, id := range []string{"", "..", "a/b", "../x", "a\nb", strings.Repeat("x", 10000), "-a"} {
		_, err := s.Task.Create(s.ctx(), &taskapi.CreateTaskRequest{ID: id, Bundle: "/"})
		if !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
			s.t.Errorf("create %.20q: %v", id, err)
		}
		_, err = s.Sandbox.CreateSandbox(s.ctx(), &sandboxapi.CreateSandboxRequest{SandboxID: id})
		if !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
			s.t.Errorf("create sandbox %.20q: %v", id, err)
		}
		_, err = s.Host.OpenIO(s.ctx(), &hostv1.OpenIORequest{Id: id})
		if !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
			s.t.Errorf("open io %.20q: %v", id, err)
		}
		_, err = s.Task.Kill(s.ctx(), &taskapi.KillRequest{ID: id, Signal: 9})
		if !errdefs.IsNotFound(errgrpc.ToNative(err)) {
			s.t.Errorf("kill %.20q: %v", id, err)
		}
	}
	bad := map[string]Container{
		"log path":  {ID: "bad", Options: &hostv1.TaskOptions{Log: &hostv1.Log{Path: "/tmp/../x"}}},
		"no folder": {ID: "bad", Options: &hostv1.TaskOptions{Log: &hostv1.Log{Path: "/nowhere/at/all"}}},
	}
	if s.on.lacks(nodeRuntime) == "" {
		bad["no runtime"] = Container{ID: "bad", Options: &hostv1.TaskOptions{BinaryName: "nonesuch"}}
	}
	for what, c := range bad {
		c.Options.SandboxId = s.on.sandbox()
		bundle := s.Bundle(&c)
		_, err := s.Task.Create(s.ctx(), &taskapi.CreateTaskRequest{ID: c.ID, Bundle: bundle, Options: pack(s.t, c.Options)})
		if err == nil {
			s.t.Errorf("%s: no error", what)
			s.Remove(c.ID)
		} else {
			s.t.Logf("%s: %v", what, err)
		}
	}
	left, _ := os.ReadDir(filepath.Join(s.Dir, "tasks"))
	if len(left) > 0 {
		s.t.Errorf("left after failed creates: %v", left)
	}
}

func testParallel(s *Shim) {
	s.each(s.on.parallel(), func(i int) {
		id := fmt.Sprintf("par-%d", i)
		s.Run(Container{ID: id, Args: []string{"lines", "20", "1000", itoa(uint32(i))}, Options: onStart})
		if r := s.Wait(id); int(r.ExitStatus) != i {
			s.t.Errorf("%s: %v", id, r)
		}
		s.CheckLines(id, 20)
		s.Remove(id)
	})
}

func (s *Shim) each(n int, f func(int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { f(i) })
	}
	wg.Wait()
}

// testKillServer kills the serving process again and again while containers
// write; no line is lost or doubled, and every status is right.
func testKillServer(s *Shim) {
	const n = 8
	lines := s.on.lines(4000)
	for i := range n {
		s.Run(Container{ID: fmt.Sprintf("ks-%d", i), Args: []string{"lines", strconv.Itoa(lines), "300", itoa(uint32(40 + i))}, Options: onStart})
	}
	for range 10 {
		time.Sleep(60 * time.Millisecond) // at any moment
		s.KillServer()
	}
	for i := range n {
		id := fmt.Sprintf("ks-%d", i)
		if r := s.Wait(id); int(r.ExitStatus) != 40+i || r.StatusUnknown {
			s.t.Errorf("%s: %v", id, r)
		}
		s.CheckLines(id, lines)
		s.Remove(id)
	}

	// A container that ends while nobody serves.
	s.Run(Container{ID: "ks-end", Args: []string{"lines", "500", "100", "9"}, Options: onStart})
	pid := s.ServerPid()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		s.t.Fatal(err)
	}
	time.Sleep(150 * time.Millisecond) // lines gather in the pipe, the container may end
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		s.t.Fatal(err)
	}
	s.Connect()
	if r := s.Wait("ks-end"); r.ExitStatus != 9 || r.StatusUnknown {
		s.t.Errorf("%v", r)
	}
	s.CheckLines("ks-end", 500)
	s.Remove("ks-end")
}

// testKillServerDuringStarts kills while runtimes are making containers.
func testKillServerDuringStarts(s *Shim) {
	for round := range 4 {
		const n = 4
		var wg sync.WaitGroup
		for i := range n {
			id := fmt.Sprintf("kd-%d-%d", round, i)
			if err := s.Create(Container{ID: id, Args: []string{"sleep", "100"}, Options: onStart}); err != nil {
				s.t.Fatal(err)
			}
			task := s.Task
			wg.Go(func() { _, _ = task.Start(s.ctx(), &taskapi.StartRequest{ID: id}) })
		}
		time.Sleep(time.Duration(5+15*round) * time.Millisecond)
		s.KillServer()
		wg.Wait()
		for i := range n {
			id := fmt.Sprintf("kd-%d-%d", round, i)
			st, err := s.Task.State(s.ctx(), &taskapi.StateRequest{ID: id})
			if err != nil {
				s.t.Fatalf("%s: %v", id, err)
			}
			if st.Status == tasktypes.Status_CREATED { // not made: it can be started again
				if _, err := s.Task.Start(s.ctx(), &taskapi.StartRequest{ID: id}); err != nil {
					s.t.Errorf("%s: start again: %v", id, err)
				}
			}
			s.kill(id, syscall.SIGKILL)
			if r := s.Wait(id); r.ExitStatus != 137 {
				s.t.Errorf("%s: %v", id, r)
			}
			s.Remove(id)
		}
	}
}

// testKillAll kills keeper and server: running containers go on, and what
// they write is not lost.
func testKillAll(s *Shim) {
	lines := s.on.lines(4000)
	s.Run(Container{ID: "ka", Args: []string{"lines", strconv.Itoa(lines), "300", "21"}, Options: &hostv1.TaskOptions{RunOnStart: true, Stdin: true}})
	for range 5 {
		time.Sleep(60 * time.Millisecond)
		s.KillAll()
	}
	if r := s.Wait("ka"); r.ExitStatus != 21 || r.StatusUnknown {
		s.t.Errorf("%v", r)
	}
	s.CheckLines("ka", lines)
	s.Remove("ka")
}

// testKillKeeper kills the keeper alone; the server gets itself another one,
// which holds what the first one held.
func testKillKeeper(s *Shim) {
	lines := s.on.lines(3000)
	s.Run(Container{ID: "kk", Args: []string{"lines", strconv.Itoa(lines), "300", "22"}, Options: onStart})
	for range 3 {
		old := s.keeperPid()
		if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
			s.t.Fatal(err)
		}
		s.await("a new keeper", func() bool { return s.keeperPid() != old && s.keeperPid() != 0 })
		s.await("its files", func() bool {
			fds, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.keeperPid()))
			pipes := 0
			for _, fd := range fds {
				if strings.HasSuffix(readlink(fmt.Sprintf("/proc/%d/fd/%s", s.keeperPid(), fd.Name())), "/tasks/kk/stdout") {
					pipes++
				}
			}
			return pipes == 1
		})
	}
	s.KillServer()
	if r := s.Wait("kk"); r.ExitStatus != 22 || r.StatusUnknown {
		s.t.Errorf("%v", r)
	}
	s.CheckLines("kk", lines)
	s.Remove("kk")
}

func (s *Shim) keeperPid() int {
	b, _ := os.ReadFile(filepath.Join(s.Dir, "keeper.lock"))
	pid, _ := strconv.Atoi(string(b))
	return pid
}
