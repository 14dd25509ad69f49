package tee

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// Machine reads what the kernel tells. Root stands before every path; it is
// empty but in tests and where the host is mounted elsewhere.
type Machine struct{ Root string }

// maxProcFile bounds what is read of one file of /proc or /sys.
const maxProcFile = 4 << 20

// Path is where a file of the machine is.
func (m Machine) Path(path string) string { return filepath.Join(m.Root, path) }

// Read gives a file of the machine without blanks around it, "" when it cannot be read.
func (m Machine) Read(path string) string {
	f, err := os.Open(m.Path(path))
	if err != nil {
		return ""
	}
	defer f.Close()
	b := make([]byte, 0, 4096)
	buf := bytes.NewBuffer(b)
	if _, err := buf.ReadFrom(&limited{f, maxProcFile}); err != nil {
		return ""
	}
	return strings.TrimSpace(buf.String())
}

type limited struct {
	f    *os.File
	left int
}

func (l *limited) Read(p []byte) (int, error) {
	if l.left <= 0 {
		return 0, fmt.Errorf("%s is longer than %d bytes: %w", l.f.Name(), maxProcFile, errdefs.ErrOutOfRange)
	}
	n, err := l.f.Read(p[:min(len(p), l.left)])
	l.left -= n
	return n, err
}

// Exists tells whether a path is there.
func (m Machine) Exists(path string) bool {
	_, err := os.Stat(m.Path(path))
	return err == nil
}

// CharDevice tells why a path is not a character device.
func (m Machine) CharDevice(path string) error {
	info, err := os.Stat(m.Path(path))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s is not there: %w", path, errdefs.ErrNotFound)
	case err != nil:
		return fmt.Errorf("%s: %w", path, err)
	case info.Mode()&fs.ModeCharDevice == 0:
		return fmt.Errorf("%s is %s, not a device node: %w", path, kind(info.Mode()), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// Folder tells why a path is not a folder.
func (m Machine) Folder(path string) error {
	info, err := os.Stat(m.Path(path))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s is not there: %w", path, errdefs.ErrNotFound)
	case err != nil:
		return fmt.Errorf("%s: %w", path, err)
	case !info.IsDir():
		return fmt.Errorf("%s is %s, not a folder: %w", path, kind(info.Mode()), errdefs.ErrFailedPrecondition)
	}
	return nil
}

func kind(m fs.FileMode) string {
	switch {
	case m.IsRegular():
		return "a regular file"
	case m.IsDir():
		return "a folder"
	case m&fs.ModeSocket != 0:
		return "a socket"
	case m&fs.ModeDevice != 0 && m&fs.ModeCharDevice == 0:
		return "a block device"
	}
	return "something else"
}

// CPUFlags are the flags of the first processor.
func (m Machine) CPUFlags() []string {
	s := bufio.NewScanner(strings.NewReader(m.Read("/proc/cpuinfo")))
	s.Buffer(nil, maxProcFile)
	for s.Scan() {
		name, value, ok := strings.Cut(s.Text(), ":")
		if n := strings.TrimSpace(name); ok && (n == "flags" || n == "Features") {
			return strings.Fields(value)
		}
	}
	return nil
}

// HasCPUFlag tells whether the first processor has a flag.
func (m Machine) HasCPUFlag(flag string) bool { return slices.Contains(m.CPUFlags(), flag) }

// miscFiles are where the misc controller tells what there is: cgroup v2, the
// v2 part of a hybrid, v1; in a container, which sees its own cgroup only, the
// host's are mounted below /host.
func miscFiles() []string {
	here := []string{"/sys/fs/cgroup/misc.capacity", "/sys/fs/cgroup/unified/misc.capacity", "/sys/fs/cgroup/misc/misc.capacity"}
	all := here
	for _, f := range here {
		all = append(all, "/host"+f)
	}
	return all
}

// MiscCapacity gives a line of misc.capacity, such as "tdx" or "sev_es". Zero
// and false mean that the kernel counts none.
func (m Machine) MiscCapacity(key string) (int64, bool) {
	for _, f := range miscFiles() {
		for line := range strings.Lines(m.Read(f)) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
			if name != key {
				continue
			}
			n, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
			if err != nil || n <= 0 {
				return 0, false
			}
			return n, true
		}
	}
	return 0, false
}

// EPC gives the bytes of enclave page cache by NUMA node.
func (m Machine) EPC() map[int64]int64 {
	found := map[int64]int64{}
	dirs, err := filepath.Glob(m.Path("/sys/devices/system/node/node[0-9]*"))
	if err != nil {
		return found
	}
	for _, dir := range dirs {
		node, err := strconv.ParseInt(strings.TrimPrefix(filepath.Base(dir), "node"), 10, 64)
		if err != nil {
			continue
		}
		n, err := strconv.ParseInt(m.Read("/sys/devices/system/node/"+filepath.Base(dir)+"/x86/sgx_total_bytes"), 10, 64)
		if err == nil && n > 0 {
			found[node] = n
		}
	}
	return found
}
