package external

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestExternalShim shares one node among its parts, which leave nothing.
func TestExternalShim(t *testing.T) {
	m := start(t, "")
	for _, part := range []struct {
		name string
		run  func(*testing.T, machine)
	}{
		{"container", testContainer},
		{"failed start", testFailedStart},
		{"one shim a pod", testOneShim},
		{"stop", testStop},
		{"exec", testExec},
		{"attach", testAttach},
		{"terminal", testTerminal},
		{"resources", testResources},
		{"out of memory", testOOM},
		{"shared PID namespace", testSharedPID},
		{"log rotation", testRotation},
		{"parallel", testParallel},
		{"daemon restarted", func(t *testing.T, m machine) { testRestart(t, m, m.Stop) }},
		{"daemon killed", func(t *testing.T, m machine) { testRestart(t, m, m.Kill) }},
		{"shim killed", testShimKilled},
		{"shim and daemon killed", testBothKilled},
		{"start cut off", testStartCutOff},
		{"shim that fails", testBadShim},
	} {
		t.Run(part.name, func(t *testing.T) {
			before := m.held(t)
			part.run(t, m)
			if !t.Failed() {
				m.nothingLeft(t, before)
			}
		})
	}
}

func testContainer(t *testing.T, m machine) {
	p := m.mustRun(t, "container")
	defer p.mustRemove(t)
	id := p.mustStart(t, script("c", "echo out; echo err >&2; head -c 40000 /dev/zero | tr '\\0' x; echo; exit 42"))
	if st := m.ended(t, id); st.ExitCode != 42 || st.Reason != "Error" || st.FinishedAt == 0 {
		t.Errorf("a container that exits with 42 is %v", st)
	}
	logged(t, p.log("c"), "out")
	logged(t, p.log("c"), "err")
	until(t, "the long line is whole", func() bool {
		data, _ := os.ReadFile(p.log("c"))
		return strings.Count(string(data), "x") == 40000
	})
}

func testFailedStart(t *testing.T, m machine) {
	p := m.mustRun(t, "failed-start")
	defer p.mustRemove(t)
	c := script("c", "")
	c.Command = []string{"/no/such/program"}
	if _, err := p.start(t.Context(), c); err == nil || !strings.Contains(err.Error(), "/no/such/program") {
		t.Errorf("a program that is not there: %v", err)
	}
	if pumps := m.held(t)["pumps"]; pumps != 0 {
		t.Errorf("%d containers that do not run have streams", pumps)
	}
}

func testOneShim(t *testing.T, m machine) {
	p := m.mustRun(t, "one-shim")
	defer p.mustRemove(t)
	for _, name := range []string{"a", "b"} {
		p.mustStart(t, script(name, "echo here; sleep 1000"))
		logged(t, p.log(name), "here")
	}
	if pids := m.shims(p.id); len(pids) != 1 {
		t.Errorf("two containers of a pod have the shims %v", pids)
	}
}

func testStop(t *testing.T, m machine) {
	p := m.mustRun(t, "stop")
	defer p.mustRemove(t)
	polite := p.mustStart(t, script("polite", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done"))
	stubborn := p.mustStart(t, script("stubborn", "trap '' TERM; echo ready; while :; do sleep 0.1; done"))
	logged(t, p.log("polite"), "ready")
	logged(t, p.log("stubborn"), "ready")
	stop := func(id string, timeout int64) time.Duration {
		began := time.Now()
		if _, err := m.Runtime.StopContainer(t.Context(), &cri.StopContainerRequest{ContainerId: id, Timeout: timeout}); err != nil {
			t.Fatal(err)
		}
		return time.Since(began)
	}
	if took := stop(polite, 20); took > 15*time.Second {
		t.Errorf("a container that obeys was stopped in %v", took)
	}
	if st := m.status(t, polite); st.State != cri.ContainerState_CONTAINER_EXITED || st.ExitCode != 7 {
		t.Errorf("a container that exits with 7 on SIGTERM is %v", st)
	}
	if took := stop(stubborn, 1); took < time.Second {
		t.Errorf("a container had %v of its second", took)
	}
	if st := m.status(t, stubborn); st.State != cri.ContainerState_CONTAINER_EXITED || st.ExitCode != 137 {
		t.Errorf("a container that ignores SIGTERM is %v", st)
	}
	stop(polite, 1) // an ended one is success
}

func testExec(t *testing.T, m machine) {
	p := m.mustRun(t, "exec")
	defer p.mustRemove(t)
	id := p.mustStart(t, script("c", "sleep 1000"))
	r := m.execSync(t, id, "sh", "-c", "echo out; echo err >&2; exit 3")
	if string(r.Stdout) != "out\n" || string(r.Stderr) != "err\n" || r.ExitCode != 3 {
		t.Errorf("ExecSync gave %q, %q, %d", r.Stdout, r.Stderr, r.ExitCode)
	}
	r = m.execSync(t, id, "sh", "-c", "head -c 3000000 /dev/zero")
	if len(r.Stdout) != 3000000 {
		t.Errorf("%d of 3000000 bytes came out", len(r.Stdout))
	}
	if _, err := m.Runtime.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"/no/such"}}); err == nil {
		t.Error("a command that is not there ran")
	}
	began := time.Now()
	if _, err := m.Runtime.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"sleep", "500"}, Timeout: 1}); err == nil || time.Since(began) > 15*time.Second {
		t.Errorf("a command beyond its time: %v after %v", err, time.Since(began))
	}
	// The command ended, its child did not.
	until(t, "no process of an exec is left", func() bool {
		return !strings.Contains(string(m.execSync(t, id, "ps").Stdout), "sleep 500")
	})
	out, err := m.client(t.Context(), strings.NewReader("a line\n"), "exec", "-i", id, "cat")
	if err != nil || !strings.Contains(out, "a line") {
		t.Errorf("exec with input gave %q, %v", out, err)
	}
	if out, err := m.client(t.Context(), nil, "exec", id, "sh", "-c", "exit 5"); err == nil || !strings.Contains(err.Error(), "5") {
		t.Errorf("exec of exit 5 gave %q, %v", out, err)
	}
}

