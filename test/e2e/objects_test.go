package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

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
