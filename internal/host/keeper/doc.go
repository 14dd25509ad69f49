// Package keeper holds what must outlive the process that serves: open files
// and exit statuses. The keeper is a tiny process that starts the serving
// process, starts it again when it dies, keeps files for it in between, and as
// the next child subreaper receives its orphans and writes down how they end.
//
// It promises that a file handed over with Put is open until Drop, whatever
// happens to the serving process, and that the exit of every orphan is in the
// journal before the kernel forgets the process.
//
// It must stay small and must not change often: it is the one process whose
// death costs something (the output that an ended container left in a pipe).
// It knows nothing of containers; names of files are opaque to it.
//
// Both sides talk over a socket pair of type SOCK_SEQPACKET, one message a
// packet: one letter, then a name, a file as SCM_RIGHTS where the letter asks
// for one. What the serving process has sent is in the keeper's socket buffer
// and so survives the sender; nothing needs an answer.
package keeper

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const (
	opPut   = 'P' // name, file: keep it, in place of an older one of that name
	opDrop  = 'D' // name
	opClear = 'C' // prefix: drop every file whose name begins so
	opQuit  = 'Q' // end when the serving process ends
	opFile  = 'F' // keeper to server: name, file
	opReady = 'R' // keeper to server: all files were given back
)

// maxMessage bounds a packet: a letter and a name.
const maxMessage = 1024

// send writes one packet; fd < 0 sends no file.
func send(sock int, op byte, name string, fd int) error {
	if len(name) >= maxMessage {
		return fmt.Errorf("name of %d bytes is too long for the keeper", len(name))
	}
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	for {
		err := unix.Sendmsg(sock, append([]byte{op}, name...), oob, nil, unix.MSG_NOSIGNAL)
		if !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("sendmsg", err)
		}
	}
}

var (
	errClosed = errors.New("the other side has gone")
	errCut    = errors.New("packet was cut off")
)

// receive reads one packet; fd is -1 when it carried none.
func receive(sock int, buf, oob []byte) (op byte, name string, fd int, err error) {
	var n, oobn, flags int
	for {
		n, oobn, flags, _, err = unix.Recvmsg(sock, buf, oob, unix.MSG_CMSG_CLOEXEC)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return 0, "", -1, os.NewSyscallError("recvmsg", err)
	}
	if n == 0 {
		return 0, "", -1, errClosed
	}
	fd = -1
	if oobn > 0 {
		fd = firstFile(oob[:oobn])
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		if fd >= 0 {
			unix.Close(fd)
		}
		return 0, "", -1, fmt.Errorf("%w: %q", errCut, buf[0])
	}
	return buf[0], string(buf[1:n]), fd, nil
}

// firstFile takes the first file of the control messages and closes others.
func firstFile(oob []byte) int {
	fd := -1
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return fd
	}
	for i := range msgs {
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			continue
		}
		for _, f := range fds {
			if fd < 0 {
				fd = f
			} else {
				unix.Close(f)
			}
		}
	}
	return fd
}
