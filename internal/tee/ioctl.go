package tee

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

func teeIoctl(fd int) (teeVersion, error) {
	var v teeVersion
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), teeIOCVersion, uintptr(unsafe.Pointer(&v)))
	if errno != 0 {
		return v, errno
	}
	return v, nil
}
