package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// A network plugin that fails in any way fails the one pod, in time, and what
// was done before it is undone.
func TestFailingNetworkPlugin(t *testing.T) {
	s := newStage(t)
	n := gated(t, s)
	witness(t, n)
	check := noLeak(t, n)
	for mode, words := range map[string][]string{
		"fail":    {"no more widgets", "gate"},
		"rubbish": {"gate"},
		"crash":   {"gate"},
	} {
		s.mode(mode)
		cfg := podConfig(n, t)
		began := time.Now()
		_, err := runSandbox(t.Context(), n, cfg, 30*time.Second)
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("%s: the answer took %v", mode, took)
		}
		wantOneOf(t, err, []codes.Code{codes.Unavailable, codes.Internal, codes.FailedPrecondition}, append(words, "network", cfg.Metadata.Name)...)
		s.mode("pass")
		id, err := runSandbox(t.Context(), n, cfg, 30*time.Second)
		if err != nil {
			t.Fatalf("%s: the same pod after the plugin was mended: %v", mode, err)
		}
		(&pod{t, n, id, cfg}).remove()
	}
	check()
}

// A plugin that hangs costs its pod the deadline and nobody else anything.
func TestHangingNetworkPlugin(t *testing.T) {
	s := newStage(t)
	n := gated(t, s)
	witness(t, n)
	beside := runPod(t, n)
	check := noLeak(t, n)
	s.mode("hold")
	cfg := podConfig(n, t)
	began := time.Now()
	_, err := runSandbox(t.Context(), n, cfg, time.Second)
	wantError(t, err, codes.DeadlineExceeded)
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("the answer took %v", took)
	}
	c := beside.sh("echo beside")
	if st := c.ended(); st.ExitCode != 0 {
		t.Errorf("beside it a container ended with %d", st.ExitCode)
	}
	c.remove()
	if r, err := n.Runtime.Status(t.Context(), &cri.StatusRequest{}); err != nil || len(r.Status.Conditions) < 2 {
		t.Errorf("status: %v %v", r, err)
	}
	s.mode("fail")
	if _, err := runSandbox(t.Context(), n, cfg, 30*time.Second); err == nil {
		t.Error("the plugin failed, and the pod runs")
	}
	check()

	// DEL that fails is told, and repeated until it succeeds.
	s.mode("pass")
	p := runPod(t, n)
	s.mode("fail-del")
	_, err = n.Runtime.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: p.id})
	wantOneOf(t, err, []codes.Code{codes.Unavailable, codes.Internal, codes.FailedPrecondition}, "no more widgets", "gate")
	s.mode("pass")
	p.remove()
	check()
}

// A daemon that is told to end does not wait for plugins that hang; the next
// one takes down what they were called for.
func TestStopWhilePluginsHang(t *testing.T) {
	s := newStage(t)
	n := gated(t, s)
	check := noLeak(t, n)
	s.mode("pass")
	ready := runPod(t, n)
	s.mode("hang")
	cfg := podConfig(n, t)
	lost := make(chan error, 2)
	go func() {
		_, err := runSandbox(t.Context(), n, cfg, time.Minute)
		lost <- err
	}()
	go func() {
		_, err := n.Runtime.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: ready.id})
		lost <- err
	}()
	eventually(t, 10*time.Second, "the plugin is called for both", func() bool { return s.called("ADD") > 1 && s.called("DEL") > 0 })
	began := time.Now()
	ctx, cancel := limit(t, 30*time.Second)
	defer cancel()
	if err := n.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > 7*time.Second {
		t.Errorf("the daemon took %v to end", took)
	}
	for range cap(lost) {
		if err := <-lost; err == nil {
			t.Error("a plugin hangs, and the request succeeded")
		}
	}
	s.mode("pass")
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	ready.remove()
	id, err := runSandbox(t.Context(), n, cfg, 30*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	(&pod{t, n, id, cfg}).remove()
	if found := fsck(t, n); found != "" {
		t.Errorf("fsck finds %s", found)
	}
	check()
}

// staged is a node with a handler "stage", whose runtime is of a stage.
func staged(t *testing.T) (stage, *testnode.Node) {
	t.Helper()
	s := newStage(t)
	return s, own(t, testnode.Options{Handlers: map[string]string{"runc": "runc", "stage": filepath.Join(s.dir, "oci")}, Default: "runc"})
}

