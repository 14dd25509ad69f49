package host

import (
	"context"
	"fmt"
	"net/url"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/stdio"
)

// clientIO names FIFOs that a client made. The process gets them as its
// streams, so nothing is copied and this program may die meanwhile; only a
// terminal needs somebody who copies.
type clientIO struct {
	Stdin    string `json:"stdin,omitempty"`
	Stdout   string `json:"stdout,omitempty"`
	Stderr   string `json:"stderr,omitempty"`
	Terminal bool   `json:"terminal,omitempty"`
}

// childStreams opens the client's FIFOs for a process.
func (c clientIO) childStreams(ctx context.Context) (s backend.Streams, err error) {
	if c.Terminal {
		return backend.Streams{Terminal: true}, nil
	}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.Stdout, err = openOutput(ctx, c.Stdout); err != nil {
		return s, err
	}
	if s.Stderr, err = openOutput(ctx, c.Stderr); err != nil {
		return s, err
	}
	if c.Stdin != "" {
		if s.Stdin, err = stdio.OpenClientInput(c.Stdin); err == nil {
			err = stdio.ForChild(s.Stdin)
		}
	}
	return s, err
}

// openOutput opens what containerd's clients may name: a FIFO, or a file://.
func openOutput(ctx context.Context, name string) (*os.File, error) {
	if name == "" {
		return nil, nil
	}
	if u, err := url.Parse(name); err == nil && u.Scheme != "" && u.Scheme != "fifo" {
		if u.Scheme != "file" {
			return nil, fmt.Errorf("output %q: scheme %s is not supported, use a FIFO or file://: %w", name, u.Scheme, errdefs.ErrNotImplemented)
		}
		return os.OpenFile(u.Path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	}
	f, err := stdio.OpenClientOutput(ctx, name)
	if err != nil {
		return nil, err
	}
	if err := stdio.ForChild(f); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// clientTerminal is a terminal whose client has FIFOs.
type clientTerminal struct {
	master *os.File
	term   *stdio.Terminal
	stdin  *stdio.Stdin
}

func (c clientIO) startTerminal(ctx context.Context, master *os.File) (*clientTerminal, error) {
	ct := &clientTerminal{master: master}
	var out *os.File
	var err error
	if c.Stdout != "" {
		if out, err = stdio.OpenClientOutput(ctx, c.Stdout); err != nil {
			return nil, err
		}
	}
	ct.stdin = stdio.NewStdin(master, false, nil)
	if c.Stdin != "" {
		in, err := stdio.OpenFIFO(c.Stdin, unix.O_RDONLY|unix.O_NONBLOCK)
		if err != nil {
			if out != nil {
				out.Close()
			}
			return nil, err
		}
		ct.stdin.Add(in)
	}
	ct.term = stdio.StartTerminal(master, out)
	return ct, nil
}

func (ct *clientTerminal) close() {
	if ct != nil {
		ct.stdin.Close() // and the master with it
	}
}

func (ct *clientTerminal) resize(width, height uint32) error {
	if ct == nil {
		return resize(nil, width, height)
	}
	return resize(ct.master, width, height)
}
