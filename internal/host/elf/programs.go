package elf

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Open is a program that opens path and exits with 0, or with the error
// number.
func Open(path string, flags int) ([]byte, error) {
	p, err := New()
	if err != nil {
		return nil, err
	}
	at := unix.AT_FDCWD
	return p.Call(unix.SYS_OPENAT, Int(at), Str(path), Int(flags), Int(0o600)).
		ExitWithErrno(unix.SYS_EXIT_GROUP).Bytes(), nil
}

// Holder is a program that, as PID 1 of a namespace, lets orphans disappear
// and sleeps for ever.
func Holder() ([]byte, error) {
	p, err := New()
	if err != nil {
		return nil, err
	}
	return p.hold().Bytes(), nil
}

// NestedHolder makes the namespace itself, inside the user namespace that is
// open as descriptor 3: it joins that, unshares the PID namespace, writes the
// pid of its child (four bytes, little endian) to descriptor 4 and exits with
// 0, or with an error number. The child is a Holder.
func NestedHolder() ([]byte, error) {
	p, err := New()
	if err != nil {
		return nil, err
	}
	p.Call(unix.SYS_SETNS, Int(3), Int(unix.CLONE_NEWUSER)).IfNegative("errno")
	p.Call(unix.SYS_UNSHARE, Int(unix.CLONE_NEWPID)).IfNegative("errno")
	p.Call(unix.SYS_CLONE, Int(int(unix.SIGCHLD)), Int(0), Int(0), Int(0), Int(0)).IfZero("child").IfNegative("errno")
	p.WriteResult(unix.SYS_WRITE, 4)
	p.ExitWithErrno(unix.SYS_EXIT_GROUP)
	p.Label("child")
	p.Call(unix.SYS_CLOSE, Int(3))
	p.Call(unix.SYS_CLOSE, Int(4))
	return p.hold().Bytes(), nil
}

func (p *Program) hold() *Program {
	// struct kernel_sigaction with SIG_IGN: children of PID 1 that nobody
	// waits for are then reaped by the kernel.
	ignore := make([]byte, 32)
	binary.LittleEndian.PutUint64(ignore, 1)
	p.Call(unix.SYS_RT_SIGACTION, Int(int(unix.SIGCHLD)), Data(ignore), Int(0), Int(8))
	p.Call(unix.SYS_PRCTL, Int(unix.PR_SET_NAME), Str("cloister-pause"))
	p.Label("again")
	// ppoll on nothing sleeps until a signal with a handler, of which there is
	// none; pause does not exist on arm64.
	p.Call(unix.SYS_PPOLL, Int(0), Int(0), Int(0), Int(0), Int(0))
	return p.Goto("again")
}

// Say is a program that writes text to its standard output and ends. As the
// first program of a machine it tells that the kernel has come up.
func Say(text string) ([]byte, error) {
	p, err := New()
	if err != nil {
		return nil, err
	}
	return p.Call(unix.SYS_WRITE, Int(1), Str(text), Int(len(text))).Call(unix.SYS_EXIT_GROUP, Int(0)).Bytes(), nil
}
