package hosttest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	hostv1 "cloister.dev/api/host/v1"
)

// gate is an OCI runtime that waits, while it is shut, before it does what
// makes processes.
type gate struct{ path, open, called string }

func (s *Shim) gate() gate {
	s.t.Helper()
	real, err := exec.LookPath(s.Binary)
	if err != nil {
		s.t.Fatal(err)
	}
	dir := filepath.Join(s.Dir, "gate")
	g := gate{path: filepath.Join(dir, filepath.Base(real)), open: filepath.Join(dir, "open"), called: filepath.Join(dir, "called")}
	script := fmt.Sprintf(`#!/bin/sh
for a; do
  case $a in run|create|exec) echo $a >>%[1]s; while [ ! -e %[2]s ]; do sleep 0.01; done; break;; esac
done
exec %[3]s "$@"
`, g.called, g.open, real)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(g.path, []byte(script), 0o755); err != nil {
		s.t.Fatal(err)
	}
	g.set(s, true)
	return g
}

func (g gate) set(s *Shim, open bool) {
	s.t.Helper()
	err := os.Remove(g.called)
	if open {
		err = os.WriteFile(g.open, nil, 0o600)
	} else if err == nil || os.IsNotExist(err) {
		err = os.Remove(g.open)
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// cutOff closes the connection while the runtime serves a call of it.
func (s *Shim) cutOff(g gate, what string, call func(context.Context) error) {
	s.t.Helper()
	g.set(s, false)
	done := make(chan error, 1)
	go func() { done <- call(s.ctx()) }()
	s.await("the runtime's "+what, func() bool { _, err := os.Stat(g.called); return err == nil })
	s.conn.Close()
	if err := <-done; err == nil {
		s.t.Errorf("%s: the caller died and got an answer", what)
	}
	s.Connect()
	g.set(s, true)
}

// testCallerDies: who asked for a container or an exec dies while the runtime
// works. The runtime is not killed for that, and what it makes is there when
// the next caller asks.
func testCallerDies(s *Shim) {
	g := s.gate()
	named := *s
	named.Binary = g.path
	// What the shim has to learn of a runtime it learns now.
	named.Run(Container{ID: "cd-host", Args: []string{"sleep", "100"}, Options: onStart})
	defer s.Remove("cd-host")
	cut := func(what string, call func(context.Context) error) {
		s.t.Helper()
		s.cutOff(g, what, call)
		named.client, named.conn, named.Task, named.Host = s.client, s.conn, s.Task, s.Host
	}

	if err := named.Create(Container{ID: "cd-run", Args: []string{"sleep", "100"}, Options: onStart}); err != nil {
		s.t.Fatal(err)
	}
	cut("run", func(ctx context.Context) error {
		_, err := s.Task.Start(ctx, &taskapi.StartRequest{ID: "cd-run"})
		return err
	})
	s.await("cd-run runs", func() bool {
		r, err := s.Host.Inspect(s.ctx(), &hostv1.InspectRequest{Id: "cd-run"})
		return err == nil && r.Pid != 0 && !r.Exited
	})
	s.kill("cd-run", syscall.SIGKILL)
	if r := s.Wait("cd-run"); r.ExitStatus != 137 || r.StatusUnknown {
		s.t.Errorf("%v", r)
	}
	s.Remove("cd-run")

	cut("create", func(context.Context) error {
		return named.Create(Container{ID: "cd-create", Args: []string{"exit", "5"}})
	})
	s.await("cd-create waits", func() bool {
		r, err := s.Host.Inspect(s.ctx(), &hostv1.InspectRequest{Id: "cd-create"})
		return err == nil && r.Pid != 0
	})
	_, err := s.Task.Start(s.ctx(), &taskapi.StartRequest{ID: "cd-create"})
	if r := s.Wait("cd-create"); err != nil || r.ExitStatus != 5 || r.StatusUnknown {
		s.t.Errorf("%v, %v", r, err)
	}
	s.Remove("cd-create")

	f := s.fifos("cd-x")
	defer f.close()
	cut("exec", func(context.Context) error { return named.exec("cd-host", "cd-x", f, false, "exit", "6") })
	if st := s.waitExec("cd-host", "cd-x"); st != 6 {
		s.t.Errorf("the exec's status is %d", st)
	}
	s.deleteExec("cd-host", "cd-x")
}

// testKillWhileItStarts: who gave up on a start can end what comes of it.
func testKillWhileItStarts(s *Shim) {
	g := s.gate()
	named := *s
	named.Binary = g.path
	named.Run(Container{ID: "ks-host", Args: []string{"sleep", "100"}, Options: onStart})
	defer s.Remove("ks-host")
	if err := named.Create(Container{ID: "ks-run", Args: []string{"sleep", "100"}, Options: onStart}); err != nil {
		s.t.Fatal(err)
	}
	f := s.fifos("ks-x")
	defer f.close()
	for _, exec := range []string{"", "ks-x"} {
		id := "ks-run"
		if exec != "" {
			id = "ks-host"
		}
		g.set(s, false)
		started := make(chan error, 1)
		go func() {
			if exec != "" {
				started <- named.exec(id, exec, f, false, "sleep", "100")
				return
			}
			_, err := s.Task.Start(s.ctx(), &taskapi.StartRequest{ID: id})
			started <- err
		}()
		s.await("the runtime", func() bool { _, err := os.Stat(g.called); return err == nil })
		killed := make(chan error, 1)
		go func() {
			_, err := s.Task.Kill(s.ctx(), &taskapi.KillRequest{ID: id, ExecID: exec, Signal: 9})
			killed <- err
		}()
		select {
		case err := <-killed:
			s.t.Errorf("before it is there it was killed: %v", err)
			killed <- nil
		case <-time.After(100 * time.Millisecond): // it waits
		}
		g.set(s, true)
		if err := errors.Join(<-started, <-killed); err != nil {
			s.t.Error(err)
		}
		if exec != "" {
			if st := s.waitExec(id, exec); st != 137 {
				s.t.Errorf("the exec's status is %d", st)
			}
			s.deleteExec(id, exec)
		} else if r := s.Wait(id); r.ExitStatus != 137 {
			s.t.Errorf("%v", r)
		}
	}
	s.Remove("ks-run")
}

// testDeleteWhileItStarts: an exec that was deleted does not come to life when
// the streams that its start waited for are opened after all.
func testDeleteWhileItStarts(s *Shim) {
	s.Run(Container{ID: "ds", Args: []string{"sleep", "100"}, Options: onStart})
	defer s.Remove("ds")
	path := filepath.Join(s.Dir, "ds-out")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		s.t.Fatal(err)
	}
	started := make(chan error, 1)
	go func() { started <- s.execArgs("ds", "ds-x", &fifos{outPath: path}, "/prog", "sleep", "100") }()
	select {
	case err := <-started:
		s.t.Fatalf("it did not wait for a reader: %v", err)
	case <-time.After(100 * time.Millisecond): // it waits
	}
	s.deleteExec("ds", "ds-x")
	reader, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	defer reader.Close()
	if err := <-started; !errdefs.IsNotFound(err) {
		s.t.Errorf("the start of a deleted exec: %v", err)
	}
	r, err := s.Task.Pids(s.ctx(), &taskapi.PidsRequest{ID: "ds"})
	if err != nil {
		s.t.Fatal(err)
	}
	if len(r.Processes) != 1 {
		s.t.Errorf("the container has %d processes", len(r.Processes))
	}
}