func TestFailingOCIRuntime(t *testing.T) {
	s, n := staged(t)
	witness(t, n)
	p := runHandlerPod(t, n, "stage")
	check := noLeak(t, n)
	for mode, words := range map[string][]string{
		"fail":    nil,
		"rubbish": nil,
		"crash":   nil,
	} {
		s.mode(mode)
		c := p.create(busybox, []string{"sleep", "1000"})
		began := time.Now()
		err := c.tryStart()
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("%s: the answer took %v", mode, took)
		}
		wantOneOf(t, err, []codes.Code{codes.Internal, codes.Unavailable, codes.Unknown, codes.FailedPrecondition}, append(words, "start", c.cfg.Metadata.Name, "oci")...)
		if st := c.status(); st.State != cri.ContainerState_CONTAINER_EXITED || st.ExitCode != 128 || st.Reason != "StartError" || st.Message == "" {
			t.Errorf("%s: the container is %v with %d %s %q", mode, st.State, st.ExitCode, st.Reason, st.Message)
		}
		c.remove()
		s.mode("pass")
		c = p.sh(trapping)
		c.waitLog("ready")
		c.stop(5)
		if st := c.status(); st.ExitCode != 40 {
			t.Errorf("after %s a container ended with %d, not 40", mode, st.ExitCode)
		}
		c.remove()
	}
	check()
}

// A runtime that cannot delete a container for a while keeps it from being
// removed until it can, and nothing stays.
func TestOCIRuntimeThatCannotDelete(t *testing.T) {
	s, n := staged(t)
	witness(t, n)
	p := runHandlerPod(t, n, "stage")
	check := noLeak(t, n)
	tasks := filepath.Join(n.State(), "shim", "container", "tasks")
	before := entries(tasks)
	s.mode("fail-del")
	c := p.sh("exit 3")
	if st := c.ended(); st.ExitCode != 3 {
		t.Errorf("a container that exits with 3 is %v", st)
	}
	_, err := n.Runtime.RemoveContainer(t.Context(), &cri.RemoveContainerRequest{ContainerId: c.id})
	wantOneOf(t, err, []codes.Code{codes.Internal, codes.Unavailable, codes.Unknown, codes.FailedPrecondition}, "oci delete", c.id[:13])
	s.mode("pass")
	c.remove()
	if now := entries(tasks); now != before {
		t.Errorf("the shim has %d tasks, it had %d", now, before)
	}
	check()
	if found := fsck(t, n); found != "" {
		t.Errorf("fsck finds %s", found)
	}
}

func TestHangingOCIRuntime(t *testing.T) {
	s, n := staged(t)
	witness(t, n)
	p := runHandlerPod(t, n, "stage")
	t.Cleanup(func() { s.mode("pass") }) // or the pod's removal waits
	check := noLeak(t, n)
	s.mode("hold")
	c := p.create(busybox, []string{"sh", "-c", trapping})
	first := make(chan error, 1)
	ctx, cancel := limit(t, time.Second)
	defer cancel()
	go func() {
		_, err := n.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: c.id})
		first <- err
	}()
	wantError(t, <-first, codes.DeadlineExceeded)
	// Other pods and the lists do not wait for it.
	beside := runPod(t, n)
	beside.sh("exit 0").ended()
	beside.remove()
	if st := c.status(); st.State != cri.ContainerState_CONTAINER_CREATED {
		t.Errorf("while it starts, the container is %v", st.State)
	}
	again := make(chan error, 1)
	go func() { again <- c.tryStart() }()
	s.mode("pass")
	// The first start went on; the second finds it done.
	wantError(t, <-again, codes.FailedPrecondition, c.id[:13], "running")
	c.waitLog("ready")
	c.stop(5)
	if st := c.status(); st.ExitCode != 40 {
		t.Errorf("exit code %d, not 40", st.ExitCode)
	}
	// A pod is stopped while its container's start hangs.
	s.mode("hold")
	c2 := p.create(busybox, []string{"sh", "-c", ignoring})
	started := make(chan error, 1)
	go func() { started <- c2.tryStart() }()
	eventually(t, 10*time.Second, "the runtime is called", func() bool { return s.called("run")+s.called("create") >= 3 })
	stopped := make(chan error, 1)
	go func() {
		_, err := n.Runtime.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: p.id})
		stopped <- err
	}()
	s.mode("pass")
	<-started
	if err := <-stopped; err != nil {
		t.Errorf("stop pod: %v", err)
	}
	if st := c2.status(); st.State != cri.ContainerState_CONTAINER_EXITED {
		t.Errorf("in the stopped pod the container is %v", st.State)
	}
	c.remove()
	c2.remove()
	check()
}

