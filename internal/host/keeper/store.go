package keeper

import (
	"fmt"
	"log/slog"
	"maps"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Store is the serving process's end. A nil Store keeps nothing: whoever
// serves without a keeper works, but what it holds dies with it.
type Store struct {
	log *slog.Logger

	mu    sync.Mutex
	sock  int
	gone  bool
	files map[string]*os.File // what the keeper holds, for a new one
}

// Connect takes the socket at fd and receives the files that an earlier
// serving process left. The caller owns them.
func Connect(fd int, log *slog.Logger) (*Store, map[string]*os.File, error) {
	unix.CloseOnExec(fd)
	s := &Store{log: log, sock: fd, files: map[string]*os.File{}}
	files := map[string]*os.File{}
	buf, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*4))
	for {
		op, name, f, err := receive(fd, buf, oob)
		if err != nil {
			for f := range maps.Values(files) {
				f.Close()
			}
			return nil, nil, fmt.Errorf("receive files from the keeper: %w", err)
		}
		switch {
		case op == opReady:
			return s, files, nil
		case op == opFile && f >= 0:
			files[name] = os.NewFile(uintptr(f), name)
		}
	}
}

// Put has the keeper hold a second reference to f under name, until Drop. The
// caller drops the name when it closes f.
func (s *Store) Put(name string, f *os.File) {
	if s == nil || f == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files[name] = f
	s.put(name, f)
}

func (s *Store) put(name string, f *os.File) {
	rc, err := f.SyscallConn()
	if err == nil {
		err = rc.Control(func(fd uintptr) { s.send(opPut, name, int(fd)) })
	}
	if err != nil {
		s.log.Warn("file not given to the keeper", "name", name, "err", err)
	}
}

// Drop has the keeper close name.
func (s *Store) Drop(name string) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.files, name)
	s.send(opDrop, name, -1)
}

// Clear has the keeper close everything whose name begins with prefix.
func (s *Store) Clear(prefix string) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.files, func(name string, _ *os.File) bool { return strings.HasPrefix(name, prefix) })
	s.send(opClear, prefix, -1)
}

// Quit has the keeper end when this process ends.
func (s *Store) Quit() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.send(opQuit, "", -1)
}

// send writes one message; mu is held.
func (s *Store) send(op byte, name string, fd int) {
	if s.gone {
		return
	}
	if err := send(s.sock, op, name, fd); err != nil {
		s.gone = true
		s.log.Error("the keeper does not listen", "name", name, "err", err)
	}
}

// Replace takes a new keeper in place of one that died, and gives it the
// files. The keeper that start starts must find socket as SocketFD.
func (s *Store) Replace(start func(socket *os.File) error) error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socketpair", err)
	}
	socket := os.NewFile(uintptr(pair[1]), "keeper")
	err = start(socket)
	socket.Close()
	if err != nil {
		unix.Close(pair[0])
		return fmt.Errorf("start a new keeper: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	unix.Close(s.sock)
	s.sock, s.gone = pair[0], false
	for name, f := range s.files {
		s.put(name, f)
	}
	return nil
}