func testAttach(t *testing.T, m machine) {
	p := m.mustRun(t, "attach")
	defer p.mustRemove(t)
	c := script("once", "while read l; do echo got $l; done; echo end of input; exit 6")
	c.Stdin, c.StdinOnce = true, true
	id := p.mustStart(t, c)
	out, err := m.client(t.Context(), strings.NewReader("one\ntwo\n"), "attach", "-i", id)
	if err != nil || !strings.Contains(out, "got two") || !strings.Contains(out, "end of input") {
		t.Errorf("attach gave %q, %v", out, err)
	}
	if st := m.ended(t, id); st.ExitCode != 6 {
		t.Errorf("the container whose input ended is %v", st)
	}
	logged(t, p.log("once"), "got two")
	logged(t, p.log("once"), "end of input")

	c = script("kept", "while read l; do echo got $l; done; exit 6")
	c.Stdin = true
	id = p.mustStart(t, c)
	for _, line := range []string{"one", "two"} {
		// The client leaves when its time is over: the input of the container stays open.
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = m.client(ctx, strings.NewReader(line+"\n"), "attach", "-i", id)
		}()
		logged(t, p.log("kept"), "got "+line)
		cancel()
		<-done
	}
	if st := m.status(t, id); st.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the container whose clients left is %v", st)
	}
}

func testTerminal(t *testing.T, m machine) {
	p := m.mustRun(t, "terminal")
	defer p.mustRemove(t)
	c := script("c", "[ -t 0 ] && [ -t 1 ] && echo terminal; while read l; do echo got $l; [ $l = end ] && exit 9; done")
	c.Tty, c.Stdin = true, true
	id := p.mustStart(t, c)
	logged(t, p.log("c"), "terminal\r")
	if out, err := m.terminalClient(t, "end\n", "attach", "-i", "-t", id); err != nil || !strings.Contains(out, "got end") {
		t.Errorf("attach gave %q, %v", out, err)
	}
	if st := m.ended(t, id); st.ExitCode != 9 {
		t.Errorf("the container is %v", st)
	}
	id = p.mustStart(t, script("d", "sleep 1000"))
	if out, err := m.terminalClient(t, "", "exec", "-i", "-t", id, "sh", "-c", "[ -t 1 ] && echo terminal"); err != nil || !strings.Contains(out, "terminal") {
		t.Errorf("exec with a terminal gave %q, %v", out, err)
	}
}

