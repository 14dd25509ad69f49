package proc

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"cloister.dev/internal/osutil"
)

// fork starts c inside its cgroups. A child begins where the thread is that
// makes it, so on version 1 a thread of its own moves there first and ends
// afterwards; on version 2 the kernel puts the child there itself.
func fork(c Command, attr *syscall.ProcAttr) (pid int, err error) {
	if len(c.Cgroups) == 0 {
		return syscall.ForkExec(c.Path, c.Args, attr)
	}
	sys := syscall.SysProcAttr{}
	if attr.Sys != nil {
		sys = *attr.Sys
	}
	attr.Sys = &sys
	err = osutil.OnThread(func() (err error) {
		for _, dir := range c.Cgroups {
			var unified *os.File
			if unified, err = enter(dir); err != nil {
				return err
			}
			if unified != nil {
				defer unified.Close()
				sys.UseCgroupFD, sys.CgroupFD = true, int(unified.Fd())
			}
		}
		pid, err = syscall.ForkExec(c.Path, c.Args, attr)
		return err
	})
	return pid, err
}

// enter moves the calling thread into a version 1 cgroup. Of a version 2 one,
// which takes whole processes only, it gives the open folder.
func enter(dir string) (unified *os.File, err error) {
	// 0 is the writing thread itself.
	err = os.WriteFile(filepath.Join(dir, "tasks"), []byte("0"), 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if unified, err = os.Open(dir); err != nil {
			return nil, fmt.Errorf("enter a cgroup: %w", err)
		}
		return unified, nil
	case errors.Is(err, unix.ENOSPC):
		return nil, nil // a cpuset without CPUs takes nobody; that of the parent then holds
	case err != nil:
		return nil, fmt.Errorf("enter a cgroup: %w", err)
	}
	return nil, nil
}
