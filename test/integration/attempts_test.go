package integration

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// gated is a node whose CNI network has the plugin of the stage at its end.
func gated(t *testing.T, s stage) *testnode.Node {
	t.Helper()
	n := own(t, testnode.Options{CNIBin: s.dir})
	conf := filepath.Join(n.Dir, "net.d", "10-test.conflist")
	data, err := os.ReadFile(conf)
	if err != nil {
		t.Fatal(err)
	}
	i := bytes.LastIndexByte(data, ']')
	if err := replace(conf, string(data[:i])+", {\"type\": \"gate\"}"+string(data[i:])); err != nil {
		t.Fatal(err)
	}
	// Status tells only that there is a configuration, the log which one.
	eventually(t, 10*time.Second, "the new network configuration is in use", func() bool {
		return strings.Count(n.LogTail(100), "cni config loaded") > 1
	})
	return n
}

func runSandbox(ctx context.Context, n *testnode.Node, cfg *cri.PodSandboxConfig, limit time.Duration) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	r, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: cfg})
	return r.GetPodSandboxId(), err
}

// A client that gave up on RunPodSandbox and asks again gets what its first
// request made, also from the next daemon.
func TestRepeatedRunPodSandboxJoinsTheFirst(t *testing.T) {
	s := newStage(t)
	n := gated(t, s)
	check := noLeak(t, n)
	cfg := podConfig(n, t)
	other := proto.Clone(cfg).(*cri.PodSandboxConfig)
	other.Labels = map[string]string{"other": "yes"}

	s.mode("hold")
	_, err := runSandbox(t.Context(), n, cfg, 500*time.Millisecond)
	wantError(t, err, codes.DeadlineExceeded)
	_, err = runSandbox(t.Context(), n, other, 5*time.Second)
	wantError(t, err, codes.AlreadyExists, cfg.Metadata.Name, "another configuration")
	type result struct {
		id  string
		err error
	}
	repeats := make(chan result, 3)
	for range cap(repeats) {
		go func() {
			id, err := runSandbox(t.Context(), n, cfg, 30*time.Second)
			repeats <- result{id, err}
		}()
	}
	s.mode("pass")
	first := <-repeats
	for range cap(repeats) - 1 {
		if r := <-repeats; r != first {
			t.Errorf("repeats got %v and %v", first, r)
		}
	}
	if first.err != nil {
		t.Fatal(first.err)
	}
	if adds := s.called("ADD"); adds != 1 {
		t.Errorf("the network was asked %d times: %v", adds, s.calls())
	}
	for _, end := range []func(context.Context) error{n.Stop, n.Kill} {
		endWith(t, n, end)
		if id, err := runSandbox(t.Context(), n, cfg, 10*time.Second); err != nil || id != first.id {
			t.Errorf("after a restart the repeat got %s, %v, not %s", id, err, first.id)
		}
		_, err := runSandbox(t.Context(), n, other, 5*time.Second)
		wantError(t, err, codes.AlreadyExists, cfg.Metadata.Name)
	}
	list, err := n.Runtime.ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{})
	if err != nil || len(list.Items) != 1 {
		t.Errorf("%d pods, not 1: %v", len(list.GetItems()), err)
	}
	(&pod{t, n, first.id, cfg}).remove()
	check()
}

// A daemon that ends while it makes a pod leaves nothing of it, and the repeat
// makes a new one.
func TestRestartDuringRunPodSandbox(t *testing.T) {
	s := newStage(t)
	n := gated(t, s)
	for name, end := range map[string]func(context.Context) error{"SIGTERM": n.Stop, "SIGKILL": n.Kill} {
		t.Run(name, func(t *testing.T) {
			check := noLeak(t, n)
			cfg := podConfig(n, t)
			s.mode("hold")
			adds := s.called("ADD")
			lost := make(chan error, 1)
			go func() {
				_, err := runSandbox(t.Context(), n, cfg, 30*time.Second)
				lost <- err
			}()
			eventually(t, 10*time.Second, "the plugin is called", func() bool { return s.called("ADD") > adds })
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			if err := end(ctx); err != nil {
				t.Error(err)
				n.Kill(t.Context())
			}
			if err := <-lost; err == nil {
				t.Error("the daemon ended and the request succeeded")
			}
			s.mode("pass")
			if err := n.Run(t.Context()); err != nil {
				t.Fatal(err)
			}
			id, err := runSandbox(t.Context(), n, cfg, 30*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			(&pod{t, n, id, cfg}).remove()
			check()
		})
	}
}

// CreateContainer keeps the same promise.
func TestRepeatedCreateContainerJoinsTheFirst(t *testing.T) {
	n := own(t, testnode.Options{})
	// A volume whose content is copied takes time.
	ref := push(t, hostileImage(t, func(c *imageConfig) { c.Volumes = map[string]struct{}{"/data": {}} },
		file{path: "/data/large", data: make([]byte, 96<<20)}))
	if _, err := pull(t.Context(), n, ref); err != nil {
		t.Fatal(err)
	}
	p := runPod(t, n)
	check := noLeak(t, n)
	cfg := containerConfig(ref, []string{"sleep", "1000"})
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Millisecond)
	defer cancel()
	_, err := p.tryCreate(ctx, cfg)
	wantError(t, err, codes.DeadlineExceeded)
	other := proto.Clone(cfg).(*cri.ContainerConfig)
	other.Envs = []*cri.KeyValue{{Key: "A", Value: []byte("b")}}
	_, err = p.tryCreate(t.Context(), other)
	wantError(t, err, codes.AlreadyExists, cfg.Metadata.Name)
	c, err := p.tryCreate(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	restart(t, n)
	again, err := p.tryCreate(t.Context(), cfg)
	if err != nil || again.id != c.id {
		t.Errorf("after a restart the repeat got %v, %v", again, err)
	}
	_, err = p.tryCreate(t.Context(), other)
	wantError(t, err, codes.AlreadyExists, cfg.Metadata.Name)
	list, err := n.Runtime.ListContainers(t.Context(), &cri.ListContainersRequest{})
	if err != nil || len(list.Containers) != 1 {
		t.Errorf("%d containers, not 1: %v", len(list.GetContainers()), err)
	}
	c.remove()
	check()
}
