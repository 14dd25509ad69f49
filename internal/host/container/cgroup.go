package container

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/proc"
)

// A Process's place is the text of its /proc/PID/cgroup: one path for each
// hierarchy of cgroup v1 and one for v2.

func cgroupOf(pid int) (string, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	return string(b), err
}

// placePaths reads a place: controller to path, "" for the v2 hierarchy.
func placePaths(place string) map[string]string {
	paths := map[string]string{}
	for line := range strings.Lines(place) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		path := strings.TrimSuffix(f[2], " (deleted)")
		if f[0] == "0" {
			paths[""] = path
			continue
		}
		for c := range strings.SplitSeq(f[1], ",") {
			paths[c] = path
		}
	}
	return paths
}

// placeLost tells of a process that was exiting when it was looked at: the
// kernel then shows the root of every v1 hierarchy.
func placeLost(place string) bool {
	for _, p := range placePaths(place) {
		if p != "/" {
			return false
		}
	}
	return true
}

// placeOfSpec is where config.json puts the container.
func placeOfSpec(t *backend.TaskSpec) string {
	b, err := os.ReadFile(filepath.Join(t.Bundle, "config.json"))
	if err != nil {
		return ""
	}
	var spec struct {
		Linux *struct{ CgroupsPath string } `json:"linux"`
	}
	if json.Unmarshal(b, &spec) != nil || spec.Linux == nil || spec.Linux.CgroupsPath == "" {
		return ""
	}
	path := spec.Linux.CgroupsPath
	if t.Runtime.SystemdCgroup {
		path = systemdPath(path)
	}
	own, err := cgroupOf(os.Getpid())
	if err != nil || !filepath.IsAbs(path) {
		return ""
	}
	var place strings.Builder
	for line := range strings.Lines(own) {
		if f := strings.SplitN(line, ":", 3); len(f) == 3 {
			fmt.Fprintf(&place, "%s:%s:%s\n", f[0], f[1], path)
		}
	}
	return place.String()
}

// systemdPath turns slice:prefix:name into the path that systemd gives it:
// a-b.slice lies in a.slice.
func systemdPath(s string) string {
	f := strings.Split(s, ":")
	if len(f) != 3 {
		return ""
	}
	path := "/"
	parts := strings.Split(strings.TrimSuffix(f[0], ".slice"), "-")
	for i := range parts {
		path = filepath.Join(path, strings.Join(parts[:i+1], "-")+".slice")
	}
	unit := f[2] + ".scope"
	if f[1] != "" {
		unit = f[1] + "-" + unit
	}
	return filepath.Join(path, unit)
}

// hierarchy is a mounted cgroup file system.
type hierarchy struct{ root, mount string }

// mountedHierarchies finds them by controller, "" for v2.
var mountedHierarchies = sync.OnceValues(func() (map[string]hierarchy, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	found := map[string]hierarchy{}
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		before, after, ok := strings.Cut(sc.Text(), " - ")
		m, fs := strings.Fields(before), strings.Fields(after)
		if !ok || len(m) < 5 || len(fs) < 3 {
			continue
		}
		h := hierarchy{root: m[3], mount: m[4]}
		switch fs[0] {
		case "cgroup2":
			found[""] = h
		case "cgroup":
			for o := range strings.SplitSeq(fs[2], ",") {
				found[o] = h // controllers, and words that are none
			}
		}
	}
	return found, sc.Err()
})

// cgroupDir is where a controller shows the place in the file system; "" when
// there is no such controller, or when the place is not the container's own.
func cgroupDir(place, controller string) string {
	path, ok := placePaths(place)[controller]
	if !ok || path == "/" || path == "" {
		return ""
	}
	own, err := cgroupOf(os.Getpid())
	if err != nil || placePaths(own)[controller] == path {
		return ""
	}
	all, err := mountedHierarchies()
	if err != nil {
		return ""
	}
	h, ok := all[controller]
	if !ok {
		return ""
	}
	if h.root != "/" {
		path = strings.TrimPrefix(path, h.root)
	}
	return filepath.Join(h.mount, path)
}

// listing are the controllers that are asked for a container's processes, the
// first one that knows the container counts.
var listing = [...]string{"", "pids", "memory", "freezer", "cpu", "devices"}

// pidsOf lists the processes of a place, those of nested cgroups included.
func pidsOf(place string) ([]int, error) {
	for _, c := range listing {
		dir := cgroupDir(place, c)
		if dir == "" {
			continue
		}
		if _, err := os.Stat(dir); err != nil {
			continue
		}
		return pidsUnder(dir)
	}
	return nil, nil
}

func pidsUnder(dir string) ([]int, error) {
	var pids []int
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || !e.IsDir() {
			return err
		}
		b, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EOPNOTSUPP) {
			return nil
		}
		for s := range strings.FieldsSeq(string(b)) {
			if pid, err := strconv.Atoi(s); err == nil && pid > 0 {
				pids = append(pids, pid)
			}
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list the processes of a cgroup: %w", err)
	}
	return pids, nil
}

