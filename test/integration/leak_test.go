package integration

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cloister.dev/test/testnode"
)

// leftovers are the things that a node makes for pods, by kind.
func leftovers(t *testing.T, n *testnode.Node) map[string]int {
	t.Helper()
	return map[string]int{
		"pod folders":  entries(filepath.Join(n.State(), "pods")),
		"bundles":      entries(filepath.Join(n.State(), "containers")),
		"volumes":      entries(filepath.Join(n.Root(), "volumes")),
		"mounts":       mounts(t, n.Dir+"/"),
		"cgroups":      cgroups(n),
		"addresses":    addresses(filepath.Join(n.Dir, "ipam")) + addresses(filepath.Join(n.Root(), "network")),
		"bridge ports": entries(filepath.Join("/sys/class/net", bridge(n), "brif")),
		"processes":    len(n.Processes()),
	}
}

func bridge(n *testnode.Node) string {
	b := filepath.Base(n.Dir)
	return b[:min(15, len(b))]
}

// noLeak looks when the test ends whether the node holds more than now.
// Kernel and shim end some things in the background, so it waits a while.
func noLeak(t *testing.T, n *testnode.Node) (check func()) {
	t.Helper()
	before := leftovers(t, n)
	return func() {
		t.Helper()
		deadline := time.Now().Add(20 * time.Second)
		for {
			after := leftovers(t, n)
			more := maps.Clone(after)
			maps.DeleteFunc(more, func(k string, c int) bool { return c <= before[k] })
			if len(more) == 0 {
				return
			}
			if time.Now().After(deadline) {
				t.Errorf("left behind: %v, before %v, addresses are held for %q", more, before, holders(n))
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
}

func entries(dir string) int {
	es, err := os.ReadDir(dir)
	if err != nil {
		return 0
	}
	return len(es)
}

func mounts(t *testing.T, with string) int {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	count := 0
	for s := bufio.NewScanner(f); s.Scan(); {
		if strings.Contains(s.Text(), with) {
			count++
		}
	}
	return count
}

// cgroups counts those below the parent of the node's pods. The parent itself
// is kubelet's to remove.
func cgroups(n *testnode.Node) int {
	count := 0
	for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
		parents, _ := filepath.Glob(pattern + filepath.Base(n.Dir))
		for _, p := range parents {
			filepath.WalkDir(p, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() && path != p {
					count++
				}
				return nil // groups vanish while we walk
			})
		}
	}
	return count
}

// closeNode ends the node, and removes the parent of its pods' cgroups as
// kubelet would.
func closeNode(n *testnode.Node) error {
	err := n.Close()
	for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
		parents, _ := filepath.Glob(pattern + filepath.Base(n.Dir))
		for _, p := range parents {
			err = errors.Join(err, os.Remove(p))
		}
	}
	return err
}

// addresses counts the files that are named by one.
func addresses(dir string) int {
	count := 0
	filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && net.ParseIP(d.Name()) != nil {
			count++
		}
		return nil // they vanish while we walk
	})
	return count
}

// holders are the addresses that are held on disk, each with for whom.
func holders(n *testnode.Node) map[string]string {
	held := map[string]string{}
	paths, _ := filepath.Glob(filepath.Join(n.Dir, "ipam", "*", "*.*.*.*"))
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			data = []byte(err.Error())
		}
		held[filepath.Base(path)] = string(data)
	}
	return held
}

// fsck is the output of the daemon's own check, "" when it found nothing.
func fsck(t *testing.T, n *testnode.Node, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	args = append([]string{"--address", n.Socket, "debug", "fsck", "-o", "json"}, args...)
	out, err := exec.CommandContext(ctx, filepath.Join(here.bin, "cloister"), args...).CombinedOutput()
	text := strings.TrimSpace(string(out))
	if err == nil && !bytes.Contains(out, []byte(`"id"`)) {
		return ""
	}
	if text == "" {
		text = fmt.Sprint(err)
	}
	return text
}

// witness is a container that must not notice what a test does to others.
func witness(t *testing.T, n *testnode.Node) {
	t.Helper()
	c := runPod(t, n).demo("-lines", "-n", "0", "-rate", "50")
	started := c.status().StartedAt
	t.Cleanup(func() {
		st, err := statusOf(n, c.id)
		if err != nil {
			t.Errorf("the pod beside: %v", err)
			return
		}
		if st != fmt.Sprintf("CONTAINER_RUNNING %d", started) {
			t.Errorf("the pod beside is %s, it was running since %d", st, started)
		}
		data, err := os.ReadFile(c.logPath())
		if err != nil {
			t.Error(err)
		}
		if err := numbered(string(data), 1); err != nil {
			t.Errorf("the pod beside: %v", err)
		}
	})
}

// numbered tells whether a log holds line 1, line 2, … once each, in order.
func numbered(log string, first int) error {
	want := first
	for line := range strings.Lines(log) {
		if !strings.HasSuffix(line, "\n") {
			return nil // just being written
		}
		if !strings.HasSuffix(line, fmt.Sprintf(" stdout F line %d\n", want)) {
			return fmt.Errorf("after line %d comes %q", want-1, line)
		}
		want++
	}
	if want == first {
		return fmt.Errorf("no line was written")
	}
	return nil
}

// processesIn counts the processes of a cgroup.
func processesIn(dir string) int {
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return 0
	}
	return len(strings.Fields(string(data)))
}
