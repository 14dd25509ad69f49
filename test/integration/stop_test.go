package integration

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// trapping is a script that ends with 40 at SIGTERM, 41 at SIGUSR1.
const trapping = `trap 'exit 40' TERM; trap 'exit 41' USR1; echo ready; while :; do sleep 0.02; done`

// ignoring is a script that SIGTERM does not end.
const ignoring = `trap '' TERM; echo ready; while :; do sleep 0.05; done`

func TestStopSignal(t *testing.T) {
	n := shared(t)
	usr1 := push(t, hostileImage(t, func(c *imageConfig) { c.StopSignal = "SIGUSR1" }))
	if _, err := pull(t.Context(), n, usr1); err != nil {
		t.Fatal(err)
	}
	p := runPod(t, n)
	for _, c := range []struct {
		name, image string
		config      cri.Signal
		status      cri.Signal
		exit        int32
	}{
		{"neither", busybox, 0, cri.Signal_SIGNAL_SIGTERM, 40},
		{"image", usr1, 0, cri.Signal_SIGNAL_SIGUSR1, 41},
		{"config", busybox, cri.Signal_SIGNAL_SIGUSR1, cri.Signal_SIGNAL_SIGUSR1, 41},
		{"config over image", usr1, cri.Signal_SIGNAL_SIGTERM, cri.Signal_SIGNAL_SIGTERM, 40},
	} {
		ctr := p.create(c.image, []string{"sh", "-c", trapping}, func(cfg *cri.ContainerConfig) { cfg.StopSignal = c.config })
		ctr.start()
		ctr.waitLog("ready")
		if s := ctr.status().StopSignal; s != c.status {
			t.Errorf("%s: status tells stop signal %v, not %v", c.name, s, c.status)
		}
		ctr.stop(10)
		if st := ctr.status(); st.State != cri.ContainerState_CONTAINER_EXITED || st.ExitCode != c.exit || st.Reason != "Error" {
			t.Errorf("%s: %v with %d %s, not %d", c.name, st.State, st.ExitCode, st.Reason, c.exit)
		}
	}
}

func TestStopKillsAfterTheTimeout(t *testing.T) {
	p := runPod(t, shared(t))
	c := p.sh(ignoring)
	c.waitLog("ready")
	began := time.Now()
	c.stop(1)
	if took := time.Since(began); took < time.Second || took > 5*time.Second {
		t.Errorf("stopped after %v, not after 1 s", took)
	}
	if st := c.status(); st.ExitCode != 137 {
		t.Errorf("exit code %d, not 137", st.ExitCode)
	}
	c.stop(1)
	c.remove()
	c.remove()
	c.stop(1)
}

func TestSecondStopShortensTheWait(t *testing.T) {
	p := runPod(t, shared(t))
	c := p.sh(ignoring)
	c.waitLog("ready")
	long := make(chan error, 1)
	go func() {
		_, err := p.n.Runtime.StopContainer(t.Context(), &cri.StopContainerRequest{ContainerId: c.id, Timeout: 100})
		long <- err
	}()
	// Give up on a third one: the others go on.
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err := p.n.Runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: c.id, Timeout: 100})
	wantError(t, err, codes.DeadlineExceeded)
	if st := c.status(); st.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Fatalf("a stop that its client gave up on left the container %v", st.State)
	}
	began := time.Now()
	c.stop(1)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the second stop took %v", took)
	}
	if err := <-long; err != nil {
		t.Errorf("the first stop: %v", err)
	}
}

func TestStopWithoutTimeoutKills(t *testing.T) {
	p := runPod(t, shared(t))
	c := p.sh(trapping)
	c.waitLog("ready")
	c.stop(0)
	if st := c.status(); st.ExitCode != 137 {
		t.Errorf("exit code %d, not 137", st.ExitCode)
	}
}

// Children that outlive a container's first process end with it, also where
// they are in the pod's PID namespace and not in one of the container.
func TestStopEndsEveryProcess(t *testing.T) {
	for _, mode := range []cri.NamespaceMode{cri.NamespaceMode_POD, cri.NamespaceMode_CONTAINER, cri.NamespaceMode_NODE} {
		t.Run(mode.String(), func(t *testing.T) {
			pid := func(c *cri.ContainerConfig) { c.Linux.SecurityContext.NamespaceOptions.Pid = mode }
			p := runPod(t, shared(t), func(c *cri.PodSandboxConfig) {
				c.Linux.SecurityContext.NamespaceOptions.Pid = mode
			})
			beside := p.idle(pid)
			c := p.sh(`trap '' TERM; sh -c "trap '' TERM; while :; do sleep 987; done" & echo ready; while :; do sleep 0.1; done`, pid)
			c.waitLog("ready")
			own := cgroupOf(t, c, "pids")
			c.stop(1)
			if st := c.status(); st.ExitCode != 137 {
				t.Errorf("exit code %d, not 137", st.ExitCode)
			}
			eventually(t, 10*time.Second, "every process of the container is gone", func() bool { return processesIn(own) == 0 })
			if st := beside.status(); st.State != cri.ContainerState_CONTAINER_RUNNING {
				t.Errorf("the container beside is %v", st.State)
			}
		})
	}
}

func TestStopOfWhatNeverRan(t *testing.T) {
	p := runPod(t, shared(t))
	c := p.create(busybox, []string{"true"})
	c.stop(10)
	wantError(t, c.tryStart(), codes.FailedPrecondition, c.id[:13])
	if st := c.status(); st.State != cri.ContainerState_CONTAINER_EXITED {
		t.Errorf("stopped before its start it is %v", st.State)
	}
	c.remove()
}

func TestRemoveOfWhatRuns(t *testing.T) {
	n := own(t, testnode.Options{})
	witness(t, n)
	check := noLeak(t, n)
	p := runPod(t, n)
	c := p.sh(ignoring)
	c.waitLog("ready")
	c.remove()
	_, err := n.Runtime.ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: c.id})
	wantError(t, err, codes.NotFound, c.id[:13])
	p.sh(ignoring).waitLog("ready")
	p.create(busybox, []string{"true"})
	p.demo("-lines", "-n", "0")
	if _, err := n.Runtime.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		t.Fatal(err)
	}
	_, err = n.Runtime.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: p.id})
	wantError(t, err, codes.NotFound, p.id[:13])
	p.remove()
	check()
}

// A pod that is stopped while its containers start ends with none running.
func TestStopPodWhileContainersStart(t *testing.T) {
	n := shared(t)
	for range 5 {
		p := runPod(t, n)
		var started []chan error
		var ctrs []*container
		for range 3 {
			c := p.create(busybox, []string{"sh", "-c", ignoring})
			ctrs = append(ctrs, c)
			done := make(chan error, 1)
			started = append(started, done)
			go func() { done <- c.tryStart() }()
		}
		time.Sleep(time.Duration(serial.Add(1)%5) * 10 * time.Millisecond) // the moment is what varies
		if _, err := n.Runtime.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
			t.Fatal(err)
		}
		for i, done := range started {
			if err := <-done; err != nil {
				wantError(t, err, codes.FailedPrecondition)
			}
			if st := ctrs[i].status(); st.State != cri.ContainerState_CONTAINER_EXITED {
				t.Errorf("in a stopped pod a container is %v", st.State)
			}
		}
		if st := p.status(); st.State != cri.PodSandboxState_SANDBOX_NOTREADY {
			t.Errorf("the stopped pod is %v", st.State)
		}
		_, err := p.tryCreate(t.Context(), containerConfig(busybox, []string{"true"}))
		wantError(t, err, codes.FailedPrecondition, p.id[:13])
	}
}
