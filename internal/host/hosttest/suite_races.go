package hosttest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	hostv1 "cloister.dev/api/host/v1"
)

// testSandboxEndsFirst: a sandbox whose end overtakes its start, as when the
// caller gave up on the start, does not come to life.
func testSandboxEndsFirst(s *Shim) {
	create := func(id string) {
		s.t.Helper()
		if _, err := s.Sandbox.CreateSandbox(s.ctx(), &sandboxapi.CreateSandboxRequest{SandboxID: id, BundlePath: s.Dir,
			Options: pack(s.t, &hostv1.SandboxOptions{SharePid: true})}); err != nil {
			s.t.Fatal(err)
		}
	}
	shutdown := func(id string) {
		s.t.Helper()
		if _, err := s.Sandbox.ShutdownSandbox(s.ctx(), &sandboxapi.ShutdownSandboxRequest{SandboxID: id}); err != nil {
			s.t.Error(err)
		}
	}
	create("se-stopped")
	if _, err := s.Sandbox.StopSandbox(s.ctx(), &sandboxapi.StopSandboxRequest{SandboxID: "se-stopped", TimeoutSecs: 5}); err != nil {
		s.t.Error(err)
	}
	_, err := s.Sandbox.StartSandbox(s.ctx(), &sandboxapi.StartSandboxRequest{SandboxID: "se-stopped"})
	if !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		s.t.Errorf("the start of a stopped sandbox: %v", err)
	}
	shutdown("se-stopped")

	for i := range 50 {
		id := "se-" + strconv.Itoa(i)
		create(id)
		var both sync.WaitGroup
		both.Go(func() {
			_, err := s.Sandbox.StartSandbox(s.ctx(), &sandboxapi.StartSandboxRequest{SandboxID: id})
			if err := errgrpc.ToNative(err); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
				s.t.Errorf("a start beside the end: %v", err)
			}
		})
		both.Go(func() { shutdown(id) })
		both.Wait()
	}
	if n := s.running("holder"); n != 0 {
		s.t.Errorf("%d holders of sandboxes that are gone", n)
	}
	if left, _ := os.ReadDir(filepath.Join(s.Dir, "sandboxes")); len(left) != 0 {
		s.t.Errorf("records of sandboxes that are gone: %v", left)
	}
}

// testKillServerDuringSandboxes: the server is killed while it starts sandboxes,
// before it can note the holder of one. Their end is the end of all holders.
func testKillServerDuringSandboxes(s *Shim) {
	for round := range 8 {
		pid := s.ServerPid()
		var all sync.WaitGroup
		for i := range 8 {
			id := fmt.Sprintf("ksb-%d-%d", round, i)
			all.Go(func() { // cut off anywhere
				if _, err := s.Sandbox.CreateSandbox(s.ctx(), &sandboxapi.CreateSandboxRequest{SandboxID: id, BundlePath: s.Dir,
					Options: pack(s.t, &hostv1.SandboxOptions{SharePid: true})}); err == nil {
					_, _ = s.Sandbox.StartSandbox(s.ctx(), &sandboxapi.StartSandboxRequest{SandboxID: id})
				}
			})
		}
		s.await("a holder", func() bool { return s.running("holder") > 0 })
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			s.t.Fatal(err)
		}
		all.Wait()
		s.Connect()
		for i := range 8 {
			if _, err := s.Sandbox.ShutdownSandbox(s.ctx(), &sandboxapi.ShutdownSandboxRequest{SandboxID: fmt.Sprintf("ksb-%d-%d", round, i)}); err != nil {
				s.t.Error(err)
			}
		}
		if n := s.running("holder"); n != 0 {
			s.t.Fatalf("round %d: %d holders of sandboxes that are gone", round, n)
		}
	}
}

// running counts the processes of a program in the state folder.
func (s *Shim) running(program string) (n int) {
	exes, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, exe := range exes {
		if readlink(exe) == filepath.Join(s.Dir, program) {
			n++
		}
	}
	return n
}

// descriptors lists the open files of the keeper and the serving process,
// without the pipes that the standard library keeps in store for splice(2): both
// their ends are in one process.
func (s *Shim) descriptors() (open []string) {
	s.t.Helper()
	for _, pid := range []int{s.keeperPid(), s.ServerPid()} {
		dir := "/proc/" + strconv.Itoa(pid) + "/fd"
		fds, err := os.ReadDir(dir)
		if err != nil {
			s.t.Fatal(err)
		}
		for _, fd := range fds {
			if to, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil {
				open = append(open, fmt.Sprintf("%d %s", pid, to))
			}
		}
	}
	slices.Sort(open)
	ends := map[string]int{}
	for _, o := range open {
		ends[o]++
	}
	return slices.DeleteFunc(open, func(o string) bool { return strings.Contains(o, " pipe:") && ends[o] == 2 })
}

