package external

import (
	"bytes"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// shims lists the processes of the external shim that serve pods of this node,
// or the one pod.
func (m machine) shims(sandbox string) []int {
	var pids []int
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		cmdline, err := os.ReadFile(filepath.Join(d, "cmdline"))
		args := bytes.Split(cmdline, []byte{0})
		if err != nil || filepath.Base(string(args[0])) != filepath.Base(m.shim) || !bytes.Contains(cmdline, []byte(m.Socket)) {
			continue
		}
		if sandbox != "" && !bytes.Contains(cmdline, []byte(sandbox)) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(d)); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// held counts all that pods of the node take on the machine.
func (m machine) held(t *testing.T) map[string]int {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	state := filepath.Join(m.State(), "shim")
	return map[string]int{
		"shim processes": len(m.shims("")),
		"shim sockets":   entries(filepath.Join(state, "s")),
		"runc states":    entries(filepath.Join(state, "runc/k8s.io")),
		"pumps":          entries(filepath.Join(state, "container/pumps")),
		"sandboxes":      entries(filepath.Join(state, "container/sandboxes")),
		"FIFOs":          fifos(m.State()),
		"mounts":         strings.Count(string(mounts), m.Dir+"/"),
		"cgroups":        m.cgroups(),
		"pod folders":    entries(filepath.Join(m.State(), "pods")),
		"bundles":        entries(filepath.Join(m.State(), "containers")),
		"addresses":      m.addresses(),
	}
}

func entries(dir string) int {
	es, err := os.ReadDir(dir)
	if err != nil {
		return 0
	}
	return len(es)
}

func fifos(dir string) int {
	n := 0
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type()&fs.ModeNamedPipe != 0 {
			n++
		}
		return nil // folders vanish while we walk
	})
	return n
}

// cgroup is the parent of all cgroups of the node's pods.
func (m machine) cgroup() string { return "/" + filepath.Base(m.Dir) }

// cgroups counts those of containers.
func (m machine) cgroups() int {
	n := 0
	parents, _ := filepath.Glob("/sys/fs/cgroup/*" + m.cgroup())
	for _, p := range append(parents, "/sys/fs/cgroup"+m.cgroup()) {
		es, _ := os.ReadDir(p) // absent when no pod was there
		for _, e := range es {
			if e.IsDir() {
				n++
			}
		}
	}
	return n
}

// removeCgroups takes away the empty parents, which no runtime removes.
func (m machine) removeCgroups() {
	parents, _ := filepath.Glob("/sys/fs/cgroup/*" + m.cgroup())
	for _, p := range append(parents, "/sys/fs/cgroup"+m.cgroup()) {
		_ = os.Remove(p)
	}
}

// addresses counts what address management keeps on disk.
func (m machine) addresses() int {
	n := 0
	_ = filepath.WalkDir(filepath.Join(m.Dir, "ipam"), func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && net.ParseIP(d.Name()) != nil {
			n++
		}
		return nil // files vanish while we walk
	})
	return n
}

// nothingLeft compares with what was held before.
func (m machine) nothingLeft(t *testing.T, before map[string]int) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		more := map[string]int{}
		for what, n := range m.held(t) {
			if n > before[what] {
				more[what] = n - before[what]
			}
		}
		if len(more) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("left behind: %v", more)
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}
