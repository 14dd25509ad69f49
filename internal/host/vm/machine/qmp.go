package machine

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// monitor speaks QMP, QEMU's control protocol: JSON objects, one a line. QEMU
// answers commands in their order, so answers need no matching beyond an id.
//
// mu guards the fields below it and is never held across I/O; turn serializes
// writers.
type monitor struct {
	conn *net.UnixConn
	turn chan struct{}
	// event is called from the reading goroutine and must not call the monitor.
	event func(event)
	ended chan struct{} // closed when the connection has ended

	mu      sync.Mutex
	next    uint64
	pending map[uint64]chan answer
	err     error
}

// command is one QMP command; File travels beside it.
type command struct {
	Name string
	Args any
	File *os.File
}

type answer struct {
	ID     uint64          `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *qmpError       `json:"error"`
}

type event struct {
	Event string          `json:"event"`
	Data  json.RawMessage `json:"data"`
}

// qmpError is QEMU's refusal.
type qmpError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *qmpError) Error() string { return e.Desc }

// Unwrap gives the error a class that others know.
func (e *qmpError) Unwrap() error {
	if e.Class == "DeviceNotFound" {
		return errdefs.ErrNotFound
	}
	return errdefs.ErrUnknown
}

const (
	// maxLine bounds one message of QEMU: the console, in base64, is the longest.
	maxLine = 1 << 20
	// commandTime bounds one command; QEMU answers at once unless it hangs.
	commandTime = 30 * time.Second
)

// openMonitor connects to the socket, waits for the greeting and leaves the
// mode in which only capabilities are negotiated.
func openMonitor(ctx context.Context, path string, on func(event)) (*monitor, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("connect to QEMU: %w", err)
	}
	m := &monitor{conn: c.(*net.UnixConn), turn: make(chan struct{}, 1), event: on, ended: make(chan struct{}), pending: map[uint64]chan answer{}}
	go m.read()
	if _, err := m.run(ctx, command{Name: "qmp_capabilities"}); err != nil {
		m.close()
		return nil, fmt.Errorf("greet QEMU: %w", err)
	}
	return m, nil
}

func (m *monitor) close() {
	m.conn.Close()
	<-m.ended
}

// read hands out answers and events until the connection ends.
func (m *monitor) read() {
	defer close(m.ended)
	lines := bufio.NewScanner(m.conn)
	lines.Buffer(make([]byte, 4096), maxLine)
	var err error
	for err == nil && lines.Scan() {
		err = m.take(lines.Bytes())
	}
	if err == nil {
		err = lines.Err()
	}
	if err == nil {
		err = io.EOF
	}
	m.conn.Close()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err = fmt.Errorf("QEMU's monitor has gone: %w: %w", err, errdefs.ErrUnavailable)
	for _, c := range m.pending {
		close(c)
	}
	m.pending = nil
}

func (m *monitor) take(line []byte) error {
	var msg struct {
		event
		answer
	}
	if err := json.Unmarshal(line, &msg); err != nil {
		return fmt.Errorf("read a message of QEMU: %w", err)
	}
	switch {
	case msg.Event != "":
		m.event(msg.event)
	case msg.Return != nil || msg.Error != nil:
		m.mu.Lock()
		c := m.pending[msg.ID]
		delete(m.pending, msg.ID)
		m.mu.Unlock()
		if c != nil {
			c <- msg.answer
		}
	}
	return nil // the greeting
}

// run executes commands one after the other in one go and gives the answer to
// the last. The first one that is refused is the error; those behind it were
// executed all the same.
func (m *monitor) run(ctx context.Context, cs ...command) (json.RawMessage, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	waits := make([]chan answer, len(cs))
	if err := m.send(ctx, cs, waits); err != nil {
		return nil, err
	}
	var last json.RawMessage
	var failed error
	for i, w := range waits {
		select {
		case a, ok := <-w:
			switch {
			case !ok:
				return nil, m.failure()
			case a.Error != nil && failed == nil:
				failed = fmt.Errorf("QEMU refuses %s: %w", cs[i].Name, a.Error) //nolint:gosec // one wait for each command
			}
			last = a.Return
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for QEMU's answer to %s: %w", cs[i].Name, ctx.Err()) //nolint:gosec // one wait for each command
		}
	}
	return last, failed
}

// send writes the commands and registers who waits for the answers.
func (m *monitor) send(ctx context.Context, cs []command, waits []chan answer) error {
	select {
	case m.turn <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("wait for QEMU's monitor: %w", ctx.Err())
	}
	defer func() { <-m.turn }()
	if d, ok := ctx.Deadline(); ok {
		_ = m.conn.SetWriteDeadline(d) // fails on a closed connection, and so does the write
	}
	for i, c := range cs {
		id, err := m.expect(&waits[i])
		if err != nil {
			return err
		}
		b, err := json.Marshal(struct {
			Execute   string `json:"execute"`
			Arguments any    `json:"arguments,omitempty"`
			ID        uint64 `json:"id"`
		}{c.Name, c.Args, id})
		if err != nil {
			return fmt.Errorf("encode %s: %w", c.Name, err)
		}
		if err := m.write(append(b, '\n'), c.File); err != nil {
			return fmt.Errorf("send %s to QEMU: %w: %w", c.Name, err, errdefs.ErrUnavailable)
		}
	}
	return nil
}

func (m *monitor) expect(wait *chan answer) (uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return 0, m.err
	}
	m.next++
	*wait = make(chan answer, 1)
	m.pending[m.next] = *wait
	return m.next, nil
}

func (m *monitor) write(b []byte, f *os.File) error {
	if f == nil {
		_, err := m.conn.Write(b)
		return err
	}
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var werr error
	err = rc.Control(func(fd uintptr) { _, _, werr = m.conn.WriteMsgUnix(b, unix.UnixRights(int(fd)), nil) })
	return errors.Join(err, werr)
}

func (m *monitor) failure() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}
