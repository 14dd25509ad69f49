package fault

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// TestBurstsLeaveNothing makes, stops and removes pods in bursts of 50 and
// counts what a machine runs out of, before and after.
func TestBurstsLeaveNothing(t *testing.T) {
	for _, network := range []string{"cni", "builtin"} {
		t.Run(network, func(t *testing.T) {
			n := node(t, network)
			burst(t, n, "warm", 50)
			before := settle(t, n, nil)
			for i := range number(t, "BURSTS", 10) {
				burst(t, n, strconv.Itoa(i), 50)
			}
			after := settle(t, n, before)
			for what, was := range before {
				if after[what] > was+allowed[what] {
					t.Errorf("%s: %d before, %d after", what, was, after[what])
				}
			}
			t.Logf("before %v, after %v", before, after)
		})
	}
}

// allowed is what may differ without being a leak: caches and idle
// connections come and go.
//
// The number of threads is not counted: Go keeps those that were blocked in
// the kernel at once, and how many that were is chance. One that never comes
// back has its goroutine, which is counted; one that comes back from another
// namespace without having left it is astray.
var allowed = map[string]int{"goroutines": 10, "daemon fds": 5, "shim fds": 5}

func burst(t *testing.T, n *testnode.Node, name string, count int) {
	each(t, count, count, func(i int) error {
		r, err := n.Runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: sandboxConfig(n, fmt.Sprintf("burst-%s-%d", name, i))})
		if err != nil {
			return err
		}
		if _, err := n.Runtime.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: r.PodSandboxId}); err != nil {
			return err
		}
		_, err = n.Runtime.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: r.PodSandboxId})
		return err
	})
}

// settle counts until two counts in a row agree, or until nothing exceeds
// goal: the kernel ends namespaces in the background.
func settle(t *testing.T, n *testnode.Node, goal map[string]int) map[string]int {
	deadline := time.Now().Add(20 * time.Second)
	last := count(t, n)
	for time.Now().Before(deadline) {
		time.Sleep(500 * time.Millisecond)
		now := count(t, n)
		done := true
		for what, c := range now {
			if goal != nil && c > goal[what]+allowed[what] || goal == nil && c != last[what] {
				done = false
			}
		}
		last = now
		if done {
			break
		}
	}
	return last
}

func count(t *testing.T, n *testnode.Node) map[string]int {
	c := map[string]int{
		"mounts":      lines(t, "/proc/self/mountinfo", n.Dir+"/"),
		"links":       links(n),
		"cgroups":     cgroups(n),
		"pod folders": entries(filepath.Join(n.State(), "pods")),
		"bundles":     entries(filepath.Join(n.State(), "containers")),
		"addresses":   addresses(n),
		"daemon fds":  entries(fmt.Sprintf("/proc/%d/fd", n.PID())),
		"astray":      astray(n.PID()),
		"goroutines":  goroutines(t, n),
	}
	if pid := shimPID(n); pid != 0 {
		c["shim fds"] = entries(fmt.Sprintf("/proc/%d/fd", pid))
		c["shim astray"] = astray(pid)
	}
	c["processes"] = len(n.Processes())
	return c
}

func lines(t *testing.T, path, with string) int {
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n := 0
	for s := bufio.NewScanner(f); s.Scan(); {
		if strings.Contains(s.Text(), with) {
			n++
		}
	}
	return n
}

func entries(dir string) int {
	es, err := os.ReadDir(dir)
	if err != nil {
		return 0
	}
	return len(es)
}

// astray counts the threads of a process that are not in the namespaces of
// its first one.
func astray(pid int) int {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	count := 0
	for _, task := range tasks {
		for _, ns := range []string{"net", "mnt", "ipc", "uts", "user"} {
			home, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns))
			if err != nil {
				continue
			}
			if at, err := os.Readlink(filepath.Join(task, "ns", ns)); err == nil && at != home {
				count++
				break
			}
		}
	}
	return count
}

// links counts the interfaces that hang on the node's bridge.
func links(n *testnode.Node) int {
	bridge := filepath.Base(n.Dir)
	return entries(filepath.Join("/sys/class/net", bridge[:min(15, len(bridge))], "brif"))
}

// cgroups counts those below the parents that a daemon of this state folder
// uses.
func cgroups(n *testnode.Node) int {
	count := 0
	sum := sha256.Sum256([]byte(n.State()))
	for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
		parents, _ := filepath.Glob(pattern + "cloister-" + hex.EncodeToString(sum[:4]))
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

// addresses counts what address management keeps on disk for this node.
func addresses(n *testnode.Node) int {
	count := 0
	for _, dir := range []string{filepath.Join(n.Root(), "network"), filepath.Join(n.Dir, "cni")} {
		filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() && strings.Count(d.Name(), ".") == 3 {
				count++
			}
			return nil
		})
	}
	return count
}

// goroutines asks the daemon, whose verbose status tells their number.
func goroutines(t *testing.T, n *testnode.Node) int {
	r, err := n.Runtime.Status(t.Context(), &cri.StatusRequest{Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	g, err := strconv.Atoi(r.Info["goroutines"])
	if err != nil {
		t.Fatalf("Status says %q of its goroutines", r.Info["goroutines"])
	}
	return g
}
