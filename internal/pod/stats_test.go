package pod

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestCellSharesOneMeasurement(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c cell[int]
		var measured atomic.Int32
		measure := func(_ context.Context, last int) (int, error) {
			measured.Add(1)
			time.Sleep(time.Second)
			return last + 1, nil
		}
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				if v, err := c.get(t.Context(), time.Minute, measure); v != 1 || err != nil {
					t.Errorf("got %d, %v", v, err)
				}
			})
		}
		wg.Wait()
		if v, err := c.get(t.Context(), time.Minute, measure); v != 1 || err != nil {
			t.Errorf("a second call got %d, %v", v, err)
		}
		if n := measured.Load(); n != 1 {
			t.Errorf("measured %d times within the period", n)
		}
		time.Sleep(time.Minute)
		if v, err := c.get(t.Context(), time.Minute, measure); v != 2 || err != nil {
			t.Errorf("after the period got %d, %v", v, err)
		}
	})
}

func TestCellFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c cell[int]
		broken := errors.New("broken")
		if _, err := c.get(t.Context(), time.Minute, func(context.Context, int) (int, error) { return 7, broken }); !errors.Is(err, broken) {
			t.Errorf("got %v", err)
		}
		if _, _, ok := c.last(); ok {
			t.Error("a failed measurement left a value")
		}

		// Who waits for an impatient caller's measurement makes its own.
		impatient, cancel := context.WithCancel(t.Context())
		go c.get(impatient, time.Minute, func(ctx context.Context, _ int) (int, error) {
			<-ctx.Done()
			return 0, ctx.Err()
		})
		synctest.Wait()
		got := make(chan int)
		go func() {
			v, err := c.get(t.Context(), time.Minute, func(context.Context, int) (int, error) { return 5, nil })
			if err != nil {
				t.Error(err)
			}
			got <- v
		}()
		synctest.Wait()
		cancel()
		if v := <-got; v != 5 {
			t.Errorf("got %d", v)
		}

		// A waiter may give up.
		time.Sleep(time.Hour)
		hang := make(chan struct{})
		go c.get(t.Context(), time.Minute, func(context.Context, int) (int, error) { <-hang; return 6, nil })
		synctest.Wait()
		short, stop := context.WithTimeout(t.Context(), time.Second)
		defer stop()
		if _, err := c.get(short, time.Minute, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		close(hang)
	})
}

func TestRateOfSamples(t *testing.T) {
	start := time.Unix(1000, 0)
	var s sample
	for i, step := range []struct {
		after time.Duration // since start
		cpu   amount
		want  amount
	}{
		{0, known(1e9), amount{}},
		{500 * time.Millisecond, known(2e9), amount{}},                    // too close
		{time.Second, known(2e9), known(1e9)},                             // one core
		{1500 * time.Millisecond, known(2.5e9), known(1e9)},               // since the first
		{2 * time.Second, known(2.5e9), known(5e8)},                       // since the second
		{12 * time.Second, known(22.5e9), known(2e9)},                     // ten seconds later
		{13 * time.Second, amount{}, amount{}},                            // not told
		{14 * time.Second, known(22.5e9), known(0)},                       // idle
		{14*time.Second + maxWindow + time.Second, known(30e9), amount{}}, // nobody looked for long
		{16*time.Second + maxWindow, known(31e9), known(1e9)},             // and again
		{18*time.Second + maxWindow, known(1), amount{}},                  // never backwards
	} {
		at := start.Add(step.after)
		s = s.next(usage{cpu: step.cpu}, at)
		if s.cores != step.want || !s.at.Equal(at) || s.usage.cpu != step.cpu {
			t.Errorf("step %d: %+v, want %+v", i, s.cores, step.want)
		}
	}
}

func TestFrequentSamplesKeepAWindow(t *testing.T) {
	s, at := sample{}, time.Unix(1000, 0)
	for i := range 1000 {
		at = at.Add(100 * time.Millisecond)
		s = s.next(usage{cpu: known(uint64(i) * 5e7)}, at) // half a core
		if i >= 10 && s.cores != known(5e8) {
			t.Fatalf("sample %d: %+v", i, s.cores)
		}
		if !s.older.at.IsZero() && at.Sub(s.older.at) > 2*minWindow {
			t.Fatalf("sample %d looks back %v", i, at.Sub(s.older.at))
		}
	}
}