// testRemoveWhileExecStarts: a container is removed while the runtime starts
// an exec in it that does not die with its PID namespace. Neither the process
// nor a descriptor of it stays.
func testRemoveWhileExecStarts(s *Shim) {
	g := s.gate()
	named := *s
	named.Binary = g.path
	f := s.fifos("re")
	defer f.close()
	var before, after []string
	for round := range 4 { // the first one warms up
		id := "re-" + strconv.Itoa(round)
		named.Run(Container{ID: id, Args: []string{"sleep", "100"}, Options: onStart, Spec: func(sp *specs.Spec) {
			sp.Linux.Namespaces = sp.Linux.Namespaces[1:] // the node's PID namespace
		}})
		g.set(s, false)
		started := make(chan error, 1)
		go func() { started <- named.exec(id, "x", f, false, "sleep", "4714") }()
		s.await("the runtime's exec", func() bool { _, err := os.Stat(g.called); return err == nil })
		s.kill(id, syscall.SIGKILL)
		s.Wait(id)
		removed := make(chan error, 1)
		go func() {
			_, err := s.Task.Delete(s.ctx(), &taskapi.DeleteRequest{ID: id})
			removed <- err
		}()
		g.set(s, true)
		if err := <-started; err == nil {
			s.t.Log("the exec started before the removal")
		}
		if err := <-removed; err != nil {
			s.t.Errorf("remove %s: %v", id, err)
		}
		s.await("the end of the exec", func() bool { return !runs("/prog\x00sleep\x004714") })
		if round == 0 {
			before = s.descriptors()
		}
	}
	defer func() {
		if s.t.Failed() {
			s.t.Logf("open before:\n%s\nafter:\n%s", strings.Join(before, "\n"), strings.Join(after, "\n"))
		}
	}()
	s.await("descriptors are closed", func() bool { after = s.descriptors(); return len(after) <= len(before) })
}

// runs tells whether a process with these arguments is alive.
func runs(args string) bool {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), args) {
			return true
		}
	}
	return false
}

// testOpenIOEndsFirst: streams whose end meets their opening leave nothing, and
// who is told that they are open finds them so.
func testOpenIOEndsFirst(s *Shim) {
	open := &hostv1.OpenIORequest{Id: "of", Log: &hostv1.Log{Path: s.LogPath("of"), MaxLineBytes: 16384}, Stdin: true}
	round := func() {
		var all sync.WaitGroup
		for range 3 {
			all.Go(func() {
				if _, err := s.Host.OpenIO(s.ctx(), open); err != nil {
					s.t.Error(err)
				}
			})
			all.Go(func() {
				_, err := s.Host.CloseIO(s.ctx(), &hostv1.CloseIORequest{Id: "of"})
				if err := errgrpc.ToNative(err); err != nil && !errdefs.IsNotFound(err) {
					s.t.Error(err)
				}
			})
		}
		all.Wait()
		_, _ = s.Host.CloseIO(s.ctx(), &hostv1.CloseIORequest{Id: "of"}) // absent when a close came last
	}
	round()
	before := len(s.descriptors())
	for range 100 {
		round()
		r, err := s.Host.OpenIO(s.ctx(), open)
		if err != nil {
			s.t.Fatal(err)
		}
		if _, err := os.Stat(r.Stdout); err != nil {
			s.t.Fatalf("open streams without a FIFO: %v", err)
		}
	}
	_, _ = s.Host.CloseIO(s.ctx(), &hostv1.CloseIORequest{Id: "of"})
	const idle = 4 // two pipes that wait for the next use
	s.await("descriptors are closed", func() bool { return len(s.descriptors()) <= before+idle })
}

// testLogGone: the folder of a container's log cannot be written when a killed
// server is followed by another one. The container runs on, its output is
// counted as lost, and goes on in the log once that can be opened.
func testLogGone(s *Shim) {
	dir := filepath.Join(s.Dir, "lg-logs")
	if err := os.Mkdir(dir, 0o755); err != nil {
		s.t.Fatal(err)
	}
	path := filepath.Join(dir, "log")
	log := &hostv1.Log{Path: path, MaxLineBytes: 16384}
	tty := filepath.Join(dir, "tty")
	said := func(path, text string) func() bool {
		return func() bool {
			b, _ := os.ReadFile(path)
			return strings.Contains(string(b), text)
		}
	}
	s.Run(Container{ID: "lg", Args: []string{"lines", "100000", "5000"}, Options: &hostv1.TaskOptions{RunOnStart: true, Log: log}})
	s.Run(Container{ID: "lg-tty", Args: []string{"trap", "7"}, Terminal: true, Options: &hostv1.TaskOptions{RunOnStart: true,
		Log: &hostv1.Log{Path: tty, MaxLineBytes: 16384}}})
	if _, err := s.Host.OpenIO(s.ctx(), &hostv1.OpenIORequest{Id: "lg-pump", Log: &hostv1.Log{Path: filepath.Join(dir, "pump"), MaxLineBytes: 16384}}); err != nil {
		s.t.Fatal(err)
	}
	s.await("output", said(path, "out 3 "))
	s.await("the handler of signals", said(tty, "ready"))
	if err := os.Rename(dir, dir+".away"); err != nil {
		s.t.Fatal(err)
	}
	s.KillServer()
	for _, id := range []string{"lg", "lg-tty"} {
		if r, err := s.Host.Inspect(s.ctx(), &hostv1.InspectRequest{Id: id}); err != nil || r.Exited {
			s.t.Errorf("%s: %v %v", id, r, err)
		}
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		s.t.Fatal(err)
	}
	s.await("a log", said(path, "stdout F out "))
	s.kill("lg-tty", syscall.SIGTERM)
	if r := s.Wait("lg-tty"); r.ExitStatus != 7 {
		s.t.Errorf("%v", r)
	}
	s.Remove("lg")
	s.Remove("lg-tty")
	if _, err := s.Host.CloseIO(s.ctx(), &hostv1.CloseIORequest{Id: "lg-pump"}); err != nil {
		s.t.Error(err)
	}
}
