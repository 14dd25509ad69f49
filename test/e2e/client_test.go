package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

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
