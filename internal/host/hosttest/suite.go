package hosttest

import (
	"syscall"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	hostv1 "cloister.dev/api/host/v1"
)

// Suite tests the host on a target. What a target cannot do by its nature is
// left out with the reason that the target gives.
func Suite(t *testing.T, on Target) {
	s := StartShim(t, on)
	for _, test := range []struct {
		name  string
		f     func(*Shim)
		needs need
	}{
		{"Exit", testExit, nothing},
		{"Signal", testSignal, nothing},
		{"CreateThenStart", testCreateThenStart, nothing},
		{"MissingProgram", testMissingProgram, nothing},
		{"OOM", testOOM, nothing},
		{"SharedPID", testLeftovers, nothing},
		{"Exec", testExec, nothing},
		{"ExecTerminal", testExecTerminal, nothing},
		{"Terminal", testTerminal, nothing},
		{"Attach", testAttach, nothing},
		{"StdinOnce", testStdinOnce, nothing},
		{"SlowClient", testSlowClient, nothing},
		{"ReopenLog", testReopenLog, nothing},
		{"Resources", testResources, nothing},
		{"StockRequest", testStockRequest, nothing},
		{"OpenIO", testOpenIO, nothing},
		{"Sandbox", testSandbox, nodeKernel},
		{"SandboxUserNamespace", testSandboxUserNamespace, nodeKernel},
		{"BadInput", testBadInput, nothing},
		{"Parallel", testParallel, nothing},
		{"CallerDies", testCallerDies, nodeRuntime},
		{"KillWhileItStarts", testKillWhileItStarts, nodeRuntime},
		{"DeleteWhileItStarts", testDeleteWhileItStarts, nothing},
		{"SandboxEndsFirst", testSandboxEndsFirst, nodeKernel},
		{"RemoveWhileExecStarts", testRemoveWhileExecStarts, nodeRuntime},
		{"OpenIOEndsFirst", testOpenIOEndsFirst, nothing},
		{"LogGone", testLogGone, nothing},
		{"KillServer", testKillServer, nothing},
		{"KillServerDuringStarts", testKillServerDuringStarts, nothing},
		{"KillServerDuringSandboxes", testKillServerDuringSandboxes, nodeKernel},
		{"KillAll", testKillAll, nothing},
		{"KillKeeper", testKillKeeper, nothing},
	} {
		t.Run(test.name, func(t *testing.T) {
			if reason := on.lacks(test.needs); reason != "" {
				t.Skip(reason)
			}
			s.sub(test.f)(t)
		})
	}
}

// sub runs f with failures going to the subtest.
func (s *Shim) sub(f func(*Shim)) func(*testing.T) {
	return func(t *testing.T) {
		own := *s
		own.t = t
		defer func() { // a test that gives up has left a shim to take down, too
			s.client, s.conn, s.keeper = own.client, own.conn, own.keeper
			s.Task, s.Sandbox, s.Host = own.Task, own.Sandbox, own.Host
		}()
		f(&own)
	}
}

var onStart = &hostv1.TaskOptions{RunOnStart: true}

func testExit(s *Shim) {
	for _, status := range []string{"0", "3", "255"} {
		id := "exit-" + status
		s.Run(Container{ID: id, Args: []string{"exit", status, "to out\nend", "to err\n"}, Options: onStart})
		if r := s.Wait(id); !r.Exited || itoa(r.ExitStatus) != status || r.StatusUnknown || r.OomKilled {
			s.t.Errorf("%s: %v", id, r)
		}
		got := map[Entry]bool{}
		for _, e := range s.ReadLog(id) {
			got[e] = true
		}
		for _, e := range []Entry{{"stdout", "F", "to out"}, {"stdout", "P", "end"}, {"stderr", "F", "to err"}} {
			if !got[e] || len(got) != 3 {
				s.t.Errorf("%s: log %v, want %v", id, got, e)
			}
		}
		s.Remove(id)
		if _, err := s.Task.State(s.ctx(), &taskapi.StateRequest{ID: id}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
			s.t.Errorf("state of a deleted task: %v", err)
		}
	}
}

func testSignal(s *Shim) {
	s.Run(Container{ID: "trap", Args: []string{"trap", "7"}, Options: onStart})
	s.awaitLog("trap", "ready")
	if err := s.Create(Container{ID: "trap", Args: []string{"exit"}}); !errdefs.IsAlreadyExists(err) {
		s.t.Errorf("create the same task again: %v", err)
	}
	s.kill("trap", syscall.SIGTERM)
	if r := s.Wait("trap"); r.ExitStatus != 7 {
		s.t.Errorf("after SIGTERM: %v", r)
	}
	_, err := s.Task.Kill(s.ctx(), &taskapi.KillRequest{ID: "trap", Signal: 15})
	if !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		s.t.Errorf("signal an ended task: %v", err)
	}
	s.Remove("trap")

	s.Run(Container{ID: "kill", Args: []string{"sleep", "100"}, Options: onStart})
	_, err = s.Task.Delete(s.ctx(), &taskapi.DeleteRequest{ID: "kill"})
	if !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		s.t.Errorf("delete a running task: %v", err)
	}
	s.kill("kill", syscall.SIGKILL)
	if r := s.Wait("kill"); r.ExitStatus != 137 {
		s.t.Errorf("after SIGKILL: %v", r)
	}
	s.Remove("kill")
}

func testCreateThenStart(s *Shim) {
	c := Container{ID: "two", Args: []string{"exit", "4", "hello\n"}}
	if pid := s.Run(c); pid == 0 {
		s.t.Error("start gave no pid")
	}
	if r := s.Wait("two"); r.ExitStatus != 4 {
		s.t.Errorf("%v", r)
	}
	if l := s.ReadLog("two"); len(l) != 1 || l[0].Text != "hello" {
		s.t.Errorf("log %v", l)
	}
	s.Remove("two")

	c.ID = "never-started"
	if err := s.Create(c); err != nil {
		s.t.Fatal(err)
	}
	s.Remove(c.ID)
}

func testMissingProgram(s *Shim) {
	for _, two := range []bool{false, true} {
		c := Container{ID: "missing", Options: &hostv1.TaskOptions{RunOnStart: !two}, Spec: func(s *specs.Spec) { s.Process.Args = []string{"/not/there"} }}
		err := s.Create(c)
		if err == nil {
			_, err = s.Task.Start(s.ctx(), &taskapi.StartRequest{ID: c.ID})
			err = errgrpc.ToNative(err)
			s.Remove(c.ID)
		}
		if !errdefs.IsNotFound(err) {
			s.t.Errorf("create first: %v: %v", two, err)
		} else {
			s.t.Log(err)
		}
	}
}

func testOOM(s *Shim) {
	limit := int64(32 << 20)
	s.Run(Container{ID: "oom", Args: []string{"oom"}, Options: onStart, Spec: func(s *specs.Spec) {
		s.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}
	}})
	if r := s.Wait("oom"); !r.OomKilled || r.ExitStatus != 137 {
		s.t.Errorf("%v", r)
	}
	s.Remove("oom")
}

// testLeftovers: a container that shares a PID namespace leaves a process.
func testLeftovers(s *Shim) {
	s.Run(Container{ID: "left", Args: []string{"spawn"}, Options: onStart, Spec: func(s *specs.Spec) {
		s.Linux.Namespaces = s.Linux.Namespaces[1:]
	}})
	if r := s.Wait("left"); r.ExitStatus != 0 {
		s.t.Errorf("%v", r)
	}
	s.Remove("left")
}
