package osutil

import (
	"bufio"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// CgroupMoves keeps the kernel's lock on moving processes between cgroups in
// its quick state while containers are being started.
//
// The first process that moves after a quiet time waits for an RCU grace
// period, 8 to 15 ms, under a lock that then stays quick for some
// milliseconds (kernel/cgroup: cgroup_threadgroup_rwsem, a percpu_rw_semaphore).
// An OCI runtime needs less to come to its first cgroup. So who knows that a
// start is coming moves itself to where it is already, again and again until
// the runtime is done: the grace period passes beside other work.
//
// The nil value leaves that lock alone: on an emulated processor, and with one
// processor for everything, hurrying the kernel costs more than it saves.
type CgroupMoves struct {
	procs   string // cgroup.procs of this process's own cgroup, empty: unknown
	log     *slog.Logger
	keepers sync.WaitGroup

	mu       sync.Mutex // guards what follows
	users    int
	expected time.Time // until when a start is expected
	keeping  bool
	refused  bool
	closed   bool
}

const (
	// movePeriod is shorter than the time for which the lock stays quick.
	movePeriod = 4 * time.Millisecond
	// expectTime bounds the wait for a start that does not come.
	expectTime = 100 * time.Millisecond
)

// NewCgroupMoves finds this process's own cgroup; Close ends its work.
func NewCgroupMoves(log *slog.Logger) *CgroupMoves {
	return &CgroupMoves{procs: ownProcs("/proc/self/cgroup", "/sys/fs/cgroup"), log: log}
}

// Expect makes moves quick for the start that follows within 100 ms.
func (m *CgroupMoves) Expect() {
	m.use(func() { m.expected = time.Now().Add(expectTime) })
}

// Hold makes moves quick until release is called.
func (m *CgroupMoves) Hold() (release func()) {
	m.use(func() { m.users++ })
	return func() {
		if m == nil {
			return
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		m.users--
	}
}

// Close waits until nothing is written any more.
func (m *CgroupMoves) Close() {
	m.mu.Lock()
	m.closed = true
	m.mu.Unlock()
	m.keepers.Wait()
}

func (m *CgroupMoves) use(want func()) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	want()
	if !m.keeping && !m.closed && !m.refused && m.procs != "" {
		m.keeping = true
		m.keepers.Go(m.keep)
	}
}

// wanted tells keep whether to go on; when it is told no, it ends.
func (m *CgroupMoves) wanted() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.keeping = !m.closed && (m.users > 0 || time.Now().Before(m.expected))
	return m.keeping
}

// keep ends when nobody is starting a container any more.
func (m *CgroupMoves) keep() {
	tick := time.NewTicker(movePeriod)
	defer tick.Stop()
	for m.wanted() {
		// 0 is the writing process itself.
		if err := os.WriteFile(m.procs, []byte("0"), 0); err != nil {
			m.log.Debug("cgroup moves not made quick, containers start slower", "path", m.procs, "err", err)
			m.giveUp()
			return
		}
		<-tick.C
	}
}

// giveUp leaves the lock alone from now on: who may not do it will not later.
func (m *CgroupMoves) giveUp() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.keeping, m.refused = false, true
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
