package oci

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/pkg/cap"
)

// kernel is what the running kernel offers. Everything but the functions is
// fixed while a process lives, so it is read once.
type kernel struct {
	known    []string // capabilities that the kernel has
	held     []string // those of them that this process has and can pass on
	swap     bool     // the memory controller limits swap
	hugetlb  bool     // a hugetlb controller that runtimes can use
	cgroupVF []string // options of the node's cgroup2 mount that a second mount must repeat
	masked   []string // default masked paths

	hostname         func() (string, error)
	mounts           func() ([]mountPoint, error)
	appArmorProfiles string
	dev              string
}

// thisKernel reads the machine once; the value is only read afterwards.
var thisKernel = sync.OnceValues(readKernel)

func readKernel() (kernel, error) {
	k := kernel{
		hostname:         os.Hostname,
		mounts:           readMountInfo,
		appArmorProfiles: "/sys/kernel/security/apparmor/profiles",
		dev:              "/dev",
		masked:           defaultMaskedPaths("/sys/devices/system/cpu"),
	}
	last, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if err != nil {
		return kernel{}, fmt.Errorf("ask the kernel for its capabilities: %w", err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(last)))
	if err != nil {
		return kernel{}, fmt.Errorf("ask the kernel for its capabilities: %w", err)
	}
	for i := range n + 1 {
		if name := cap.FromNumber(i); name != "" {
			k.known = append(k.known, name)
		}
	}
	if k.held, err = cap.Current(); err != nil {
		return kernel{}, fmt.Errorf("read this process's capabilities: %w", err)
	}
	k.swap = swapLimited()
	k.hugetlb = hugetlbPresent()
	if mounts, err := k.mounts(); err == nil {
		k.cgroupVF = cgroup2Options(mounts)
	}
	return k, nil
}

// swapLimited looks where either cgroup version shows its swap limit. The
// root of cgroup v2 has no such file, so the process's own group is asked.
func swapLimited() bool {
	if exists("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes") {
		return true
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(own)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return exists(filepath.Join("/sys/fs/cgroup", path, "memory.swap.max"))
		}
	}
	return false
}

// hugetlbPresent asks for the controller where a runtime would use it: its own
// hierarchy on cgroup v1, the root of the unified one on v2. On a hybrid
// machine a hugetlb controller of the v2 side counts as absent.
func hugetlbPresent() bool {
	if exists("/sys/fs/cgroup/hugetlb") {
		return true
	}
	controllers, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
	return err == nil && slices.Contains(strings.Fields(string(controllers)), "hugetlb")
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

// cgroup2Options returns the options that are a property of the one cgroup2
// superblock: a mount without them would strip them from the node's.
func cgroup2Options(mounts []mountPoint) []string {
	var options []string
	for _, m := range mounts {
		if m.path != "/sys/fs/cgroup" || m.fsType != "cgroup2" {
			continue
		}
		options = nil
		for _, o := range m.superOptions {
			if o == "nsdelegate" || o == "memory_recursiveprot" {
				options = append(options, o)
			}
		}
	}
	return options
}

// mountPoint is one line of mountinfo.
type mountPoint struct {
	path, fsType  string
	shared, slave bool
	superOptions  []string
}

func readMountInfo() ([]mountPoint, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("read the mounts: %w", err)
	}
	defer f.Close()
	var mounts []mountPoint
	lines := bufio.NewScanner(f)
	lines.Buffer(make([]byte, 0, 64<<10), 1<<20)
	for lines.Scan() {
		if m, ok := parseMountInfo(lines.Text()); ok {
			mounts = append(mounts, m)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read the mounts: %w", err)
	}
	return mounts, nil
}

// parseMountInfo reads one line as proc_pid_mountinfo(5) describes it.
func parseMountInfo(line string) (mountPoint, bool) {
	head, tail, ok := strings.Cut(line, " - ")
	if !ok {
		return mountPoint{}, false
	}
	fields, rest := strings.Fields(head), strings.Fields(tail)
	if len(fields) < 6 || len(rest) < 1 {
		return mountPoint{}, false
	}
	m := mountPoint{path: unescapeOctal(fields[4]), fsType: rest[0]}
	for _, tag := range fields[6:] {
		m.shared = m.shared || strings.HasPrefix(tag, "shared:")
		m.slave = m.slave || strings.HasPrefix(tag, "master:")
	}
	if len(rest) > 2 {
		m.superOptions = strings.Split(rest[2], ",")
	}
	return m, true
}

// unescapeOctal turns the kernel's \040 and its like back into bytes.
func unescapeOctal(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// mountOf returns the mount that path lies on. Later lines cover earlier ones
// with the same mount point.
func mountOf(mounts []mountPoint, path string) (mountPoint, bool) {
	best, found := mountPoint{}, false
	for _, m := range mounts {
		if beneath(path, m.path) && (!found || len(m.path) >= len(best.path)) {
			best, found = m, true
		}
	}
	return best, found
}
