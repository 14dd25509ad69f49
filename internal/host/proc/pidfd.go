package proc

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// OpenPidfd gives a pollable pidfd.
func OpenPidfd(pid int) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.EINVAL) { // before Linux 5.10
		if fd, err = unix.PidfdOpen(pid, 0); err == nil {
			err = unix.SetNonblock(fd, true)
		}
	}
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// Signal sends a signal to exactly the process of pid and start time; a
// process that is gone is os.ErrProcessDone.
func Signal(pid int, start uint64, sig unix.Signal) error {
	f, err := OpenPidfd(pid)
	if errors.Is(err, unix.ESRCH) {
		return os.ErrProcessDone
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if st, err := ReadStat(pid); err != nil || st.Start != start {
		return os.ErrProcessDone
	}
	err = sendSignal(f, sig)
	if errors.Is(err, unix.ESRCH) {
		return os.ErrProcessDone
	}
	if err != nil {
		return fmt.Errorf("send signal %d to process %d: %w", sig, pid, err)
	}
	return nil
}

func sendSignal(pidfd *os.File, sig unix.Signal) error {
	rc, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var e error
	if err := rc.Control(func(fd uintptr) { e = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return err
	}
	return e
}

// pidfdInfo is struct pidfd_info of linux/pidfd.h in its first size.
type pidfdInfo struct {
	mask, cgroupID                                   uint64
	pid, tgid, ppid                                  uint32
	ruid, rgid, euid, egid, suid, sgid, fsuid, fsgid uint32
	exitCode                                         int32
}

const (
	pidfdInfoExit = 1 << 3
	pidfdGetInfo  = 3<<30 | unsafe.Sizeof(pidfdInfo{})<<16 | 0xff<<8 | 11
)

// exitInfo asks the kernel for the status of a process that was reaped while
// pidfd was held (Linux 6.15 and later).
func exitInfo(fd int) (int, bool) {
	info := pidfdInfo{mask: pidfdInfoExit}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), pidfdGetInfo, uintptr(unsafe.Pointer(&info)))
	if errno != 0 || info.mask&pidfdInfoExit == 0 {
		return 0, false
	}
	return decodeStatus(uint32(info.exitCode)), true
}
