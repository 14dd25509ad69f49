package integration

import (
	"context"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// What the daemon knew before it ended it knows afterwards, and what it knows
// still works.
func TestRestartKeepsState(t *testing.T) {
	n := own(t, testnode.Options{})
	witness(t, n)
	check := noLeak(t, n)
	p := runPod(t, n)
	running := p.sh(trapping)
	running.waitLog("ready")
	created := p.create(busybox, []string{"sh", "-c", "exit 3"})
	ended := p.sh("exit 7")
	ended.ended()
	dying := p.sh("while [ ! -e /go ]; do sleep 0.02; done; exit 9")
	stopped := runPod(t, n)
	stopped.demo("-hold")
	if _, err := n.Runtime.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: stopped.id}); err != nil {
		t.Fatal(err)
	}
	before := snapshot(t, n)
	ip := p.status().Network.Ip
	for name, end := range map[string]func(context.Context) error{"SIGTERM": n.Stop, "SIGKILL": n.Kill} {
		if err := end(t.Context()); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := n.Run(t.Context()); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if after := snapshot(t, n); after != before {
			t.Errorf("after %s the node tells\n%s\nand told before\n%s", name, after, before)
		}
		if found := fsck(t, n); found != "" {
			t.Errorf("after %s fsck finds %s", name, found)
		}
	}
	if got := p.status().Network.Ip; got != ip {
		t.Errorf("address %s, before %s", got, ip)
	}
	if out := running.run("echo alive"); out != "alive" {
		t.Errorf("exec after the restart says %q", out)
	}
	if _, err := dying.execSync(10, "touch", "/go"); err != nil { // its exit code may be that of the container's end
		t.Error(err)
	}
	if st := dying.ended(); st.ExitCode != 9 {
		t.Errorf("exit code %d, not 9", st.ExitCode)
	}
	created.start()
	if st := created.ended(); st.ExitCode != 3 {
		t.Errorf("exit code %d, not 3", st.ExitCode)
	}
	running.stop(10)
	if st := running.status(); st.ExitCode != 40 {
		t.Errorf("exit code %d, not 40", st.ExitCode)
	}
	p.remove()
	stopped.remove()
	check()
}

// snapshot is all that the lists and statuses tell, in one text.
func snapshot(t *testing.T, n *testnode.Node) string {
	t.Helper()
	var b strings.Builder
	pods, err := n.Runtime.ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		st, err := n.Runtime.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: p.Id})
		if err != nil {
			t.Fatal(err)
		}
		st.Timestamp, st.ContainersStatuses = 0, nil
		b.WriteString(p.String() + "\n" + st.Status.String() + "\n")
	}
	ctrs, err := n.Runtime.ListContainers(t.Context(), &cri.ListContainersRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range ctrs.Containers {
		st, err := n.Runtime.ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: c.Id})
		if err != nil {
			t.Fatal(err)
		}
		b.WriteString(c.String() + "\n" + st.Status.String() + "\n")
	}
	// The text form of protobuf messages varies its spaces on purpose.
	return strings.Join(strings.FieldsFunc(b.String(), func(r rune) bool { return r == ' ' }), " ")
}

// The daemon is killed at random moments while pods are made and unmade.
// Nothing is stuck afterwards and nothing is left.
func TestKillAtAnyMoment(t *testing.T) {
	n := own(t, testnode.Options{})
	witness(t, n)
	check := noLeak(t, n)
	var wg sync.WaitGroup
	done := make(chan struct{})
	for range 3 {
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
					churn(t, n)
				}
			}
		})
	}
	for range 20 {
		time.Sleep(time.Duration(50+rand.IntN(250)) * time.Millisecond) // the moment is what varies
		restart(t, n)
	}
	close(done)
	wg.Wait()
	removeNamed(t, n, "churn")
	if found := fsck(t, n); found != "" {
		t.Errorf("fsck finds %s", found)
	}
	check()
}

// churn takes a pod through its life. Only the daemon's absence may fail it.
func churn(t *testing.T, n *testnode.Node) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cfg := podConfig(n, t, func(c *cri.PodSandboxConfig) { c.Metadata.Namespace = "churn" })
	fine := func(err error) bool {
		if err != nil && status.Code(err) != codes.Unavailable {
			t.Errorf("churn: %v", err)
		}
		if err != nil {
			time.Sleep(5 * time.Millisecond) // the daemon is just not there
		}
		return err == nil
	}
	sb, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: cfg})
	if !fine(err) {
		return
	}
	c, err := n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: sb.PodSandboxId, SandboxConfig: cfg, Config: containerConfig(busybox, []string{"sleep", "1000"})})
	if !fine(err) {
		return
	}
	if _, err = n.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: c.ContainerId}); !fine(err) {
		return
	}
	if _, err = n.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: sb.PodSandboxId}); !fine(err) {
		return
	}
	_, err = n.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: sb.PodSandboxId})
	fine(err)
}

// removeNamed removes the pods of a namespace as kubelet would: whatever is
// listed goes, at the first attempt.
func removeNamed(t *testing.T, n *testnode.Node, namespace string) {
	t.Helper()
	list, err := n.Runtime.ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range list.Items {
		if p.Metadata.Namespace == namespace {
			(&pod{t: t, n: n, id: p.Id}).remove()
		}
	}
}

// The daemon dies while the runtime makes a container: afterwards the
// container has either started or can be.
func TestRestartDuringStartContainer(t *testing.T) {
	s, n := staged(t)
	witness(t, n)
	check := noLeak(t, n)
	p := runHandlerPod(t, n, "stage")
	for name, end := range map[string]func(context.Context) error{"SIGTERM": n.Stop, "SIGKILL": n.Kill} {
		s.mode("hold")
		c := p.create(busybox, []string{"sh", "-c", trapping})
		runs := s.called("run")
		lost := make(chan error, 1)
		go func() { lost <- c.tryStart() }()
		eventually(t, 10*time.Second, "the runtime is called", func() bool { return s.called("run") > runs })
		ended := make(chan error, 1)
		go func() { ended <- end(t.Context()) }()
		if name == "SIGTERM" {
			s.mode("pass") // a clean end may wait for it
		}
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		<-lost
		s.mode("pass")
		if err := n.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		if st := c.status(); st.State == cri.ContainerState_CONTAINER_CREATED {
			if err := c.tryStart(); err != nil {
				t.Errorf("%s: start again: %v", name, err)
			}
		}
		c.waitLog("ready")
		c.stop(5)
		if st := c.status(); st.ExitCode != 40 {
			t.Errorf("%s: exit code %d, not 40", name, st.ExitCode)
		}
		c.remove()
	}
	p.remove()
	if found := fsck(t, n); found != "" {
		t.Errorf("fsck finds %s", found)
	}
	check()
}
