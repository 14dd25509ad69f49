package hosttest

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	hostv1 "cloister.dev/api/host/v1"
)

// fifos are a client's FIFOs, opened as clients should: before they are named
// in a call.
type fifos struct {
	s                        *Shim
	inPath, outPath, errPath string
	in, out, err             *os.File
}

func (s *Shim) fifos(name string) *fifos {
	s.t.Helper()
	f := &fifos{s: s, inPath: filepath.Join(s.Dir, name+".in"), outPath: filepath.Join(s.Dir, name+".out"), errPath: filepath.Join(s.Dir, name+".err")}
	for path, file := range map[string]**os.File{f.inPath: &f.in, f.outPath: &f.out, f.errPath: &f.err} {
		if err := syscall.Mkfifo(path, 0o600); err != nil {
			s.t.Fatal(err)
		}
		flags := syscall.O_RDONLY | syscall.O_NONBLOCK
		if path == f.inPath {
			flags = syscall.O_RDWR | syscall.O_NONBLOCK
		}
		var err error
		if *file, err = os.OpenFile(path, flags, 0); err != nil {
			s.t.Fatal(err)
		}
	}
	return f
}

// collect reads to the end of a FIFO; what arrived is kept when the time is
// over.
func (f *fifos) collect(file *os.File) string {
	f.s.t.Helper()
	b, err := f.read(file, func([]byte) bool { return false })
	if err != nil {
		f.s.t.Fatalf("after %q: %v", b, err)
	}
	return string(b)
}

// expect reads until text has arrived.
func (f *fifos) expect(file *os.File, text string) {
	f.s.t.Helper()
	b, err := f.read(file, func(b []byte) bool { return bytes.Contains(b, []byte(text)) })
	if err != nil || !bytes.Contains(b, []byte(text)) {
		f.s.t.Fatalf("want %q, got %q: %v", text, b, err)
	}
}

func (f *fifos) read(file *os.File, enough func([]byte) bool) (got []byte, err error) {
	if err := file.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return nil, err
	}
	buf := make([]byte, 4096)
	for !enough(got) {
		n, err := file.Read(buf)
		got = append(got, buf[:n]...)
		if errors.Is(err, io.EOF) {
			return got, nil
		}
		if err != nil {
			return got, err
		}
	}
	return got, nil
}

func (f *fifos) close() {
	f.in.Close()
	f.out.Close()
	f.err.Close()
}

func (s *Shim) exec(id, exec string, f *fifos, terminal bool, args ...string) error {
	s.t.Helper()
	p, err := json.Marshal(specs.Process{Args: append([]string{"/prog"}, args...), Cwd: "/", Env: []string{"PATH=/"}})
	if err != nil {
		s.t.Fatal(err)
	}
	r := &taskapi.ExecProcessRequest{ID: id, ExecID: exec, Terminal: terminal, Stdin: f.inPath, Stdout: f.outPath,
		Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: p}}
	if !terminal {
		r.Stderr = f.errPath
	}
	if _, err := s.Task.Exec(s.ctx(), r); err != nil {
		return errgrpc.ToNative(err)
	}
	_, err = s.Task.Start(s.ctx(), &taskapi.StartRequest{ID: id, ExecID: exec})
	return errgrpc.ToNative(err)
}

func (s *Shim) waitExec(id, exec string) uint32 {
	s.t.Helper()
	r, err := s.Task.Wait(s.ctx(), &taskapi.WaitRequest{ID: id, ExecID: exec})
	if err != nil {
		s.t.Fatalf("wait for exec %s: %v", exec, err)
	}
	return r.ExitStatus
}

func (s *Shim) deleteExec(id, exec string) {
	s.t.Helper()
	if _, err := s.Task.Delete(s.ctx(), &taskapi.DeleteRequest{ID: id, ExecID: exec}); err != nil {
		s.t.Errorf("delete exec %s: %v", exec, err)
	}
}

