package hosttest

import (
	"errors"
	"io"
	"os"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	runcopts "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	hostv1 "cloister.dev/api/host/v1"
)

// testStockRequest creates a task as containerd does.
func testStockRequest(s *Shim) {
	for _, terminal := range []bool{false, true} {
		id := map[bool]string{false: "stock", true: "stock-tty"}[terminal]
		f := s.fifos(id)
		c := Container{ID: id, Args: []string{"cat"}, Terminal: terminal}
		if terminal {
			c.Args = []string{"tty"}
		}
		r := &taskapi.CreateTaskRequest{ID: id, Bundle: s.Bundle(&c), Terminal: terminal, Stdin: f.inPath, Stdout: f.outPath,
			Options: pack(s.t, &runcopts.Options{BinaryName: s.Binary})}
		if !terminal {
			r.Stderr = f.errPath
		}
		cr, err := s.Task.Create(s.ctx(), r)
		if err != nil {
			s.t.Fatal(err)
		}
		st, err := s.Task.Start(s.ctx(), &taskapi.StartRequest{ID: id})
		if err != nil || st.Pid != cr.Pid || st.Pid == 0 {
			s.t.Fatalf("%v %v %v", cr, st, err)
		}
		if _, err := f.in.WriteString("quit\n"); err != nil {
			s.t.Fatal(err)
		}
		if terminal {
			if r := s.Wait(id); r.ExitStatus != 5 {
				s.t.Errorf("%v", r)
			}
		} else {
			f.in.Close()
			if r := s.Wait(id); r.ExitStatus != 0 {
				s.t.Errorf("%v", r)
			}
		}
		f.expect(f.out, "quit")
		s.Remove(id)
		f.close()
	}
}

// testOpenIO plays the shim of a task that somebody else runs.
func testOpenIO(s *Shim) {
	req := &hostv1.OpenIORequest{Id: "pump", Log: &hostv1.Log{Path: s.LogPath("pump"), MaxLineBytes: 16384}, Stdin: true}
	r, err := s.Host.OpenIO(s.ctx(), req)
	if err != nil {
		s.t.Fatal(err)
	}
	if again, err := s.Host.OpenIO(s.ctx(), req); err != nil || again.Stdout != r.Stdout {
		s.t.Errorf("repeated: %v %v", again, err)
	}
	write := func(path, text string) {
		s.t.Helper()
		w, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err == nil {
			_, err = w.WriteString(text)
			err = errors.Join(err, w.Close())
		}
		if err != nil {
			s.t.Fatal(err)
		}
	}
	write(r.Stdout, "one\n")
	s.KillServer()
	write(r.Stdout, "two\n") // closing a writing end does not end the pump
	write(r.Stderr, "three")
	f := s.fifos("pump")
	defer f.close()
	s.attach("pump", f)
	in, err := os.OpenFile(r.Stdin, os.O_RDONLY, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	defer in.Close()
	if _, err := f.in.WriteString("input"); err != nil {
		s.t.Fatal(err)
	}
	buf := make([]byte, 5)
	if _, err := io.ReadFull(in, buf); err != nil || string(buf) != "input" {
		s.t.Errorf("stdin: %q %v", buf, err)
	}
	write(r.Stdout, "four\n")
	f.expect(f.out, "four\n")
	if _, err := s.Host.CloseIO(s.ctx(), &hostv1.CloseIORequest{Id: "pump"}); err != nil {
		s.t.Fatal(err)
	}
	_, err = s.Host.CloseIO(s.ctx(), &hostv1.CloseIORequest{Id: "pump"})
	if !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		s.t.Errorf("closed twice: %v", err)
	}
	want := map[Entry]bool{{"stdout", "F", "one"}: true, {"stdout", "F", "two"}: true, {"stdout", "F", "four"}: true, {"stderr", "P", "three"}: true}
	l := s.ReadLog("pump")
	for _, e := range l {
		delete(want, e)
	}
	if len(l) != 4 || len(want) != 0 {
		s.t.Errorf("log %v", l)
	}
	f.collect(f.out)
}
