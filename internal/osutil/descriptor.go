package osutil

import (
	"os"

	"golang.org/x/sys/unix"
)

// Dup gives a second descriptor of the same open file, and leaves f in the
// poller, which f.Fd() would not. The two share offset and flags.
func Dup(f *os.File) (*os.File, error) {
	fd := -1
	err := control(f, func(h int) (err error) {
		fd, err = unix.FcntlInt(uintptr(h), unix.F_DUPFD_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, os.NewSyscallError("dup", err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// SetWindow sets the size of a terminal in characters; what is more than the
// kernel can keep is cut to its largest size.
func SetWindow(tty *os.File, width, height uint32) error {
	const largest = 0xffff
	return control(tty, func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Col: uint16(min(width, largest)), Row: uint16(min(height, largest))})
	})
}

func control(f *os.File, do func(fd int) error) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := rc.Control(func(fd uintptr) { failed = do(int(fd)) }); err != nil {
		return err
	}
	return failed
}