func testExec(s *Shim) {
	s.Run(Container{ID: "ex", Args: []string{"sleep", "100"}, Options: onStart})
	defer s.Remove("ex")
	f := s.fifos("x1")
	if err := s.exec("ex", "x1", f, false, "exit", "9", "output", "errors"); err != nil {
		s.t.Fatal(err)
	}
	if st := s.waitExec("ex", "x1"); st != 9 {
		s.t.Errorf("status %d", st)
	}
	if out, errs := f.collect(f.out), f.collect(f.err); out != "output" || errs != "errors" {
		s.t.Errorf("%q %q", out, errs)
	}
	s.deleteExec("ex", "x1")
	f.close()

	f = s.fifos("x2")
	if err := s.exec("ex", "x2", f, false, "cat"); err != nil {
		s.t.Fatal(err)
	}
	if _, err := f.in.WriteString("through"); err != nil {
		s.t.Fatal(err)
	}
	f.in.Close()
	if st, out := s.waitExec("ex", "x2"), f.collect(f.out); st != 0 || out != "through" {
		s.t.Errorf("cat: %d %q", st, out)
	}
	s.deleteExec("ex", "x2")

	f = s.fifos("x3")
	if err := s.exec("ex", "x3", f, false, "sleep", "100"); err != nil {
		s.t.Fatal(err)
	}
	if _, err := s.Task.Kill(s.ctx(), &taskapi.KillRequest{ID: "ex", ExecID: "x3", Signal: 9}); err != nil {
		s.t.Error(err)
	}
	if st := s.waitExec("ex", "x3"); st != 137 {
		s.t.Errorf("killed exec: %d", st)
	}
	f.close()

	// A background process that keeps the streams does not hold up the exit.
	f = s.fifos("x4")
	if err := s.exec("ex", "x4", f, false, "spawn"); err != nil {
		s.t.Fatal(err)
	}
	if st := s.waitExec("ex", "x4"); st != 0 {
		s.t.Errorf("spawn: %d", st)
	}
	f.expect(f.out, "spawned")
	s.deleteExec("ex", "x4")

	f = s.fifos("x5")
	if err := s.execArgs("ex", "x5", f, "/not/there"); !errdefs.IsNotFound(err) {
		s.t.Errorf("exec of a missing program: %v", err)
	}
	waited := make(chan error, 1)
	go func() {
		_, err := s.Task.Wait(s.ctx(), &taskapi.WaitRequest{ID: "ex", ExecID: "x5"})
		waited <- err
	}()
	select {
	case err := <-waited:
		s.t.Errorf("before it was deleted, an exec that never ran had ended: %v", err)
	case <-time.After(50 * time.Millisecond): // it waits
	}
	s.deleteExec("ex", "x5")
	if err := <-waited; !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		s.t.Errorf("the end of an exec that never ran: %v", err)
	}
}