// A full disk fails what needs it, by name, and nothing else; when there is
// room again everything works.
func TestFullDisk(t *testing.T) {
	n := own(t, testnode.Options{})
	// The node's root becomes a small file system of its own.
	if err := n.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(n.Root()); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(n.Root(), 0o711); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("small", n.Root(), "tmpfs", 0, "size=48m"); err != nil {
		t.Fatal(err)
	}
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, ref := range []string{demo, busybox} {
		if _, err := pull(t.Context(), n, ref); err != nil {
			t.Fatal(err)
		}
	}
	big := push(t, hostileImage(t, nil, file{path: "/big", data: make([]byte, 128<<20)}))
	witness(t, n)
	p := runPod(t, n)
	running := p.sh(trapping)
	running.waitLog("ready")
	check := noLeak(t, n)

	free := room(t, n.Root())
	_, err := pull(t.Context(), n, big)
	wantError(t, err, codes.ResourceExhausted, big)
	eventually(t, 10*time.Second, "what was half unpacked is gone", func() bool { return room(t, n.Root()) > free-1<<20 })
	filler := filepath.Join(n.Root(), "filler")
	fill(t, filler)
	// A pod needs no room but for its record, which may still find some.
	cfg := podConfig(n, t)
	if id, err := runSandbox(t.Context(), n, cfg, 20*time.Second); err == nil {
		(&pod{t, n, id, cfg}).remove()
	} else {
		wantError(t, err, codes.ResourceExhausted, "no space left")
	}
	wantError(t, createUntilRefused(t, p), codes.ResourceExhausted, "no space left")
	if out := running.run("echo alive"); out != "alive" {
		t.Errorf("exec on a full disk says %q", out)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	c := p.sh("exit 5")
	if st := c.ended(); st.ExitCode != 5 {
		t.Errorf("with room again a container ended with %d", st.ExitCode)
	}
	c.remove()
	running.stop(5)
	if st := running.status(); st.ExitCode != 40 {
		t.Errorf("exit code %d, not 40", st.ExitCode)
	}
	if found := fsck(t, n); found != "" {
		t.Errorf("fsck finds %s", found)
	}
	running.remove()
	check()
}

// createUntilRefused makes containers with long records: databases have some
// room of their own.
func createUntilRefused(t *testing.T, p *pod) error {
	t.Helper()
	for range 100 {
		c, err := p.tryCreate(t.Context(), containerConfig(busybox, []string{"true"}, func(c *cri.ContainerConfig) {
			c.Annotations = map[string]string{"long": strings.Repeat("x", 100_000)}
		}))
		if err != nil {
			return err
		}
		defer c.remove()
	}
	return nil
}

func room(t *testing.T, dir string) uint64 {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return st.Bavail * uint64(st.Bsize)
}

// fill writes until there is no room.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, size := range []int{1 << 20, 4096} {
		block := make([]byte, size)
		for {
			if _, err := f.Write(block); err != nil {
				break
			}
		}
	}
}

// A log that cannot be written neither stops its container nor keeps its end
// from being told.
func TestFullLogDisk(t *testing.T) {
	n := shared(t)
	dir := t.TempDir()
	if err := unix.Mount("small", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	p := runPod(t, n, func(c *cri.PodSandboxConfig) { c.LogDirectory = dir })
	few := p.sh("sleep 0.5; echo the last words; exit 5")
	fill(t, filepath.Join(dir, "filler"))
	for _, c := range []struct {
		name string
		c    *container
		exit int32
		end  time.Duration // it writes more than the pipe to the log holds, and waits
	}{
		{"a few words", few, 5, 3 * time.Second},
		{"many words", p.sh("i=0; while [ $i -lt 4000 ]; do echo 0123456789012345678901234567890123456789; i=$((i+1)); done; exit 6"), 6, 8 * time.Second},
	} {
		began := time.Now()
		st := c.c.ended()
		if st.ExitCode != c.exit {
			t.Errorf("%s: exit code %d, not %d", c.name, st.ExitCode, c.exit)
		}
		if took := time.Since(began); took > c.end {
			t.Errorf("%s: the end was told after %v", c.name, took)
		}
	}
}