func TestUsageOfShimMetrics(t *testing.T) {
	pack := func(m *cgroup1.Metrics) *anypb.Any {
		a, err := anypb.New(m)
		if err != nil {
			t.Fatal(err)
		}
		a.TypeUrl = string(m.ProtoReflect().Descriptor().FullName()) // as typeurl writes it
		return a
	}
	u, err := usageOf(pack(&cgroup1.Metrics{
		CPU: &cgroup1.CPUStat{Usage: &cgroup1.CPUUsage{Total: 5, User: 3, Kernel: 2}},
		Memory: &cgroup1.MemoryStat{TotalInactiveFile: 30, TotalRSS: 7, TotalPgFault: 11, PgFault: 1,
			Usage: &cgroup1.MemoryEntry{Usage: 100, Limit: 0x7FFFFFFFFFFFF000, Max: 120, Failcnt: 4},
			Swap:  &cgroup1.MemoryEntry{Usage: 90, Limit: 0x7FFFFFFFFFFFF000}},
		Pids: &cgroup1.PidsStat{Current: 2},
	}))
	if err != nil {
		t.Fatal(err)
	}
	if u.cpu != known(5) || u.cpuUser != known(3) || u.periods.known || u.workingSet != known(70) || u.memoryLimit.known || !u.memoryTold ||
		u.memoryMax != known(120) || u.limitHits != known(4) || u.faults != known(11) || u.ownFaults != known(1) ||
		u.swap != known(0) || u.swapLimit.known || u.threadsMax != known(0) || u.oomKills.known || u.kernel.known {
		t.Errorf("%+v", u)
	}
	u, err = usageOf(pack(&cgroup1.Metrics{Memory: &cgroup1.MemoryStat{
		Usage: &cgroup1.MemoryEntry{Usage: 100, Limit: 1000}, Swap: &cgroup1.MemoryEntry{Usage: 150, Limit: 1500}}}))
	if err != nil || u.memoryLimit != known(1000) || u.swap != known(50) || u.swapLimit != known(500) || u.cpu.known {
		t.Errorf("%+v, %v", u, err)
	}
	if u, err := usageOf(nil); err != nil || u.cpu.known {
		t.Errorf("no metrics: %+v, %v", u, err)
	}
	strange, err := anypb.New(wrapperspb.String("x"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := usageOf(strange); err == nil || !strings.Contains(err.Error(), "StringValue") {
		t.Errorf("strange metrics: %v", err)
	}
	if _, err := usageOf(&anypb.Any{TypeUrl: "io.containerd.cgroups.v2.Metrics", Value: []byte{0xff}}); err == nil {
		t.Error("garbage was taken for metrics")
	}
}

// writeTree writes files below a new folder and gives it.
func writeTree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func in(dir string, files map[string]string) map[string]string {
	all := map[string]string{}
	for n, c := range files {
		all[filepath.Join(dir, n)] = c
	}
	return all
}

func TestUnifiedCgroup(t *testing.T) {
	root := writeTree(t, in("pods/pod1", map[string]string{
		"cgroup.procs":        "",
		"cpu.stat":            "usage_usec 2500000\nuser_usec 2000000\nsystem_usec 500000\nnr_periods 10\nnr_throttled 3\nthrottled_usec 1500000\n",
		"cpu.pressure":        "some avg10=1.50 avg60=0.25 avg300=0.00 total=3000000\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1000000\n",
		"memory.current":      "1000000\n",
		"memory.max":          "4000000\n",
		"memory.peak":         "1200000\n",
		"memory.swap.current": "5000\n",
		"memory.swap.max":     "max\n",
		"memory.low":          "300000\n",
		"memory.stat":         "anon 600000\nfile 300000\nkernel_stack 1000\nslab 2000\nfile_mapped 40000\ninactive_file 200000\npgfault 77\npgmajfault 7\n",
		"memory.events":       "low 0\nhigh 0\nmax 9\noom 2\noom_kill 1\n",
		"memory.pressure":     "some avg10=0.00 avg60=0.00 avg300=0.00 total=2000000\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
		"io.stat":             "8:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n",
		"io.pressure":         "some avg10=0.00 avg60=0.00 avg300=0.00 total=5\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=4\n",
		"pids.current":        "12\n", "pids.max": "max\n",
		"cpu.weight": "100\n", "cpu.max": "20000 100000\n",
		"ctr/cgroup.procs": "11\n12\n", "ctr/inner/cgroup.procs": "13\n",
	}))
	tree := cgroupTree{root: root, unified: true}
	u, err := tree.usage("/pods/pod1")
	if err != nil {
		t.Fatal(err)
	}
	for what, ok := range map[string]bool{
		"cpu":         u.cpu == known(2.5e9) && u.cpuUser == known(2e9) && u.cpuSystem == known(5e8),
		"throttling":  u.periods == known(10) && u.throttledPeriods == known(3) && u.throttledTime == known(1.5e9),
		"memory":      u.memory == known(1e6) && u.workingSet == known(8e5) && u.memoryLimit == known(4e6) && u.memoryMax == known(1.2e6),
		"rss":         u.rss == known(6e5) && u.cache == known(3e5) && u.mapped == known(4e4) && u.kernel == known(3000),
		"faults":      u.faults == known(77) && u.majorFaults == known(7) && u.ownFaults == known(77),
		"swap":        u.swap == known(5000) && !u.swapLimit.known && u.swapTold,
		"limits hit":  u.limitHits == known(9) && u.oomKills == known(1),
		"threads":     u.threads == known(12) && u.threadsMax == known(0),
		"devices":     len(u.devices) == 1 && u.devices[0] == deviceUsage{major: 8, readBytes: 4096, writeBytes: 8192, reads: 1, writes: 2},
		"cpu stall":   u.cpuStall != nil && *u.cpuStall == stall{stallTime{3e9, 1.5, 0.25, 0}, stallTime{total: 1e9}},
		"other stall": u.memoryStall != nil && u.memoryStall.some.total == 2e9 && u.ioStall != nil && u.ioStall.full.total == 4000,
	} {
		if !ok {
			t.Errorf("%s: %+v", what, u)
		}
	}
	pids, err := tree.pids("/pods/pod1")
	if err != nil || len(pids) != 3 {
		t.Errorf("processes %v, %v", pids, err)
	}
	var p processes
	tree.limits("/pods/pod1", &p)
	if p.cpuQuota != known(20000) || p.cpuPeriod != known(100000) || p.cpuShares != known(2597) || p.reservation != known(300000) {
		t.Errorf("limits %+v", p)
	}
	if _, err := tree.usage("/pods/absent"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent group: %v", err)
	}
}

func TestLegacyCgroup(t *testing.T) {
	files := in("memory/pod1", map[string]string{
		"memory.stat":           "cache 1\ntotal_cache 300\ntotal_rss 600\ntotal_mapped_file 40\ntotal_inactive_file 200\npgfault 1\ntotal_pgfault 77\ntotal_pgmajfault 7\n",
		"memory.oom_control":    "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
		"memory.usage_in_bytes": "1000\n", "memory.max_usage_in_bytes": "1200\n",
		"memory.failcnt": "9\n", "memory.limit_in_bytes": "9223372036854771712\n",
		"memory.soft_limit_in_bytes": "9223372036854771712\n",
		"cgroup.procs":               "", "c/cgroup.procs": "21\n",
	})
	maps.Copy(files, in("cpu/pod1", map[string]string{"cpu.stat": "nr_periods 4\nnr_throttled 2\nthrottled_time 900\n",
		"cpu.shares": "512\n", "cpu.cfs_period_us": "100000\n", "cpu.cfs_quota_us": "-1\n"}))
	maps.Copy(files, in("cpuacct/pod1", map[string]string{"cpuacct.usage": "5000000000\n", "cpuacct.stat": "user 300\nsystem 100\n", "cpuacct.usage_percpu": "1 2\n"}))
	tree := cgroupTree{root: writeTree(t, files)}
	u, err := tree.usage("/pod1")
	if err != nil {
		t.Fatal(err)
	}
	for what, ok := range map[string]bool{
		"cpu":        u.cpu == known(5e9) && u.cpuUser == known(3e9) && u.cpuSystem == known(1e9),
		"throttling": u.periods == known(4) && u.throttledPeriods == known(2) && u.throttledTime == known(900),
		"memory":     u.memory == known(1000) && u.workingSet == known(800) && !u.memoryLimit.known && u.memoryMax == known(1200),
		"rss":        u.rss == known(600) && u.cache == known(300) && u.mapped == known(40) && !u.kernel.known,
		"faults":     u.faults == known(77) && u.ownFaults == known(1) && u.majorFaults == known(7),
		"swap":       !u.swap.known && !u.swapTold, // this kernel does not account it
		"limits hit": u.limitHits == known(9) && u.oomKills == known(3),
		"threads":    !u.threads.known, // no pids controller here
		"stall":      u.cpuStall == nil,
	} {
		if !ok {
			t.Errorf("%s: %+v", what, u)
		}
	}
	var p processes
	tree.limits("/pod1", &p)
	if p.cpuQuota.known || p.cpuPeriod != known(100000) || p.cpuShares != known(512) || p.reservation != known(0) {
		t.Errorf("limits %+v", p)
	}
	if _, err := tree.usage("/absent"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent group: %v", err)
	}
}

func TestSharesOfWeight(t *testing.T) {
	for weight, shares := range map[uint64]uint64{1: 2, 10000: 262144, 39: 998, 0: 2} {
		if got := sharesOf(weight); got != shares {
			t.Errorf("weight %d is %d shares, want %d", weight, got, shares)
		}
	}
}

func TestParseNetDev(t *testing.T) {
	const head = "Inter-|   Receive                                                |  Transmit\n face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n"
	ifs, err := parseNetDev(strings.NewReader(head +
		"    lo:      10       1    0    0    0     0          0         0       10       1    0    0    0     0       0          0\n" +
		"  eth0:18446744073709551615 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0\n"))
	if err != nil || len(ifs) != 2 || ifs[1] != (iface{"eth0", 18446744073709551615, 2, 3, 4, 5, 6, 7, 8}) || mainOf(ifs) != 1 {
		t.Errorf("%+v, %v", ifs, err)
	}
	if mainOf([]iface{{name: "lo"}, {name: "net1"}, {name: "net2"}}) != 1 || mainOf([]iface{{name: "lo"}}) != -1 {
		t.Error("main interface")
	}
	for _, bad := range []string{"eth0 1 2 3\n", "eth0: 1 2 3\n", "eth0: 1 x 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n"} {
		if _, err := parseNetDev(strings.NewReader(head + bad)); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}

func TestReadProcesses(t *testing.T) {
	root := writeTree(t, map[string]string{
		"memory/g/cgroup.procs": "5\n6\n", "memory/empty/cgroup.procs": "",
		"5/limits": "Limit                     Soft Limit           Hard Limit           Units     \nMax cpu time              unlimited            unlimited            seconds   \nMax open files            1024                 4096                 files     \n",
		"5/fd/0":   "", "5/fd/1": "",
	})
	if err := os.Symlink("socket:[123]", filepath.Join(root, "5/fd/2")); err != nil {
		t.Fatal(err)
	}
	p, err := readProcesses(cgroupTree{root: root}, root, "/g", 5)
	if err != nil || p.count != known(2) || p.files != known(3) || p.sockets != known(1) || p.maxOpenFiles != known(1024) {
		t.Errorf("%+v, %v", p, err)
	}
	if p, err := readProcesses(cgroupTree{root: root}, root, "/empty", 5); err != nil || p.count.known || p.maxOpenFiles.known {
		t.Errorf("of a group without processes: %+v, %v", p, err)
	}
}
