package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

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