// Pids is part of backend.Backend.
func (b *Backend) Pids(_ context.Context, t *backend.TaskSpec, init backend.Process) ([]int, error) {
	pids, err := pidsOf(init.Place)
	if err == nil && len(pids) == 0 {
		pids = []int{init.Pid}
	}
	return pids, err
}

// maxRounds bounds killing against a container that forks as fast as it dies.
const maxRounds = 20

// signalAll signals every process of a container.
func (b *Backend) signalAll(ctx context.Context, p backend.Process, sig unix.Signal) error {
	if sig == unix.SIGKILL {
		if killCgroup(p.Place) {
			return nil
		}
		freeze(p.Place)
		defer thaw(p.Place)
	}
	pids, err := pidsOf(p.Place)
	if err != nil {
		return err
	}
	if len(pids) == 0 {
		pids = []int{p.Pid}
	}
	sent := false
	for _, pid := range pids {
		// The list is fresh and the container frozen or forking; a pid that
		// was reused in between would have to be reused within microseconds.
		if unix.Kill(pid, sig) == nil {
			sent = true
		}
	}
	if !sent && ctx.Err() == nil {
		return fmt.Errorf("the container has no process: %w", errdefs.ErrNotFound)
	}
	return nil
}

// killCgroup uses the kernel's own way, which v2 has since Linux 5.14.
func killCgroup(place string) bool {
	dir := cgroupDir(place, "")
	return dir != "" && os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0) == nil
}

// freeze stops a v1 container from forking, until thaw.
func freeze(place string) {
	if dir := cgroupDir(place, "freezer"); dir != "" {
		_ = os.WriteFile(filepath.Join(dir, "freezer.state"), []byte("FROZEN"), 0)
	}
}

// thaw lets a frozen v1 container go on; signals are delivered then.
func thaw(place string) {
	if dir := cgroupDir(place, "freezer"); dir != "" {
		_ = os.WriteFile(filepath.Join(dir, "freezer.state"), []byte("THAWED"), 0)
	}
}

// Settle is part of backend.Backend. A container with its own PID namespace has
// nothing left; one that shares it may.
func (b *Backend) Settle(ctx context.Context, t *backend.TaskSpec, init backend.Process) (oom bool, err error) {
	if init.Place == "" || placeLost(init.Place) {
		init.Place = placeOfSpec(t)
	}
	oom = oomKilled(init.Place)
	for range maxRounds {
		pids, err := pidsOf(init.Place)
		if err != nil || len(pids) == 0 {
			return oom, err
		}
		if err := b.signalAll(ctx, init, unix.SIGKILL); err != nil && !errdefs.IsNotFound(err) {
			return oom, err
		}
		for _, pid := range pids {
			if err := awaitGone(ctx, pid); err != nil {
				return oom, fmt.Errorf("wait for a killed process: %w", err)
			}
		}
	}
	return oom, fmt.Errorf("processes keep appearing in the container's cgroup: %w", errdefs.ErrUnavailable)
}

// goneTime bounds the wait for one killed process.
const goneTime = 5 * time.Second

// awaitGone waits until a process has ended, reaped or not.
func awaitGone(ctx context.Context, pid int) error {
	f, err := proc.OpenPidfd(pid)
	if err != nil {
		return nil
	}
	defer f.Close()
	deadline := time.Now().Add(goneTime)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := f.SetReadDeadline(deadline); err != nil {
		return err
	}
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	return rc.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		_, _ = unix.Poll(p, 0)
		return p[0].Revents != 0
	})
}

// sweep ends the processes of a place and removes its cgroups.
func sweep(ctx context.Context, place string) error {
	pids, err := pidsOf(place)
	for _, pid := range pids {
		_ = unix.Kill(pid, unix.SIGKILL) // it may just have ended
		err = errors.Join(err, awaitGone(ctx, pid))
	}
	for controller := range placePaths(place) {
		dir := cgroupDir(place, controller)
		if dir == "" {
			continue
		}
		if rerr := unix.Rmdir(dir); rerr != nil && !errors.Is(rerr, unix.ENOENT) {
			err = errors.Join(err, fmt.Errorf("remove cgroup %s: %w", dir, rerr))
		}
	}
	return err
}

// oomKilled tells whether the kernel killed in a place for want of memory.
func oomKilled(place string) bool {
	for controller, file := range map[string]string{"": "memory.events", "memory": "memory.oom_control"} {
		dir := cgroupDir(place, controller)
		if dir == "" {
			continue
		}
		b, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			if n, ok := strings.CutPrefix(strings.TrimSpace(line), "oom_kill "); ok && n != "0" {
				return true
			}
		}
	}
	return false
}
