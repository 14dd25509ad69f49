package fault

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// TestKill ends the daemon, the shim and both with SIGKILL, again and again,
// under pods that write numbered lines and pods that come to their end just
// then.
func TestKill(t *testing.T) {
	n := node(t, "cni")
	writers := 20
	if os.Getenv("HANDLER") == "vm" {
		writers = 4 // each is a processor to emulate
	}
	kills, count := number(t, "KILLS", 20), number(t, "PODS", writers)
	pods := make([]pod, count)
	each(t, count, 4, func(i int) (err error) {
		pods[i], err = runPod(t.Context(), n, fmt.Sprintf("writer-%d", i), "-lines", "-n", "0", "-rate", "200", "-exit", strconv.Itoa(i+1))
		return err
	})
	if t.Failed() {
		return
	}
	started := make([]int64, count)
	for i, p := range pods {
		st, err := status(t.Context(), n, p.container)
		if err != nil {
			t.Fatal(err)
		}
		started[i] = st.StartedAt
	}
	for _, victim := range []string{"daemon", "shim", "both"} {
		t.Run(victim, func(t *testing.T) {
			for round := range kills {
				killRound(t, n, victim, round)
				if t.Failed() {
					return
				}
			}
		})
	}
	for i, p := range pods {
		st, err := status(t.Context(), n, p.container)
		if err != nil {
			t.Fatal(err)
		}
		if st.State != cri.ContainerState_CONTAINER_RUNNING || st.StartedAt != started[i] {
			t.Errorf("writer %d is %v, started at %d, not running since %d: %s %s", i, st.State, st.StartedAt, started[i], st.Reason, st.Message)
		}
	}
	finish(t, n, pods)
}

// killRound starts containers that end with known statuses around the kill.
func killRound(t *testing.T, n *testnode.Node, victim string, round int) {
	const enders = 3
	codes := [enders]int{round%200 + 1, 0, 77}
	short := make([]pod, enders)
	each(t, enders, enders, func(i int) (err error) {
		// Lives 0 to about 150 ms beyond its start.
		lines := strconv.Itoa(1 + rand.IntN(30))
		short[i], err = runPod(t.Context(), n, fmt.Sprintf("%s-%d-%d", victim, round, i), "-lines", "-n", lines, "-rate", "200", "-exit", strconv.Itoa(codes[i]))
		return err
	})
	if t.Failed() {
		return
	}
	if victim != "shim" {
		if err := n.Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if victim != "daemon" {
		killShim(t, n)
	}
	if victim != "shim" {
		// What happens while nobody is there must be learnt afterwards.
		time.Sleep(time.Duration(rand.IntN(200)) * time.Millisecond)
		if err := n.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for i, p := range short {
		st, err := ended(t.Context(), n, p.container)
		if err != nil {
			t.Error(err)
			continue
		}
		if st.ExitCode != int32(codes[i]) {
			t.Errorf("%s round %d: container that ended with %d is reported with %d (%s %s)", victim, round, codes[i], st.ExitCode, st.Reason, st.Message)
		}
		if _, err := checkLog(p.log); err != nil {
			t.Error(err)
		}
		remove(t, n, p)
	}
}

// killShim ends the resident shim process of the node, not its keeper.
func killShim(t *testing.T, n *testnode.Node) {
	pid := shimPID(n)
	if pid == 0 {
		t.Fatal("no shim is serving")
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

func shimPID(n *testnode.Node) int {
	backend := "container"
	if os.Getenv("HANDLER") == "vm" {
		backend = "vm"
	}
	for _, pid := range n.Processes() {
		cmd, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
		args := bytes.Split(cmd, []byte{0})
		if err == nil && len(args) > 2 && filepath.Base(string(args[0])) == "cloister-shim" && string(args[1]) == "serve" && bytes.Contains(cmd, []byte("/shim/"+backend)) {
			return pid
		}
	}
	return 0
}

func remove(t *testing.T, n *testnode.Node, p pod) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := n.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.sandbox}); err != nil {
		t.Error(err)
	}
	if _, err := n.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.sandbox}); err != nil {
		t.Error(err)
	}
}

// finish stops the writers and reads what they wrote.
func finish(t *testing.T, n *testnode.Node, pods []pod) {
	total := 0
	for i, p := range pods {
		if _, err := n.Runtime.StopContainer(t.Context(), &cri.StopContainerRequest{ContainerId: p.container, Timeout: 10}); err != nil {
			t.Fatal(err)
		}
		st, err := ended(t.Context(), n, p.container)
		if err != nil {
			t.Fatal(err)
		}
		if st.ExitCode != int32(i+1) {
			t.Errorf("writer %d ended with %d, not %d (%s %s)", i, st.ExitCode, i+1, st.Reason, st.Message)
		}
		lines, err := checkLog(p.log)
		if err != nil {
			t.Error(err)
		}
		if lines == 0 {
			t.Errorf("writer %d has an empty log", i)
		}
		total += lines
		remove(t, n, p)
	}
	t.Logf("%d writers, %d lines, none lost and none twice", len(pods), total)
}
