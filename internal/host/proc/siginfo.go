package proc

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

const cldExited = 1

// siginfoChild reads the fields of a SIGCHLD siginfo that x/sys leaves
// opaque. On 64-bit Linux the union starts at byte 16: pid, uid, status.
func siginfoChild(info *unix.Siginfo) (pid int, code int32, status int) {
	p := (*struct {
		_      [16]byte
		pid    int32
		uid    uint32
		status int32
	})(unsafe.Pointer(info))
	return int(p.pid), info.Code, int(p.status)
}
