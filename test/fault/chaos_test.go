package fault

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// TestChaos kills daemon, shim and keeper in the middle of whatever impatient
// clients just ask for. Afterwards every pod can be removed, and nothing is
// left of any. CHAOS_TIME says for how long.
func TestChaos(t *testing.T) {
	length := 40 * time.Second
	if s := os.Getenv("CHAOS_TIME"); s != "" {
		var err error
		if length, err = time.ParseDuration(s); err != nil {
			t.Fatal(err)
		}
	}
	if os.Getenv("HANDLER") == "vm" {
		t.Skip("kills the shim of ordinary containers")
	}
	n := node(t, "builtin")
	c := client{n: n, name: "warm"}
	c.pod(t.Context(), time.Minute)
	removeAll(t, n)
	before := everything(t, n)
	until := time.Now().Add(length)
	var clients sync.WaitGroup
	for i := range 6 {
		clients.Go(func() {
			for round := 0; time.Now().Before(until); round++ {
				c := client{n: n, name: fmt.Sprintf("chaos-%d-%d", i, round)}
				c.pod(t.Context(), time.Duration(1+rand.IntN(400))*5*time.Millisecond)
			}
		})
	}
	kills := 0
	for ; time.Now().Before(until) && !t.Failed(); kills++ {
		time.Sleep(time.Duration(200+rand.IntN(1500)) * time.Millisecond)
		strike(t, n)
	}
	clients.Wait()
	if t.Failed() {
		return
	}
	removeAll(t, n)
	deadline := time.Now().Add(30 * time.Second)
	for {
		after := everything(t, n)
		more := map[string]int{}
		for what, now := range after {
			if now > before[what]+allowed[what] {
				more[what] = now
			}
		}
		if len(more) == 0 {
			t.Logf("%d kills; before %v, after %v", kills, before, after)
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("left after %d kills: %v, before %v", kills, more, before)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// strike kills one or more of the node's programs, and starts the daemon again.
func strike(t *testing.T, n *testnode.Node) {
	victims := 1 + rand.IntN(7) // any of daemon, shim, keeper
	if victims&1 != 0 {
		if err := n.Kill(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if pid := shimPID(n); pid != 0 && victims&2 != 0 {
		_ = syscall.Kill(pid, syscall.SIGKILL) // it may just have gone
	}
	if pid := keeperPID(n); pid != 0 && victims&4 != 0 {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	if victims&1 != 0 {
		if err := n.Run(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

func keeperPID(n *testnode.Node) (pid int) {
	b, err := os.ReadFile(filepath.Join(n.State(), "shim", "container", "keeper.lock"))
	if err == nil {
		_, _ = fmt.Sscan(string(b), &pid)
	}
	return pid
}

// client asks for one pod and what can be done with it, with little patience.
type client struct {
	n    *testnode.Node
	name string
}

// pod goes through a pod's life. What fails is asked for again once or twice,
// or given up.
func (c client) pod(ctx context.Context, patience time.Duration) {
	try := func(f func(context.Context) error) bool {
		for range 3 {
			call, cancel := context.WithTimeout(ctx, patience)
			err := f(call)
			cancel()
			if err == nil {
				return true
			}
		}
		return false
	}
	cfg := sandboxConfig(c.n, c.name)
	cfg.Linux.SecurityContext = &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode(rand.IntN(2))}}
	var sandbox, id string
	if !try(func(ctx context.Context) error {
		r, err := c.n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: cfg})
		sandbox = r.GetPodSandboxId()
		return err
	}) {
		return
	}
	if try(func(ctx context.Context) error {
		r, err := c.n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: sandbox, SandboxConfig: cfg, Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "demo"}, Image: &cri.ImageSpec{Image: image}, Args: []string{"-lines", "-n", "0", "-rate", "50"}, LogPath: "0.log",
			Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: cfg.Linux.SecurityContext.NamespaceOptions}}}})
		id = r.GetContainerId()
		return err
	}) {
		c.container(ctx, id, patience)
	}
	if rand.IntN(3) == 0 {
		return // left for the end
	}
	try(func(ctx context.Context) error {
		_, err := c.n.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: sandbox})
		return err
	})
	try(func(ctx context.Context) error {
		_, err := c.n.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: sandbox})
		return err
	})
}

// container asks for things of a container side by side.
func (c client) container(ctx context.Context, id string, patience time.Duration) {
	update := func(ctx context.Context) error {
		_, err := c.n.Runtime.UpdateContainerResources(ctx, &cri.UpdateContainerResourcesRequest{ContainerId: id, Linux: &cri.LinuxContainerResources{CpuShares: 100}})
		return err
	}
	h := testnode.Hurry{Exec: []string{"/demo", "-lines", "-n", "0"}, Spread: 60 * time.Millisecond, Patience: patience,
		More: []func(context.Context) error{update}}
	h.Container(ctx, c.n.Runtime, id)
}

// removeAll removes every pod, for which a client now has patience.
func removeAll(t *testing.T, n *testnode.Node) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	r, err := n.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	each(t, len(r.Items), 8, func(i int) error {
		id := r.Items[i].Id
		_, stopped := n.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id})
		_, removed := n.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id})
		return errors.Join(stopped, removed)
	})
}

// everything counts what count does, what the shim keeps, and processes that
// run a program of the state folder or lie in a cgroup of the node.
func everything(t *testing.T, n *testnode.Node) map[string]int {
	c := count(t, n)
	for _, kind := range []string{"tasks", "sandboxes", "pumps"} {
		c["shim's "+kind] = entries(filepath.Join(n.State(), "shim", "container", kind))
	}
	c["keeper fds"] = entries(fmt.Sprintf("/proc/%d/fd", keeperPID(n)))
	exes, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, exe := range exes {
		if path, err := os.Readlink(exe); err == nil && strings.HasPrefix(path, n.State()) {
			c["holders"]++
		}
	}
	roots, _ := filepath.Glob("/proc/[0-9]*/mountinfo")
	for _, path := range roots {
		if b, err := os.ReadFile(path); err == nil && strings.Contains(strings.SplitN(string(b), "\n", 2)[0], n.Dir+"/") {
			c["contained"]++
		}
	}
	return c
}
