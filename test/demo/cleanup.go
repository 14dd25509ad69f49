package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// cleanUp ends what the demo started and removes what it made, after a
// failure too.
func (d *demo) cleanUp() error {
	var errs []error
	for _, p := range slices.Backward(d.procs) {
		errs = append(errs, p.stop())
	}
	errs = append(errs, d.endLeftovers(), unmountBelow(d.dir), removeBridge(), os.RemoveAll(d.dir))
	return errors.Join(errs...)
}

// endLeftovers ends processes that work in the demo's folder: shims that a
// daemon which crashed left behind.
func (d *demo) endLeftovers() error {
	limit := time.Now().Add(10 * time.Second)
	for {
		left, err := processesOf(d.dir)
		if err != nil || len(left) == 0 {
			return err
		}
		if time.Now().After(limit) {
			return fmt.Errorf("processes %v of the demo do not end", left)
		}
		for _, pid := range left {
			if err := endProcess(pid); err != nil {
				return err
			}
		}
	}
}

// endProcess kills a process and waits until it is gone.
func endProcess(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("end process %d: %w", pid, err)
	}
	_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 2000)
	if errors.Is(err, unix.EINTR) {
		return nil
	}
	return err
}

// processesOf lists the processes whose command line names a folder.
func processesOf(dir string) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var found []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err == nil && bytes.Contains(cmdline, []byte(dir)) {
			found = append(found, pid)
		}
	}
	return found, nil
}

// unmountBelow takes down what is still mounted in the folder, newest first.
func unmountBelow(dir string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var points []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			points = append(points, f[4])
		}
	}
	var errs []error
	for _, p := range slices.Backward(points) {
		if err := syscall.Unmount(p, syscall.MNT_DETACH); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", p, err))
		}
	}
	return errors.Join(errs...)
}

func removeBridge() error {
	link, err := netlink.LinkByName(bridge)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find %s: %w", bridge, err)
	}
	return netlink.LinkDel(link)
}

// indent puts eight blanks before every line that goes to w.
func indent(w io.Writer) io.Writer { return &indenter{w: w} }

type indenter struct {
	w      io.Writer
	inside bool // the line was begun
}

func (i *indenter) Write(b []byte) (int, error) {
	for line := range bytes.Lines(b) {
		if !i.inside {
			line = append([]byte("        "), line...)
		}
		if _, err := i.w.Write(line); err != nil {
			return 0, err
		}
		i.inside = !bytes.HasSuffix(line, []byte("\n"))
	}
	return len(b), nil
}
