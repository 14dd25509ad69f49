package hosttest

import (
	"os"
	"path/filepath"
	"testing"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if dir, err := binaries(); err == nil {
		os.RemoveAll(dir)
	}
	// The containers' cgroups are gone; what held them all together stays
	// when another run is going on.
	parents, _ := filepath.Glob("/sys/fs/cgroup/*/cl-hosttest")
	for _, p := range append(parents, "/sys/fs/cgroup/cl-hosttest") {
		_ = os.Remove(p)
	}
	os.Exit(code)
}
