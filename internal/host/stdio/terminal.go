package stdio

import (
	"context"
	"errors"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Terminal copies a terminal's output to one client, without a log. The
// client's pace is the terminal's; a client that goes away is no longer waited
// for and the output is thrown away.
type Terminal struct {
	master *os.File
	out    *os.File // nil: nobody
	done   chan struct{}
	// moved is when output was last read, or "now" while the client is waited
	// for.
	moved   atomic.Int64
	writing atomic.Bool
}

// StartTerminal begins to copy; it owns out but not master.
func StartTerminal(master, out *os.File) *Terminal {
	t := &Terminal{master: master, out: out, done: make(chan struct{})}
	t.moved.Store(time.Now().UnixNano())
	go t.run()
	return t
}

func (t *Terminal) run() {
	defer close(t.done)
	rc, err := t.master.SyscallConn()
	var buf []byte
	for err == nil {
		n := 0
		var rerr error
		err = rc.Read(func(fd uintptr) bool {
			if buf == nil {
				buf = make([]byte, stdinPortion)
			}
			n, rerr = unix.Read(int(fd), buf)
			if errors.Is(rerr, unix.EAGAIN) {
				buf = nil
				return false
			}
			return !errors.Is(rerr, unix.EINTR)
		})
		t.moved.Store(time.Now().UnixNano())
		if err != nil || rerr != nil || n <= 0 {
			break
		}
		t.write(buf[:n])
	}
	if t.out != nil {
		t.out.Close()
	}
}

func (t *Terminal) write(b []byte) {
	if t.out == nil {
		return
	}
	t.writing.Store(true)
	_, err := t.out.Write(b)
	t.writing.Store(false)
	if err != nil {
		t.out.Close()
		t.out = nil
	}
}

// quietTime is how long a terminal that a background process keeps open must
// say nothing to count as done.
const quietTime = 300 * time.Millisecond

// Drain waits, after its process has ended, until the client has got all
// output.
func (t *Terminal) Drain(ctx context.Context) {
	tick := time.NewTicker(quietTime / 6)
	defer tick.Stop()
	for {
		select {
		case <-t.done:
			return
		case <-ctx.Done():
			return
		case now := <-tick.C:
			if !t.writing.Load() && now.UnixNano()-t.moved.Load() > int64(quietTime) {
				return
			}
		}
	}
}
