package hosttest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
)

// BenchmarkStart compares starting a container through the shim with running
// the runtime by hand on the same bundle.
func BenchmarkStart(b *testing.B) {
	for _, runtime := range []string{"runc", "crun"} {
		b.Run(runtime+"/shim", func(b *testing.B) {
			s := StartShim(b, OCI(runtime))
			s.Run(Container{ID: "first", Args: []string{"sleep", "100"}, Options: onStart})
			s.Remove("first")
			var times []time.Duration
			for i := 0; b.Loop(); i++ {
				id := fmt.Sprintf("b%d", i)
				b.StopTimer()
				c := Container{ID: id, Args: []string{"sleep", "100"}, Options: onStart}
				s.Bundle(&c)
				b.StartTimer()
				began := time.Now()
				s.Run(c)
				times = append(times, time.Since(began))
				b.StopTimer()
				s.Remove(id)
				os.RemoveAll(filepath.Join(s.Dir, "bundle-"+id))
				b.StartTimer()
			}
			report(b, times)
		})
		b.Run(runtime+"/by-hand", func(b *testing.B) {
			s := StartShim(b, OCI(runtime))
			root := filepath.Join(s.Dir, "root")
			var times []time.Duration
			for i := 0; b.Loop(); i++ {
				id := fmt.Sprintf("h%d", i)
				b.StopTimer()
				c := Container{ID: id, Args: []string{"sleep", "100"}}
				bundle := s.Bundle(&c)
				prefix := []string{runtime}
				if runtime == "crun" { // see the backend's hybrid.go
					prefix = []string{"unshare", "-m", "--propagation", "unchanged", "sh", "-c", `mount --make-private /sys/fs/cgroup; umount -l /sys/fs/cgroup/unified; exec "$@"`, "sh", runtime}
				}
				b.StartTimer()
				began := time.Now()
				args := append(prefix, "--root", root, "run", "--detach", "--bundle", bundle, id)
				err := exec.Command(args[0], args[1:]...).Run()
				times = append(times, time.Since(began))
				b.StopTimer()
				if err != nil {
					b.Fatal(err)
				}
				args = append(prefix, "--root", root, "delete", "--force", id)
				_ = exec.Command(args[0], args[1:]...).Run()
				os.RemoveAll(bundle)
				b.StartTimer()
			}
			report(b, times)
		})
	}
}

func report(b *testing.B, times []time.Duration) {
	slices.Sort(times)
	b.ReportMetric(float64(times[len(times)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(times[len(times)*95/100].Microseconds())/1000, "p95-ms")
	b.ReportMetric(float64(times[0].Microseconds())/1000, "best-ms")
}

// BenchmarkMemory reports what keeper and server cost with 0 and 40 running
// containers, each with somebody who waits for it.
func BenchmarkMemory(b *testing.B) {
	s := StartShim(b, OCI("runc"))
	for b.Loop() {
		const n = 40
		pss := func() (keeper, server float64) { return pssOf(b, s.keeper.Process.Pid), pssOf(b, s.ServerPid()) }
		k0, s0 := pss()
		for i := range n {
			id := fmt.Sprintf("m%d", i)
			s.Run(Container{ID: id, Args: []string{"sleep", "1000"}, Options: onStart})
			task := s.Task
			go func() { _, _ = task.Wait(s.ctx(), &taskapi.WaitRequest{ID: id}) }()
		}
		k1, s1 := pss()
		b.ReportMetric(k0, "keeper-0-KiB")
		b.ReportMetric(s0, "server-0-KiB")
		b.ReportMetric(k1, "keeper-40-KiB")
		b.ReportMetric(s1, "server-40-KiB")
		b.ReportMetric((k1+s1-k0-s0)/n, "KiB/container")
		for i := range n {
			s.Remove(fmt.Sprintf("m%d", i))
		}
	}
}

func pssOf(b *testing.B, pid int) float64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		b.Fatal(err)
	}
	_, after, _ := strings.Cut(string(text), "\nPss:")
	var kib float64
	if _, err := fmt.Sscan(after, &kib); err != nil {
		b.Fatal(err)
	}
	return kib
}
