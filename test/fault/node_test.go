// Package fault ends the daemon, the shim and both without warning, while
// pods write, and looks whether anything was lost; and it makes pods in bursts
// and looks whether anything is left.
package fault

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

const image = "cloister.dev/demo:1"

func number(t *testing.T, name string, otherwise int) int {
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatalf("%s=%q is not a number", name, s)
	}
	return n
}

// node starts a private daemon with the demo image pulled.
func node(t *testing.T, network string) *testnode.Node {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it runs real containers")
	}
	checkout, err := testnode.Checkout()
	if err != nil {
		t.Fatal(err)
	}
	bin, err := testnode.Build(t.Context(), checkout, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	reg, err := testnode.StartRegistry(t.Context(), checkout, "-only", "demo")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := reg.Close(); err != nil {
			t.Error(err)
		}
	})
	opts := testnode.Options{Bin: bin, Hosts: reg.Hosts, Network: network}
	if os.Getenv("HANDLER") == "vm" {
		if opts.Guests, err = testnode.BuildGuest(t.Context(), bin, t.TempDir()); err != nil {
			t.Fatal(err)
		}
		opts.Default = "vm"
	}
	n, err := testnode.Start(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of the daemon's log:\n%s", n.LogTail(60))
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	if _, err := n.Image.PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: image}}); err != nil {
		t.Fatal(err)
	}
	return n
}

// pod is a sandbox with one container.
type pod struct {
	sandbox, container string
	log                string
}

func sandboxConfig(n *testnode.Node, name string) *cri.PodSandboxConfig {
	return &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Uid: name, Namespace: "fault"},
		LogDirectory: filepath.Join(n.Dir, "logs", name),
		Linux:        &cri.LinuxPodSandboxConfig{},
	}
}

func runPod(ctx context.Context, n *testnode.Node, name string, args ...string) (pod, error) {
	cfg := sandboxConfig(n, name)
	sb, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: cfg})
	if err != nil {
		return pod{}, fmt.Errorf("run pod %s: %w", name, err)
	}
	c, err := n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: sb.PodSandboxId, SandboxConfig: cfg, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "demo"}, Image: &cri.ImageSpec{Image: image}, Args: args, LogPath: "0.log", Linux: &cri.LinuxContainerConfig{}}})
	if err != nil {
		return pod{}, fmt.Errorf("create container of %s: %w", name, err)
	}
	if _, err := n.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: c.ContainerId}); err != nil {
		return pod{}, fmt.Errorf("start container of %s: %w", name, err)
	}
	return pod{sb.PodSandboxId, c.ContainerId, filepath.Join(cfg.LogDirectory, "0.log")}, nil
}

// each runs f for 0…count-1, at most width at a time, and reports every error.
func each(t *testing.T, count, width int, f func(i int) error) {
	t.Helper()
	var wg sync.WaitGroup
	slot := make(chan struct{}, width)
	for i := range count {
		slot <- struct{}{}
		wg.Go(func() {
			defer func() { <-slot }()
			if err := f(i); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func status(ctx context.Context, n *testnode.Node, id string) (*cri.ContainerStatus, error) {
	r, err := n.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: id})
	return r.GetStatus(), err
}

// ended waits until the container has exited.
func ended(ctx context.Context, n *testnode.Node, id string) (*cri.ContainerStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		st, err := status(ctx, n, id)
		if err != nil {
			return nil, err
		}
		if st.State == cri.ContainerState_CONTAINER_EXITED {
			return st, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("container %s does not end: %w", id, ctx.Err())
		}
	}
}

// checkLog looks whether the log holds line 1, line 2, … once each and in
// order, and gives how many there are.
func checkLog(path string) (int, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	want := 1
	for line := range strings.Lines(string(data)) {
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		if len(fields) != 4 || fields[1] != "stdout" || fields[2] != "F" {
			return want - 1, fmt.Errorf("%s: after line %d comes %q, which is no complete log line", path, want-1, line)
		}
		if text := fmt.Sprintf("line %d", want); fields[3] != text {
			return want - 1, fmt.Errorf("%s: %q where %q belongs", path, fields[3], text)
		}
		want++
	}
	return want - 1, nil
}