func (s *Shim) execArgs(id, exec string, f *fifos, args ...string) error {
	p, err := json.Marshal(specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/"}})
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := s.Task.Exec(s.ctx(), &taskapi.ExecProcessRequest{ID: id, ExecID: exec, Stdout: f.outPath, Spec: &anypb.Any{Value: p}}); err != nil {
		return errgrpc.ToNative(err)
	}
	_, err = s.Task.Start(s.ctx(), &taskapi.StartRequest{ID: id, ExecID: exec})
	return errgrpc.ToNative(err)
}

func testExecTerminal(s *Shim) {
	s.Run(Container{ID: "ext", Args: []string{"sleep", "100"}, Options: onStart})
	defer s.Remove("ext")
	f := s.fifos("xt")
	defer f.close()
	if err := s.exec("ext", "xt", f, true, "tty"); err != nil {
		s.t.Fatal(err)
	}
	f.expect(f.out, "size ")
	if _, err := s.Task.ResizePty(s.ctx(), &taskapi.ResizePtyRequest{ID: "ext", ExecID: "xt", Width: 91, Height: 33}); err != nil {
		s.t.Error(err)
	}
	f.expect(f.out, "size 91x33")
	if _, err := f.in.WriteString("hello\nquit\n"); err != nil {
		s.t.Fatal(err)
	}
	if st := s.waitExec("ext", "xt"); st != 5 {
		s.t.Errorf("status %d", st)
	}
	f.expect(f.out, "got hello")
	s.deleteExec("ext", "xt")

	// All output of a short process arrives before its exit is told.
	for range 5 {
		f := s.fifos("xs")
		if err := s.exec("ext", "xs", f, true, "exit", "0", strings.Repeat("z", 3000)+"END"); err != nil {
			s.t.Fatal(err)
		}
		s.waitExec("ext", "xs")
		f.expect(f.out, "END")
		s.deleteExec("ext", "xs")
		f.close()
		for _, p := range []string{f.inPath, f.outPath, f.errPath} {
			os.Remove(p)
		}
	}
}

func testTerminal(s *Shim) {
	s.Run(Container{ID: "tty", Args: []string{"tty"}, Terminal: true, Options: &hostv1.TaskOptions{RunOnStart: true, Stdin: true}})
	s.awaitLog("tty", "size ")
	f := s.fifos("tty")
	defer f.close()
	s.attach("tty", f)
	f.expect(f.out, "size 0x0") // written before anybody could attach
	late := s.fifos("tty-late")
	defer late.close()
	s.attach("tty", late)
	if _, err := s.Task.ResizePty(s.ctx(), &taskapi.ResizePtyRequest{ID: "tty", Width: 77, Height: 22}); err != nil {
		s.t.Error(err)
	}
	f.expect(f.out, "size 77x22\r\n") // a line that is typed earlier would come into it
	if _, err := f.in.WriteString("a line\n"); err != nil {
		s.t.Fatal(err)
	}
	f.expect(f.out, "got a line")
	if got, err := late.read(late.out, func(b []byte) bool { return bytes.Contains(b, []byte("got a line")) }); err != nil || bytes.Contains(got, []byte("size 0x0")) {
		s.t.Errorf("the second client got %q, %v", got, err)
	}
	s.KillServer()
	f2 := s.fifos("tty2")
	defer f2.close()
	s.attach("tty", f2)
	if _, err := f2.in.WriteString("second life\nquit\n"); err != nil {
		s.t.Fatal(err)
	}
	if r := s.Wait("tty"); r.ExitStatus != 5 {
		s.t.Errorf("%v", r)
	}
	if out := f2.collect(f2.out); !strings.Contains(out, "got second life") {
		s.t.Errorf("%q", out)
	}
	var text strings.Builder
	for _, e := range s.ReadLog("tty") {
		text.WriteString(e.Text + "|")
	}
	for _, want := range []string{"size 77x22\r", "got a line\r", "got second life\r"} {
		if strings.Count(text.String(), want) != 1 {
			s.t.Errorf("log %q: want %q once", text.String(), want)
		}
	}
	s.Remove("tty")
}

func (s *Shim) attach(id string, f *fifos) {
	s.t.Helper()
	if _, err := s.Host.Attach(s.ctx(), &hostv1.AttachRequest{Id: id, Stdin: f.inPath, Stdout: f.outPath, Stderr: f.errPath}); err != nil {
		s.t.Fatal(err)
	}
}

func testAttach(s *Shim) {
	s.Run(Container{ID: "att", Args: []string{"cat"}, Options: &hostv1.TaskOptions{RunOnStart: true, Stdin: true}})
	a, b := s.fifos("a"), s.fifos("b")
	defer a.close()
	defer b.close()
	s.attach("att", a)
	s.attach("att", b)
	if _, err := a.in.WriteString("no newline"); err != nil {
		s.t.Fatal(err)
	}
	a.expect(a.out, "no newline")
	b.expect(b.out, "no newline")
	a.close() // a goes away; the container's input stays open
	if _, err := b.in.WriteString(" and more\n"); err != nil {
		s.t.Fatal(err)
	}
	b.expect(b.out, " and more\n")
	s.awaitLog("att", "no newline and more")
	s.kill("att", syscall.SIGKILL)
	s.Wait("att")
	if rest := b.collect(b.out) + b.collect(b.err); rest != "" {
		s.t.Errorf("rest %q", rest)
	}
	if l := s.ReadLog("att"); len(l) != 1 || l[0] != (Entry{"stdout", "F", "no newline and more"}) {
		s.t.Errorf("log %q", l)
	}
	s.Remove("att")
}

func testStdinOnce(s *Shim) {
	s.Run(Container{ID: "once", Args: []string{"cat"}, Options: &hostv1.TaskOptions{RunOnStart: true, Stdin: true, StdinOnce: true}})
	s.KillServer() // must not end the input
	f := s.fifos("once")
	defer f.close()
	s.attach("once", f)
	text := strings.Repeat("0123456789abcde\n", 1<<13)
	go func() {
		_, _ = f.in.WriteString(text)
		f.in.Close()
	}()
	if got := f.collect(f.out); got != text {
		s.t.Errorf("%d of %d bytes came back", len(got), len(text))
	}
	if got := f.collect(f.err); got != "copied 131072\n" {
		s.t.Errorf("%q", got)
	}
	if r := s.Wait("once"); r.ExitStatus != 0 {
		s.t.Errorf("%v", r)
	}
	s.Remove("once")
}

// testSlowClient: a client that does not read delays nobody.
func testSlowClient(s *Shim) {
	f := s.fifos("slow")
	defer f.close()
	n := s.on.lines(20000)
	if err := s.Create(Container{ID: "slow", Args: []string{"lines", strconv.Itoa(n), "0", "6"}, Options: onStart}); err != nil {
		s.t.Fatal(err)
	}
	s.attach("slow", f)
	if _, err := s.Task.Start(s.ctx(), &taskapi.StartRequest{ID: "slow"}); err != nil {
		s.t.Fatal(err)
	}
	if r := s.Wait("slow"); r.ExitStatus != 6 {
		s.t.Errorf("%v", r)
	}
	s.CheckLines("slow", n)
	sc := bufio.NewScanner(f.out)
	if !sc.Scan() || !strings.HasPrefix(sc.Text(), "out 0 ") {
		s.t.Errorf("the client got %q first", sc.Text())
	}
	s.Remove("slow")
}

func testReopenLog(s *Shim) {
	n := s.on.lines(3000)
	s.Run(Container{ID: "rot", Args: []string{"lines", strconv.Itoa(n), "200", "0"}, Options: onStart})
	var parts []string
	for i := range 5 {
		s.await("some lines", func() bool {
			st, err := os.Stat(s.LogPath("rot"))
			return err == nil && st.Size() > 0
		})
		part := s.LogPath("rot") + "." + itoa(uint32(i))
		if err := os.Rename(s.LogPath("rot"), part); err != nil {
			s.t.Fatal(err)
		}
		parts = append(parts, part)
		if _, err := s.Host.ReopenLog(s.ctx(), &hostv1.ReopenLogRequest{Id: "rot"}); err != nil {
			s.t.Fatal(err)
		}
	}
	s.Wait("rot")
	var all []byte
	for _, p := range append(parts, s.LogPath("rot")) {
		b, err := os.ReadFile(p)
		if err != nil || len(b) == 0 || b[len(b)-1] != '\n' {
			s.t.Errorf("part %s of %d bytes: %v", p, len(b), err)
		}
		all = append(all, b...)
	}
	if err := os.WriteFile(s.LogPath("rot"), all, 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.CheckLines("rot", n)
	s.Remove("rot")
}
