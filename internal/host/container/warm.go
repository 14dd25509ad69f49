package container

import (
	"bufio"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// warmth keeps the kernel's lock on moving processes between cgroups in its
// quick state while containers are being started.
//
// The first process that moves after a quiet time waits for an RCU grace
// period, 8 to 15 ms, under a lock that then stays quick for some
// milliseconds (kernel/cgroup: cgroup_threadgroup_rwsem, a percpu_rw_semaphore).
// An OCI runtime needs as long to come to its first move. So a start begins by
// moving this process to where it is already, again and again until the
// runtime is done: the grace period passes beside the runtime's own start.
type warmth struct {
	procs string // cgroup.procs of this process's own cgroup, empty: unknown
	log   *slog.Logger

	mu    sync.Mutex
	users int
}

// warmPeriod is shorter than the time for which the lock stays quick.
const warmPeriod = 4 * time.Millisecond

func newWarmth(log *slog.Logger) *warmth {
	return &warmth{procs: ownProcs("/proc/self/cgroup", "/sys/fs/cgroup"), log: log}
}

// WithoutWarming leaves that lock alone: on an emulated processor, and with one
// processor for everything, hurrying the kernel costs more than it saves.
func (b *Backend) WithoutWarming() *Backend {
	b.warmth.procs = ""
	return b
}

// hold keeps the lock quick until release is called.
func (w *warmth) hold() (release func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.users++; w.users == 1 && w.procs != "" {
		go w.keep()
	}
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.users--
	}
}

func (w *warmth) wanted() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.users > 0
}

// keep ends when nobody is starting a container any more.
func (w *warmth) keep() {
	tick := time.NewTicker(warmPeriod)
	defer tick.Stop()
	for w.wanted() {
		// 0 is the writing process itself.
		if err := os.WriteFile(w.procs, []byte("0"), 0); err != nil {
			w.log.Debug("cgroup lock not warmed, containers start slower", "path", w.procs, "err", err)
			return
		}
		<-tick.C
	}
}

// ownProcs finds cgroup.procs of this process in any mounted hierarchy.
func ownProcs(self, root string) string {
	f, err := os.Open(self)
	if err != nil {
		return ""
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		parts := strings.SplitN(s.Text(), ":", 3)
		if len(parts) != 3 {
			continue
		}
		hierarchy := strings.TrimPrefix(parts[1], "name=")
		path := filepath.Join(root, hierarchy, parts[2], "cgroup.procs")
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return ""
}
