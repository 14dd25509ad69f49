package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
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

func (b *bed) nodeStatus(t *testing.T) {
	info := b.must(t, "get", "node", nodeName, "-o", "jsonpath={.status.nodeInfo.containerRuntimeVersion}")
	if b.node != nil && !strings.HasPrefix(info, "cloister://") && os.Getenv("RUNTIME") == "" {
		t.Errorf("the node says its runtime is %q", info)
	}
	if handlers := b.must(t, "get", "node", nodeName, "-o", "jsonpath={.status.runtimeHandlers}"); !strings.Contains(handlers, "features") {
		t.Errorf("the node lists no runtime handlers with features: %s", handlers)
	}
	ready := b.must(t, "get", "deployment", "web", "-o", "jsonpath={.status.readyReplicas}")
	if ready != "10" {
		t.Errorf("%s of 10 replicas are ready", ready)
	}
}

func (b *bed) logs(t *testing.T) {
	out := b.must(t, "logs", "demo")
	for _, part := range []string{"Hello from demo", "line 1\nline 2\nline 3"} {
		if err := want(out, part); err != nil {
			t.Error(err)
		}
	}
	if out := b.must(t, "logs", "demo", "--tail=1"); out != "line 3\n" {
		t.Errorf("logs --tail=1: %q", out)
	}
	if out := b.must(t, "logs", "demo", "--timestamps"); !regexp.MustCompile(`(?m)^20\d\d-.*Z? line 1$`).MatchString(out) {
		t.Errorf("logs --timestamps: %q", out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	follow := b.kubectlCommand(ctx, "logs", "-f", "--tail=1", "lines")
	stdout, err := follow.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := follow.Start(); err != nil {
		t.Fatal(err)
	}
	if err := readUntil(stdout, func(s string) bool { return strings.Count(s, "\n") > 50 }); err != nil {
		t.Errorf("logs -f: %v", err)
	}
	cancel()
	_ = follow.Wait() // ended by us
}

// readUntil reads until enough says so.
func readUntil(r io.Reader, enough func(string) bool) error {
	var got bytes.Buffer
	buf := make([]byte, 4096)
	for !enough(got.String()) {
		n, err := r.Read(buf)
		got.Write(buf[:n])
		if err != nil {
			return fmt.Errorf("%w after %q", err, got.String())
		}
	}
	return nil
}

func (b *bed) exec(t *testing.T) {
	if out := b.must(t, "exec", "shell", "--", "sh", "-c", "pwd; hostname"); out != "/tmp\nshell\n" {
		t.Errorf("exec: %q", out)
	}
	out, err := b.kubectlIn(t.Context(), "to stdin\n", "exec", "-i", "shell", "--", "cat")
	if err != nil || out != "to stdin\n" {
		t.Errorf("exec -i: %q, %v", out, err)
	}
	_, err = b.kubectl(t.Context(), "exec", "shell", "--", "sh", "-c", "exit 42")
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 42 {
		t.Errorf("an exec that exits with 42: %v", err)
	}
	big := strings.Repeat("0123456789abcdef", 1<<16) // 1 MiB both ways
	out, err = b.kubectlIn(t.Context(), big, "exec", "-i", "shell", "--", "cat")
	if err != nil || out != big {
		t.Errorf("1 MiB through exec -i cat: %d bytes came back, %v", len(out), err)
	}
}

func (b *bed) attach(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := b.kubectlCommand(ctx, "attach", "-i", "echo")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(stdin, "hello\n"); err != nil {
		t.Fatal(err)
	}
	if err := readUntil(stdout, func(s string) bool { return strings.Contains(s, "got hello") }); err != nil {
		t.Error(err)
	}
	cancel()
	_ = cmd.Wait() // ended by us
	eventually(t, 10*time.Second, func() error { return want(b.must(t, "logs", "echo"), "got hello") })
}

func (b *bed) portForward(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cmd := b.kubectlCommand(ctx, "port-forward", "pod/demo", ":8080")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cancel()
		_ = cmd.Wait() // ended by us
	}()
	var port string
	err = readUntil(stdout, func(s string) bool {
		m := regexp.MustCompile(`127\.0\.0\.1:(\d+) ->`).FindStringSubmatch(s)
		if m != nil {
			port = m[1]
		}
		return m != nil
	})
	if err != nil {
		t.Fatal(err)
	}
	client := http.Client{Timeout: 10 * time.Second}
	for range 5 {
		resp, err := client.Get("http://127.0.0.1:" + port + "/")
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || !strings.Contains(string(body), "this is demo") {
			t.Errorf("through the forwarded port: %q, %v", body, err)
		}
		client.CloseIdleConnections()
	}
}

func (b *bed) cp(t *testing.T) {
	dir := t.TempDir()
	data := bytes.Repeat([]byte("cloister\n"), 100_000)
	if err := os.WriteFile(filepath.Join(dir, "out"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	b.must(t, "cp", filepath.Join(dir, "out"), "shell:/tmp/copied")
	b.must(t, "cp", "shell:/tmp/copied", filepath.Join(dir, "back"))
	back, err := os.ReadFile(filepath.Join(dir, "back"))
	if err != nil || !bytes.Equal(back, data) {
		t.Errorf("%d bytes went in, %d came back, %v", len(data), len(back), err)
	}
}

// top checks the figures that kubelet has of every container, and the command
// that shows them.
func (b *bed) top(t *testing.T) {
	eventually(t, 90*time.Second, func() error {
		s, err := b.summary(t.Context())
		if err != nil {
			return err
		}
		seen := 0
		for _, p := range s.Pods {
			for _, c := range p.Containers {
				if !c.complete() {
					return fmt.Errorf("%s/%s has no CPU or memory figure", p.PodRef.Name, c.Name)
				}
				seen++
			}
		}
		if seen < 16 || !s.Node.complete() {
			return fmt.Errorf("figures of %d containers only, node complete: %v", seen, s.Node.complete())
		}
		return nil
	})
	var err error
	if b.metrics, err = startMetricsAPI(b.cluster); err != nil {
		t.Fatal(err)
	}
	if _, err := b.kubectlIn(t.Context(), b.metrics.manifest(), "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	b.must(t, "wait", "apiservice/v1beta1.metrics.k8s.io", "--for=condition=Available", "--timeout=60s")
	eventually(t, 60*time.Second, func() error {
		out, err := b.kubectl(t.Context(), "top", "pods", "--no-headers")
		if err != nil {
			return err
		}
		if n := strings.Count(out, "Mi"); n < 16 {
			return fmt.Errorf("kubectl top pods shows %d pods:\n%s", n, out)
		}
		return nil
	})
	if err := want(b.must(t, "top", "node"), nodeName); err != nil {
		t.Error(err)
	}
}

func (b *bed) volumes(t *testing.T) {
	for _, c := range []struct{ command, out string }{
		{"cat /settings/colour", "green"},
		{"cat /password/word", "sesame"},
		{"cat /about/name", "volumes"},
		{"cat /disk/order", "one\ntwo\nthree\n"},
		{"id -u; id -g; id -G", "1000\n1000\n1000 2000\n"},
		{"echo x > /memory/file && stat -c %g /memory/file && grep -c ' /memory tmpfs ' /proc/mounts", "2000\n1\n"},
		{"echo y > /part/file && cat /disk/part/file", "y\n"},
		{"touch /password/no 2>&1 || true", "touch: /password/no: Read-only file system\n"},
		{"cat /var/run/secrets/kubernetes.io/serviceaccount/namespace", "default"},
	} {
		if out := b.must(t, "exec", "volumes", "-c", "main", "--", "sh", "-c", c.command); out != c.out {
			t.Errorf("%s: %q, want %q", c.command, out, c.out)
		}
	}
}

func (b *bed) probes(t *testing.T) {
	b.apply(t, "probes.yaml")
	eventually(t, 60*time.Second, func() error {
		return want(b.must(t, "get", "pod", "unlively", "-o", "jsonpath={.status.containerStatuses[0].restartCount}"), "1")
	})
	b.must(t, "wait", "pod/unready", "--for=jsonpath={.status.phase}=Running", "--timeout=60s")
	if out := b.must(t, "get", "pod", "unready", "-o", "jsonpath={.status.containerStatuses[0].ready}"); out != "false" {
		t.Errorf("a pod whose readiness probe fails is ready: %s", out)
	}
	b.must(t, "exec", "unready", "--", "touch", "/tmp/ready")
	b.must(t, "wait", "pod/unready", "--for=condition=Ready", "--timeout=30s")
	b.must(t, "wait", "pod/failing", "--for=jsonpath={.status.phase}=Failed", "--timeout=60s")
	out := b.must(t, "get", "pod", "failing", "-o",
		"jsonpath={.status.containerStatuses[0].state.terminated.exitCode} {.status.containerStatuses[0].state.terminated.message}")
	if strings.TrimSpace(out) != "7 bad news" {
		t.Errorf("exit status and termination message: %q", out)
	}
	b.must(t, "delete", "-f", "testdata/probes.yaml", "--timeout=60s")
}

func (b *bed) configMapUpdate(t *testing.T) {
	b.must(t, "patch", "configmap", "settings", "-p", `{"data":{"colour":"blue"}}`)
	eventually(t, 120*time.Second, func() error {
		return want(b.must(t, "exec", "volumes", "-c", "main", "--", "cat", "/settings/colour"), "blue")
	})
}

// resize changes CPU and memory of a running container and looks for them in
// its own cgroup, v1 or v2.
func (b *bed) resize(t *testing.T) {
	b.must(t, "patch", "pod", "resized", "--subresource=resize", "-p",
		`{"spec":{"containers":[{"name":"main","resources":{"requests":{"cpu":"40m","memory":"24Mi"},"limits":{"cpu":"200m","memory":"48Mi"}}}]}}`)
	const read = "cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || " +
		"{ cut -d' ' -f1 /sys/fs/cgroup/cpu.max; cat /sys/fs/cgroup/memory.max; }"
	eventually(t, 90*time.Second, func() error {
		out := b.must(t, "exec", "resized", "--", "sh", "-c", read)
		if wanted := fmt.Sprintf("20000\n%d\n", 48<<20); out != wanted {
			return fmt.Errorf("cgroup says %q, want %q", out, wanted)
		}
		return nil
	})
	eventually(t, 60*time.Second, func() error {
		return want(b.must(t, "get", "pod", "resized", "-o",
			"jsonpath={.status.containerStatuses[0].resources.limits.memory} {.status.containerStatuses[0].restartCount}"), "48Mi 0")
	})
}

// rotation waits until kubelet had the log reopened and sees that what is
// written goes on without a gap.
func (b *bed) rotation(t *testing.T) {
	eventually(t, 120*time.Second, func() error {
		rotated, err := filepath.Glob(filepath.Join(b.dir, "pod-logs", "default_lines_*", "lines", "0.log.*"))
		if err == nil && len(rotated) == 0 {
			err = errors.New("the log was not rotated")
		}
		return err
	})
	b.continuous(t)
}

// continuous checks that the lines pod's log, over its rotated files, has no gap.
func (b *bed) continuous(t *testing.T) {
	t.Helper()
	eventually(t, 20*time.Second, func() error {
		out := b.must(t, "logs", "lines", "--tail=500")
		last := 0
		for line := range strings.Lines(out) {
			n, err := strconv.Atoi(strings.TrimPrefix(strings.TrimSpace(line), "line "))
			if err != nil {
				return fmt.Errorf("log line %q", line)
			}
			if last != 0 && n != last+1 {
				return fmt.Errorf("line %d follows line %d", n, last)
			}
			last = n
		}
		if last == 0 {
			return errors.New("no lines")
		}
		return nil
	})
}

// podState is what must not change when kubelet or the runtime restarts.
type podState struct {
	Containers map[string]string // ID and start time by pod/container
	Restarts   int
}

func (b *bed) state(t *testing.T, selector string) podState {
	t.Helper()
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Status   struct {
				ContainerStatuses []struct {
					Name, ContainerID string
					RestartCount      int
					State             struct{ Running *struct{ StartedAt string } }
				}
			}
		}
	}
	out := b.must(t, "get", "pods", "-l", selector, "-o", "json")
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatal(err)
	}
	s := podState{Containers: make(map[string]string)}
	for _, p := range list.Items {
		for _, c := range p.Status.ContainerStatuses {
			s.Restarts += c.RestartCount
			started := "not running"
			if c.State.Running != nil {
				started = c.State.Running.StartedAt
			}
			s.Containers[p.Metadata.Name+"/"+c.Name] = c.ContainerID + " " + started
		}
	}
	return s
}

func (b *bed) restarts(t *testing.T) {
	ctx := t.Context()
	const all = "keep in (yes)"
	before, web := b.state(t, all), b.state(t, "app=web")
	check := func(what string) {
		t.Helper()
		if err := b.nodeReady(ctx); err != nil {
			t.Fatal(err)
		}
		b.must(t, "wait", "pod", "-l", "keep=yes", "--for=condition=Ready", "--timeout=60s")
		b.must(t, "rollout", "status", "deployment/web", "--timeout=60s")
		for _, c := range []struct {
			selector string
			before   podState
		}{{all, before}, {"app=web", web}} {
			after := b.state(t, c.selector)
			if after.Restarts != c.before.Restarts {
				t.Errorf("%s: %d restarts of containers became %d", what, c.before.Restarts, after.Restarts)
			}
			for name, id := range c.before.Containers {
				if after.Containers[name] != id {
					t.Errorf("%s: container %s was %s and is %s", what, name, id, after.Containers[name])
				}
			}
		}
		if out := b.must(t, "exec", "shell", "--", "echo", "alive"); out != "alive\n" {
			t.Errorf("%s: exec says %q", what, out)
		}
		b.continuous(t)
	}
	restartKubelet := func(sig syscall.Signal) {
		t.Helper()
		if err := b.kubelet.stop(sig); err != nil {
			t.Fatal(err)
		}
		if err := b.kubelet.start(); err != nil {
			t.Fatal(err)
		}
		if err := b.kubeletHealthy(ctx); err != nil {
			t.Fatal(err)
		}
	}
	restartKubelet(syscall.SIGTERM)
	check("kubelet restarted")
	if b.node == nil {
		t.Log("the runtime is not ours, it is not restarted")
		return
	}
	for _, step := range []struct {
		name string
		stop func(context.Context) error
	}{{"daemon killed with SIGKILL", b.node.Kill}, {"daemon ended with SIGTERM", b.node.Stop}} {
		if err := step.stop(ctx); err != nil {
			t.Fatal(err)
		}
		if err := b.node.Run(ctx); err != nil {
			t.Fatal(err)
		}
		check(step.name)
	}
	if err := b.node.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	if err := b.kubelet.stop(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := b.node.Run(ctx); err != nil {
		t.Fatal(err)
	}
	restartKubelet(syscall.SIGKILL)
	check("daemon and kubelet killed")
}

func (b *bed) rollingUpdate(t *testing.T) {
	before := b.state(t, "app=web")
	b.must(t, "set", "env", "deployment/web", "GENERATION=2")
	b.must(t, "rollout", "status", "deployment/web", "--timeout=180s")
	eventually(t, 60*time.Second, func() error {
		after := b.state(t, "app=web")
		if len(after.Containers) != 10 {
			return fmt.Errorf("%d containers of 10", len(after.Containers))
		}
		for name := range after.Containers {
			if _, old := before.Containers[name]; old {
				return fmt.Errorf("pod %s is still there", name)
			}
		}
		return nil
	})
}

// drain moves everything away; with one node the pods wait until it is back.
func (b *bed) drain(t *testing.T) {
	b.must(t, "drain", nodeName, "--force", "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=120s")
	out := b.must(t, "get", "pods", "--field-selector", "status.phase=Running", "-o", "name")
	if out != "" {
		t.Errorf("after drain these still run:\n%s", out)
	}
	b.must(t, "uncordon", nodeName)
	b.must(t, "rollout", "status", "deployment/web", "--timeout=180s")
}
