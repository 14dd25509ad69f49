package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cloister.dev/test/testnode"
)

// bed is what the sub-tests share: one cluster, used in order.
type bed struct {
	*cluster
	node *testnode.Node // nil when the runtime is somebody else's
}

func TestCluster(t *testing.T) {
	if os.Getenv("E2E") == "" {
		t.Skip("starts a whole cluster as root: test/e2e/run does that")
	}
	b := startBed(t)
	b.must(t, "wait", "serviceaccount/default", "--for=create", "--timeout=60s")
	b.apply(t, "web.yaml", "steady.yaml")
	b.must(t, "wait", "pod", "-l", "keep=yes", "--for=condition=Ready", "--timeout=120s")
	b.must(t, "rollout", "status", "deployment/web", "--timeout=180s")
	for _, s := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"node", b.nodeStatus},
		{"logs", b.logs},
		{"exec", b.exec},
		{"attach", b.attach},
		{"port-forward", b.portForward},
		{"cp", b.cp},
		{"top", b.top},
		{"volumes", b.volumes},
		{"probes", b.probes},
		{"configmap update", b.configMapUpdate},
		{"in-place resize", b.resize},
		{"log rotation", b.rotation},
		{"restarts of kubelet and daemon", b.restarts},
		{"rolling update", b.rollingUpdate},
		{"drain", b.drain},
	} {
		if !t.Run(s.name, s.run) {
			t.Logf("kubelet: %s", b.kubelet.tail(5))
		}
		if !b.kubelet.running() {
			t.Fatal("kubelet has ended, there is nothing to test on")
		}
	}
}

func startBed(t *testing.T) *bed {
	ctx := t.Context()
	checkout, err := testnode.Checkout()
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range [][3]string{
		{"runc", "runc", "an OCI runtime"},
		{"iptables", "iptables", "host ports of the CNI portmap plugin"},
		{"mount", "mount", "kubelet mounts volumes with it"},
	} {
		if err := testnode.Need(ctx, n[0], n[1], n[2]); err != nil {
			t.Fatal(err)
		}
	}
	bin, err := kubePrograms(ctx, checkout)
	if err != nil {
		t.Fatal(err)
	}
	b := &bed{}
	endpoint := os.Getenv("RUNTIME_ENDPOINT")
	var opts []string
	if hosts := os.Getenv("REGISTRY_HOSTS"); hosts != "" && endpoint != "" {
		opts = []string{"-hosts", hosts}
	}
	registry, err := testnode.StartRegistry(ctx, checkout, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closing(t, registry.Close) })
	t.Cleanup(func() {
		if b.cluster != nil { // last, when the runtime's pods are gone
			closing(t, func() error { return removeCgroup(b.cgroup) })
		}
	})
	if endpoint == "" {
		b.node = startNode(t, checkout, registry.Hosts)
		endpoint = b.node.Endpoint()
	}
	b.cluster, err = startCluster(ctx, bin, endpoint)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closing(t, b.close) })
	t.Cleanup(func() {
		// The test's context is over; pods are deleted while kubelet still runs.
		_, err := b.kubectl(context.Background(), "delete", "pods,deployments", "--all", "--timeout=60s", "--grace-period=1")
		if err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return b
}

func startNode(t *testing.T, checkout, hosts string) *testnode.Node {
	ctx := t.Context()
	o := testnode.Options{
		Runtime: os.Getenv("RUNTIME"), Network: os.Getenv("NETWORK"), CNIBin: os.Getenv("CNI_BIN"),
		Default: os.Getenv("RUNTIME_HANDLER"), Hosts: hosts, LogLevel: os.Getenv("LOG_LEVEL"),
	}
	var err error
	if o.Bin, err = testnode.Build(ctx, checkout, filepath.Join(t.TempDir(), "bin")); err != nil {
		t.Fatal(err)
	}
	if o.Default != "" {
		program, err := exec.LookPath(o.Default)
		if err != nil {
			t.Fatal(err)
		}
		o.Handlers = map[string]string{o.Default: program}
	}
	node, err := testnode.Start(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the daemon's last words:\n%s", node.LogTail(30))
		}
		closing(t, node.Close)
	})
	return node
}

func closing(t *testing.T, f func() error) {
	if err := f(); err != nil {
		t.Errorf("clean up: %v", err)
	}
}

func (b *bed) apply(t *testing.T, files ...string) {
	t.Helper()
	for _, f := range files {
		b.must(t, "apply", "-f", filepath.Join("testdata", f))
	}
}

// must runs kubectl and ends the test when it fails.
func (b *bed) must(t *testing.T, args ...string) string {
	t.Helper()
	out, err := b.kubectl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// eventually repeats check until it returns nil; time out is a failure with
// the last reason.
func eventually(t *testing.T, limit time.Duration, check func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %v", limit, err)
		}
		time.Sleep(300 * time.Millisecond) // a cluster is asked, it does not call
	}
}

func want(out, part string) error {
	if !strings.Contains(out, part) {
		return fmt.Errorf("%q does not hold %q", out, part)
	}
	return nil
}
