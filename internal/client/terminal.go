package client

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/term"
)

// Terminal is the caller's terminal in raw mode: keys go to the container as
// they are pressed.
type Terminal struct {
	// Sizes has the size at the beginning and after each change.
	Sizes <-chan Size

	fd     int
	before *term.State
	done   chan struct{}
	ended  chan struct{}
}

// IsTerminal tells whether a file is a terminal.
func IsTerminal(f *os.File) bool { return term.IsTerminal(int(f.Fd())) }

// OpenTerminal puts the terminal into raw mode until Restore.
func OpenTerminal(f *os.File) (*Terminal, error) {
	fd := int(f.Fd())
	before, err := term.MakeRaw(fd)
	if err != nil {
		return nil, fmt.Errorf("put the terminal into raw mode: %w (without a terminal, leave -t out)", err)
	}
	sizes := make(chan Size, 2)
	t := &Terminal{Sizes: sizes, fd: fd, before: before, done: make(chan struct{}), ended: make(chan struct{})}
	go t.watch(sizes)
	return t, nil
}

// Restore gives the terminal back as it was found.
func (t *Terminal) Restore() error {
	close(t.done)
	<-t.ended
	return term.Restore(t.fd, t.before)
}

func (t *Terminal) watch(sizes chan<- Size) {
	defer close(t.ended)
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	defer signal.Stop(changed)
	// A shell that drew its prompt before we were attached draws it again
	// when the size changes, so the first size is told as a change.
	first := true
	for {
		if w, h, err := term.GetSize(t.fd); err == nil {
			size := Size{uint16(w), uint16(h)}
			if first && h > 1 {
				t.send(sizes, Size{size.Width, size.Height - 1})
			}
			first = false
			t.send(sizes, size)
		}
		select {
		case <-changed:
		case <-t.done:
			return
		}
	}
}

func (t *Terminal) send(sizes chan<- Size, s Size) {
	select {
	case sizes <- s:
	case <-t.done:
	}
}
