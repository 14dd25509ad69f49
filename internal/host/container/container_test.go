package container

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/host/backend"
)

func TestPlaces(t *testing.T) {
	const place = "9:name=systemd:/a\n4:cpu,cpuacct:/a/b:c\n0::/u (deleted)\nrubbish\n"
	got := placePaths(place)
	for controller, want := range map[string]string{"cpu": "/a/b:c", "cpuacct": "/a/b:c", "": "/u", "name=systemd": "/a"} {
		if got[controller] != want {
			t.Errorf("%q: %q, want %q", controller, got[controller], want)
		}
	}
	if placeLost(place) || !placeLost("4:memory:/\n0::/\n") || !placeLost("") {
		t.Error("placeLost")
	}
	own, err := cgroupOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for controller := range placePaths(own) {
		if dir := cgroupDir(own, controller); dir != "" {
			t.Errorf("our own cgroup passes for a container's: %s", dir)
		}
	}
}

func TestSystemdPath(t *testing.T) {
	for in, want := range map[string]string{
		"kubepods-burstable-pod1.slice:cri:abc": "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-abc.scope",
		"system.slice::abc":                     "/system.slice/abc.scope",
		"/not/systemd":                          "",
	} {
		if got := systemdPath(in); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}

func TestPlaceOfSpec(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"linux":{"cgroupsPath":"/pods/x"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	place := placeOfSpec(&backend.TaskSpec{Bundle: dir})
	for c, p := range placePaths(place) {
		if p != "/pods/x" {
			t.Errorf("%q: %q", c, p)
		}
	}
	if len(placePaths(place)) == 0 {
		t.Error("no place")
	}
}

func TestComplaints(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if got := lastError(f); got != "" {
		t.Errorf("%q of an empty log", got)
	}
	if _, err := f.WriteString("{\"level\":\"warning\",\"msg\":\"w1\"}\n{\"level\":\"error\",\"msg\":\"exec: \\\"x\\\": executable file not found in $PATH\"}\nnot json\n{\"level\":\"warning\",\"msg\":\"w2\"}\n"); err != nil {
		t.Fatal(err)
	}
	got := lastError(f)
	if want := `exec: "x": executable file not found in $PATH`; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if !errors.Is(kind(got), errdefs.ErrNotFound) || !errors.Is(kind("something else"), errdefs.ErrUnknown) {
		t.Error("kind")
	}
}
