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

	mu   sync.Mutex
	sock int
	gone bool
}

// Connect takes the socket at fd and receives the files that an earlier
// serving process left. The caller owns them.
func Connect(fd int, log *slog.Logger) (*Store, map[string]*os.File, error) {
	unix.CloseOnExec(fd)
	s := &Store{log: log, sock: fd}
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

// Put has the keeper hold a second reference to f under name.
func (s *Store) Put(name string, f *os.File) {
	if s == nil || f == nil {
		return
	}
	rc, err := f.SyscallConn()
	if err == nil {
		err = rc.Control(func(fd uintptr) { s.send(opPut, name, int(fd)) })
	}
	if err != nil {
		s.log.Warn("file not given to the keeper", "name", name, "err", err)
	}
}

// Drop has the keeper close name.
func (s *Store) Drop(name string) { s.send(opDrop, name, -1) }

// Clear has the keeper close everything whose name begins with prefix.
func (s *Store) Clear(prefix string) { s.send(opClear, prefix, -1) }

// Quit has the keeper end when this process ends.
func (s *Store) Quit() { s.send(opQuit, "", -1) }

func (s *Store) send(op byte, name string, fd int) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone {
		return
	}
	if err := send(s.sock, op, name, fd); err != nil {
		s.gone = true
		s.log.Error("the keeper is gone: a crash of this process may now lose output", "name", strings.Clone(name), "err", err)
	}
}