func testResources(t *testing.T, m machine) {
	p := m.mustRun(t, "resources")
	defer p.mustRemove(t)
	c := script("c", "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; echo busy; sleep 1000")
	c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuShares: 512}
	id := p.mustStart(t, c)
	logged(t, p.log("c"), "busy")
	until(t, "the statistics show what the container used", func() bool {
		r, err := m.Runtime.ContainerStats(t.Context(), &cri.ContainerStatsRequest{ContainerId: id})
		if err != nil {
			t.Fatal(err)
		}
		return r.Stats.GetCpu().GetUsageCoreNanoSeconds().GetValue() > 1e6 && r.Stats.GetMemory().GetWorkingSetBytes().GetValue() > 0
	})
	_, err := m.Runtime.UpdateContainerResources(t.Context(), &cri.UpdateContainerResourcesRequest{ContainerId: id,
		Linux: &cri.LinuxContainerResources{MemoryLimitInBytes: 96 << 20, CpuShares: 256}})
	if err != nil {
		t.Fatal(err)
	}
	if got := limit(t, id); got != fmt.Sprint(96<<20) {
		t.Errorf("after an update to %d the limit is %s", 96<<20, got)
	}
}

// limit reads the memory limit in the container's cgroup.
func limit(t *testing.T, id string) string {
	t.Helper()
	for _, pattern := range []string{"/sys/fs/cgroup/memory/%s%s/memory.limit_in_bytes", "/sys/fs/cgroup/%s%s/memory.max"} {
		for _, depth := range []string{"", "*/", "*/*/"} {
			found, _ := filepath.Glob(fmt.Sprintf(pattern, depth, id))
			for _, f := range found {
				data, err := os.ReadFile(f)
				if err != nil {
					t.Fatal(err)
				}
				return strings.TrimSpace(string(data))
			}
		}
	}
	t.Fatalf("container %s has no memory cgroup", id)
	return ""
}

func testOOM(t *testing.T, m machine) {
	p := m.mustRun(t, "oom")
	defer p.mustRemove(t)
	c := script("c", "x=a; while :; do x=$x$x$x$x; done")
	c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 16 << 20, MemorySwapLimitInBytes: 16 << 20}
	id := p.mustStart(t, c)
	if st := m.ended(t, id); st.ExitCode != 137 || st.Reason != "OOMKilled" {
		t.Errorf("a container that takes too much memory is %v", st)
	}
}

// sharePID runs a pod whose containers share a PID namespace.
func sharePID(t *testing.T, m machine, name string) pod {
	t.Helper()
	cfg := m.podConfig(name)
	cfg.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_POD
	p, err := m.run(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// shared is a container in the pod's PID namespace.
func shared(c *cri.ContainerConfig) *cri.ContainerConfig {
	c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_POD
	return c
}

func testSharedPID(t *testing.T, m machine) {
	p := sharePID(t, m, "shared-pid")
	defer p.mustRemove(t)
	p.mustStart(t, shared(script("a", "sleep 4711")))
	b := p.mustStart(t, shared(script("b", "sleep 1000")))
	until(t, "one container sees the other's processes", func() bool {
		return strings.Contains(string(m.execSync(t, b, "ps").Stdout), "sleep 4711")
	})
}

func testRotation(t *testing.T, m machine) {
	p := m.mustRun(t, "rotation")
	defer p.mustRemove(t)
	id := p.mustStart(t, script("c", "i=0; while :; do i=$((i+1)); echo line $i; sleep 0.01; done"))
	logged(t, p.log("c"), "line 20")
	if err := os.Rename(p.log("c"), p.log("c")+".1"); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Runtime.ReopenContainerLog(t.Context(), &cri.ReopenContainerLogRequest{ContainerId: id}); err != nil {
		t.Fatal(err)
	}
	old := numbered(t, p.log("c")+".1", 1)
	logged(t, p.log("c"), fmt.Sprint("line ", old+20))
	if _, err := m.Runtime.StopContainer(t.Context(), &cri.StopContainerRequest{ContainerId: id}); err != nil {
		t.Fatal(err)
	}
	numbered(t, p.log("c"), old+1)
}

// numbered looks whether the log holds line first, first+1, … and gives the last.
func numbered(t *testing.T, path string, first int) int {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	next := first
	for line := range strings.Lines(string(data)) {
		if !strings.HasSuffix(line, fmt.Sprintf(" stdout F line %d\n", next)) {
			t.Fatalf("%s: %q where line %d belongs", path, line, next)
		}
		next++
	}
	return next - 1
}

func testParallel(t *testing.T, m machine) {
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			p, err := m.run(t.Context(), m.podConfig(fmt.Sprint("parallel-", i)))
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := p.start(t.Context(), script("c", fmt.Sprint("echo pod ", i, "; sleep 1000"))); err != nil {
				t.Error(err)
			}
			if !comesTrue(func() bool {
				data, err := os.ReadFile(p.log("c"))
				return err == nil && strings.Contains(string(data), fmt.Sprint("pod ", i, "\n"))
			}) {
				t.Errorf("pod %d does not say who it is", i)
			}
			if err := p.remove(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}
