package stdio

import (
	"errors"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Stdin feeds a container's standard input from its clients.
type Stdin struct {
	file *os.File // non-blocking writing end, or a terminal
	once bool     // the first client that ends closes it
	// closed is called when the input was closed.
	closed func()

	mu      sync.Mutex
	over    bool
	clients map[*os.File]struct{}
}

// NewStdin owns file. closed may be nil.
func NewStdin(file *os.File, once bool, closed func()) *Stdin {
	return &Stdin{file: file, once: once, closed: closed, clients: map[*os.File]struct{}{}}
}

// Add copies from a client's FIFO, a non-blocking reading end, until the
// client closes it. It owns client.
func (s *Stdin) Add(client *os.File) {
	s.mu.Lock()
	if s.over {
		s.mu.Unlock()
		client.Close()
		return
	}
	s.clients[client] = struct{}{}
	s.mu.Unlock()
	go func() {
		err := s.copy(client)
		client.Close()
		s.mu.Lock()
		delete(s.clients, client)
		s.mu.Unlock()
		if err == nil && s.once {
			s.Close()
		}
	}()
}

// Close gives the container its end of input.
func (s *Stdin) Close() {
	s.mu.Lock()
	if s.over {
		s.mu.Unlock()
		return
	}
	s.over = true
	for c := range s.clients {
		// A reader that is in the poller is woken up by a deadline or by
		// Close; its goroutine closes the file.
		c.Close()
	}
	s.mu.Unlock()
	s.file.Close()
	if s.closed != nil {
		s.closed()
	}
}

const stdinPortion = 16 << 10

// copy returns nil when the client closed its end.
func (s *Stdin) copy(client *os.File) error {
	in, err := client.SyscallConn()
	if err != nil {
		return err
	}
	var buf []byte
	for {
		n := 0
		var rerr error
		err := in.Read(func(fd uintptr) bool {
			if buf == nil {
				buf = make([]byte, stdinPortion)
			}
			n, rerr = readFIFO(int(fd), buf)
			if errors.Is(rerr, unix.EAGAIN) {
				buf = nil // a client that waits holds no memory
				return false
			}
			return true
		})
		if err = errors.Join(err, rerr); err != nil {
			return err
		}
		if n == 0 {
			return nil
		}
		if _, err := s.file.Write(buf[:n]); err != nil {
			return err
		}
	}
}

// readFIFO reads; a FIFO that nobody has opened for writing yet is EAGAIN.
func readFIFO(fd int, buf []byte) (int, error) {
	for {
		n, err := unix.Read(fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n == 0 && err == nil && !hungUp(fd) {
			return 0, unix.EAGAIN
		}
		return max(n, 0), err
	}
}
