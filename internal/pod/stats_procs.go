package pod

import (
	"bufio"
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// processes is what the node's kernel shows of a container's processes and of
// the limits of its cgroup. Containers behind another kernel have none of it.
type processes struct {
	at           time.Time
	count        amount
	files        amount // open descriptors
	sockets      amount // those among them that are sockets
	maxOpenFiles amount // soft limit of the first process
	cpuShares    amount
	cpuPeriod    amount
	cpuQuota     amount // unknown also when there is none
	reservation  amount
}

// measureProcesses looks at the container's processes.
func (s *Service) measureProcesses(ctx context.Context, c *container) (processes, error) {
	v := c.get()
	sb, err := s.index.sandbox(v.SandboxID)
	if err != nil {
		return processes{}, err
	}
	return s.stats.container(v.ID).procs.get(ctx, s.statsPeriod(), func(context.Context, processes) (processes, error) {
		return readProcesses(cgroupRoot(), "/proc", containerCgroup(sb, v.ID), v.Pid)
	})
}

// processCount counts the container's processes.
func (s *Service) processCount(c *container) amount {
	v := c.get()
	sb, err := s.index.sandbox(v.SandboxID)
	if err != nil {
		return amount{}
	}
	pids, err := cgroupRoot().pids(containerCgroup(sb, v.ID))
	if err != nil || len(pids) == 0 {
		return amount{}
	}
	return known(uint64(len(pids)))
}

// readProcesses looks at the processes of a cgroup, the first of them pid. A
// cgroup without processes is that of a container behind another kernel, or
// of one that ends.
func readProcesses(t cgroupTree, proc, group string, pid uint32) (processes, error) {
	p := processes{at: time.Now()}
	pids, err := t.pids(group)
	if err != nil {
		return p, err
	}
	if len(pids) == 0 {
		return p, nil
	}
	var files, sockets uint64
	for _, pid := range pids {
		f, s := descriptors(filepath.Join(proc, pid, "fd"))
		files, sockets = files+f, sockets+s
	}
	p.count, p.files, p.sockets = known(uint64(len(pids))), known(files), known(sockets)
	p.maxOpenFiles = softOpenFiles(filepath.Join(proc, strconv.FormatUint(uint64(pid), 10), "limits"))
	t.limits(group, &p)
	return p, nil
}

// descriptors counts the open files of one process; one that ended has none.
func descriptors(dir string) (files, sockets uint64) {
	d, err := os.Open(dir)
	if err != nil {
		return 0, 0
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	for _, n := range names {
		files++
		if to, err := os.Readlink(filepath.Join(dir, n)); err == nil && strings.HasPrefix(to, "socket:") {
			sockets++
		}
	}
	return files, sockets
}

// softOpenFiles reads a process's soft limit of open files.
func softOpenFiles(path string) amount {
	f, err := os.Open(path)
	if err != nil {
		return amount{}
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		rest, ok := strings.CutPrefix(sc.Text(), "Max open files")
		if !ok {
			continue
		}
		if fields := strings.Fields(rest); len(fields) > 0 {
			return parseAmount(fields[0])
		}
	}
	return amount{}
}

// limits reads what the cgroup may use and the metrics of shims do not tell.
func (t cgroupTree) limits(group string, p *processes) {
	if !t.unified {
		p.cpuShares = readAmount(t.dir("cpu", group), "cpu.shares")
		p.cpuPeriod = readAmount(t.dir("cpu", group), "cpu.cfs_period_us")
		p.cpuQuota = readAmount(t.dir("cpu", group), "cpu.cfs_quota_us") // -1 is no number
		p.reservation = readAmount(t.dir("memory", group), "memory.soft_limit_in_bytes")
	} else {
		dir := t.dir("", group)
		if w := readAmount(dir, "cpu.weight"); w.known {
			p.cpuShares = known(sharesOf(w.n))
		}
		b, _ := os.ReadFile(filepath.Join(dir, "cpu.max"))
		if quota, period, ok := strings.Cut(strings.TrimSpace(string(b)), " "); ok {
			p.cpuQuota, p.cpuPeriod = parseAmount(quota), parseAmount(period)
		}
		p.reservation = readAmount(dir, "memory.low")
	}
	if p.reservation.n >= unlimited {
		p.reservation.n = 0
	}
}

// sharesOf turns a weight of cgroup v2 into shares of v1, undoing what OCI
// runtimes do: they map 2…262144 linearly to 1…10000.
func sharesOf(weight uint64) uint64 {
	return 2 + uint64(math.Round(float64(max(weight, 1)-1)*262142/9999))
}

func readAmount(dir, file string) amount {
	b, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		return amount{}
	}
	return parseAmount(strings.TrimSpace(string(b)))
}

// parseAmount reads a number; words such as "max" and "unlimited", and -1, are
// none.
func parseAmount(s string) amount {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return amount{}
	}
	return known(n)
}

// deviceName gives the name of a block device, and its numbers when the kernel
// tells none.
func deviceName(major, minor uint64) string {
	numbers := fmt.Sprintf("%d:%d", major, minor)
	b, err := os.ReadFile(filepath.Join("/sys/dev/block", numbers, "uevent"))
	if err != nil {
		return numbers
	}
	for line := range strings.Lines(string(b)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); ok {
			return "/dev/" + name
		}
	}
	return numbers
}
