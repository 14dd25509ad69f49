package proc

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestStartInCgroup starts a program that tells where it began.
func TestStartInCgroup(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("cgroups are made by root")
	}
	name := "cloister-test-" + filepath.Base(t.TempDir())
	var dirs []string
	for _, root := range []string{"/sys/fs/cgroup/memory", "/sys/fs/cgroup/pids", "/sys/fs/cgroup"} {
		if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
			continue
		}
		dir := filepath.Join(root, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Skip("no cgroup can be made here:", err)
		}
		t.Cleanup(func() {
			if err := os.Remove(dir); err != nil {
				t.Error("something is left in the cgroup:", err)
			}
		})
		dirs = append(dirs, dir)
	}
	if len(dirs) == 0 {
		t.Skip("no cgroup file system is mounted under /sys/fs/cgroup")
	}
	r, err := NewReaper(slog.New(slog.DiscardHandler), filepath.Join(t.TempDir(), "exits"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); r.Run(ctx) }()
	defer func() { cancel(); <-ended }()

	out := filepath.Join(t.TempDir(), "out")
	f, err := os.Create(out)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	exit, err := r.RunCommand(t.Context(), Command{Path: "/bin/cat", Args: []string{"cat", "/proc/self/cgroup"}, Dir: "/", Files: [3]*os.File{nil, f, nil}, Cgroups: dirs})
	if err != nil || exit.Status != 0 {
		t.Fatal(exit, err)
	}
	got, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(got), "/"+name); n != len(dirs) {
		t.Errorf("the program began in %d of %d cgroups:\n%s", n, len(dirs), got)
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(own), name) {
		t.Errorf("the starter is in the cgroup:\n%s", own)
	}
	if _, err := r.Start(Command{Path: "/bin/true", Args: []string{"true"}, Cgroups: []string{"/sys/fs/cgroup/nowhere/at/all"}}, func(Exit) {}); err == nil {
		t.Error("a program started in a cgroup that does not exist")
	}
}
