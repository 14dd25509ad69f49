package machine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cloister.dev/internal/host/proc"
	"cloister.dev/internal/osutil"
)

// Files in a machine's folder.
const (
	socketFile = "qmp.sock"
	pidFile    = "qemu.pid"
	logFile    = "qemu.log" // what QEMU itself complains about
)

// qemu is a machine that QEMU runs.
//
// Lock order: resize, then mu. Neither is held while QEMU is asked something,
// but for resize, which exists to keep the steps of one change together.
type qemu struct {
	reaper *proc.Reaper
	mon    *monitor

	resize chan struct{}

	done  chan struct{} // closed with exit set
	grave chan struct{} // closed when the guest has ended and QEMU holds it

	mu      sync.Mutex
	state   State
	console []byte
	reason  string // why the guest ended, as QEMU tells
	exit    Exit
}

// greetTime bounds the wait for QEMU's first word.
const greetTime = 20 * time.Second

func startQEMU(ctx context.Context, reaper *proc.Reaper, c Config) (_ Machine, err error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	var undo osutil.Undo
	defer undo.Run(ctx, &err)
	qmp, err := listen(filepath.Join(c.Dir, socketFile))
	if err != nil {
		return nil, fmt.Errorf("machine %s: %w", c.ID, err)
	}
	defer qmp.Close()
	undo.Add("remove the machine's files", func(context.Context) error { return removeFiles(c.Dir) })
	log, err := os.Create(filepath.Join(c.Dir, logFile))
	if err != nil {
		return nil, err
	}
	defer log.Close()

	m := newQEMU(reaper, State{ID: c.ID, Type: c.Type, Dir: c.Dir, Size: c.Size, Max: c.MaxSize, Base: c.Size.Memory})
	a := c.commandLine(qmp, hostTSC())
	pid, err := reaper.Start(proc.Command{Path: c.QEMU, Args: append([]string{c.QEMU}, a.args...), Env: []string{"LC_ALL=C", "PATH=/usr/bin:/bin"}, Dir: "/",
		Files: [3]*os.File{nil, log, log}, Extra: a.files, Sys: &syscall.SysProcAttr{Setsid: true}, Cgroups: c.Cgroups}, m.exited)
	if err != nil {
		return nil, fmt.Errorf("machine %s: start QEMU: %w", c.ID, err)
	}
	m.mu.Lock()
	m.state.Pid = pid
	if st, err := proc.ReadStat(pid); err == nil {
		m.state.Start = st.Start
	}
	m.mu.Unlock()
	undo.Add("kill QEMU", m.Kill)
	if err := m.connect(ctx); err != nil {
		return nil, fmt.Errorf("machine %s: %w%s", c.ID, err, complaint(c.Dir))
	}
	undo.Release()
	return m, nil
}

func newQEMU(reaper *proc.Reaper, s State) *qemu {
	return &qemu{reaper: reaper, state: s, resize: make(chan struct{}, 1), done: make(chan struct{}), grave: make(chan struct{})}
}

// listen makes the socket before QEMU exists: whoever connects is served as
// soon as QEMU can, and nobody has to ask again and again.
func listen(path string) (*os.File, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen for QEMU's control: %w", err)
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, err
	}
	return l.File()
}

func removeFiles(dir string) error {
	var errs []error
	for _, name := range [...]string{socketFile, pidFile, logFile} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// complaint is what QEMU wrote before it ended, for an error.
func complaint(dir string) string {
	b, err := os.ReadFile(filepath.Join(dir, logFile))
	b = bytes.TrimSpace(b)
	if err != nil || len(b) == 0 {
		return ""
	}
	return "; QEMU says: " + string(b[max(0, len(b)-2000):])
}

// connect waits for QEMU, or for its end.
func (m *qemu) connect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, greetTime)
	defer cancel()
	go func() {
		select {
		case <-m.done:
			cancel()
		case <-ctx.Done():
		}
	}()
	mon, err := openMonitor(ctx, filepath.Join(m.state.Dir, socketFile), m.event)
	if err != nil {
		select {
		case <-m.done:
			return fmt.Errorf("QEMU ended at once: %s: %w", m.Exit().Reason, errdefs.ErrUnavailable)
		default:
			return err
		}
	}
	m.mon = mon
	go m.bury() //nolint:gosec // it outlives the request, and ends with QEMU
	return nil
}

func attachQEMU(ctx context.Context, reaper *proc.Reaper, s State, held *os.File) (Machine, error) {
	m := newQEMU(reaper, s)
	if s.Pid == 0 {
		b, err := os.ReadFile(filepath.Join(s.Dir, pidFile))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("machine %s: %w", s.ID, err)
		}
		pid, _ := strconv.Atoi(strings.TrimSpace(string(b)))
		st, err := proc.ReadStat(pid)
		if pid <= 0 || err != nil || !isOurs(pid, s.Dir) {
			m.exited(proc.UnknownExit())
			return m, nil //nolint:nilerr // it has gone, which the machine tells
		}
		m.state.Pid, m.state.Start = pid, st.Start
	}
	if pidfd := reaper.Resume(m.state.Pid, m.state.Start, held, m.exited); pidfd != nil && held == nil {
		pidfd.Close()
	}
	if m.ended() {
		return m, nil
	}
	if err := m.connect(ctx); err != nil {
		if m.endsSoon(ctx) {
			return m, nil
		}
		return nil, fmt.Errorf("machine %s: take up QEMU, process %d: %w", s.ID, m.state.Pid, err)
	}
	if err := m.look(ctx); err != nil && !m.endsSoon(ctx) {
		m.Close()
		return nil, fmt.Errorf("machine %s: %w", s.ID, err)
	}
	return m, nil
}

// isOurs tells whether a process is the QEMU of a folder: a pid from a file
// may long belong to somebody else.
func isOurs(pid int, dir string) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
	return err == nil && bytes.Contains(b, []byte("\x00"+filepath.Join(dir, pidFile)+"\x00"))
}

// look finds out what happened while nobody was attached.
func (m *qemu) look(ctx context.Context) error {
	b, err := m.mon.run(ctx, command{Name: "query-status"})
	if err != nil {
		return err
	}
	var st struct {
		Status string `json:"status"`
	}
	if err := json.Unmarshal(b, &st); err != nil {
		return fmt.Errorf("read QEMU's status: %w", err)
	}
	switch st.Status {
	case "shutdown":
		m.over("the guest ended")
	case "guest-panicked":
		m.over("the guest's kernel panicked")
	case "internal-error", "io-error":
		m.over("QEMU stopped the guest: " + st.Status)
	}
	return nil
}

// event is told what QEMU reports.
func (m *qemu) event(e event) {
	switch e.Event {
	case "GUEST_PANICKED":
		m.over("the guest's kernel panicked")
	case "SHUTDOWN":
		var d struct {
			Reason string `json:"reason"`
		}
		_ = json.Unmarshal(e.Data, &d) // an unknown reason is told as none
		switch d.Reason {
		case "guest-shutdown":
			m.over("the guest powered off")
		case "guest-reset":
			m.over("the guest's kernel restarted, as it does after a panic")
		case "guest-panic":
			m.over("the guest's kernel panicked")
		case "host-signal", "host-qmp-quit":
			m.over("QEMU was asked to end")
		default:
			m.over("the guest ended: " + d.Reason)
		}
	}
}

// over notes that the guest has ended; the first reason counts.
func (m *qemu) over(reason string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.reason == "" {
		m.reason = reason
		close(m.grave)
	}
}

// bury reads the console of a guest that has ended and ends QEMU.
func (m *qemu) bury() {
	select {
	case <-m.grave:
	case <-m.mon.ended:
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), commandTime)
	defer cancel()
	m.Console(ctx)
	_ = m.signal(unix.SIGKILL) // gone is what it shall be
}

// exited is told of QEMU's end, once.
func (m *qemu) exited(e proc.Exit) {
	m.mu.Lock()
	m.exit = Exit{Exit: e, Reason: m.reason}
	switch {
	case m.reason != "":
	case e.Unknown:
		m.exit.Reason = "QEMU has gone, and nobody saw how"
	case e.Status > 128:
		m.exit.Reason = fmt.Sprintf("QEMU was killed by signal %d (%s)", e.Status-128, unix.SignalName(unix.Signal(e.Status-128)))
	default:
		m.exit.Reason = fmt.Sprintf("QEMU ended with status %d", e.Status)
	}
	m.mu.Unlock()
	close(m.done)
}

func (m *qemu) ended() bool {
	select {
	case <-m.done:
		return true
	default:
		return false
	}
}

// endTime is how long a process that serves no more may take to be gone.
const endTime = 2 * time.Second

// endsSoon tells whether QEMU has ended: its sockets close a little before.
func (m *qemu) endsSoon(ctx context.Context) bool {
	limit := time.NewTimer(endTime)
	defer limit.Stop()
	select {
	case <-m.done:
		return true
	case <-limit.C:
	case <-ctx.Done():
	}
	return m.ended()
}

func (m *qemu) State() State {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state
}

func (m *qemu) Done() <-chan struct{} { return m.done }

func (m *qemu) Exit() Exit {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.exit
}

func (m *qemu) signal(sig unix.Signal) error {
	err := proc.Signal(m.state.Pid, m.state.Start, sig)
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

func (m *qemu) Kill(ctx context.Context) error {
	if m.ended() {
		return removeFiles(m.state.Dir)
	}
	if err := m.signal(unix.SIGKILL); err != nil {
		return fmt.Errorf("kill machine %s: %w", m.state.ID, err)
	}
	select {
	case <-m.done:
		return removeFiles(m.state.Dir)
	case <-ctx.Done():
		return fmt.Errorf("wait for the end of machine %s: %w", m.state.ID, ctx.Err())
	}
}

func (m *qemu) Close() {
	if m.mon != nil {
		m.mon.close()
	}
}

func (m *qemu) Pause(ctx context.Context) error  { return m.do(ctx, "stop") }
func (m *qemu) Resume(ctx context.Context) error { return m.do(ctx, "cont") }

func (m *qemu) do(ctx context.Context, name string) error {
	_, err := m.ask(ctx, command{Name: name})
	return err
}

// ask runs commands on a machine that has not ended.
func (m *qemu) ask(ctx context.Context, cs ...command) (json.RawMessage, error) {
	if m.mon == nil {
		return nil, fmt.Errorf("machine %s has ended: %w", m.state.ID, errdefs.ErrUnavailable)
	}
	b, err := m.mon.run(ctx, cs...)
	if err != nil {
		return b, fmt.Errorf("machine %s: %w", m.state.ID, err)
	}
	return b, nil
}

// Console drains QEMU's own buffer into ours: reading takes it away there.
func (m *qemu) Console(ctx context.Context) []byte {
	var fresh []byte
	if m.mon != nil {
		b, err := m.mon.run(ctx, command{Name: "ringbuf-read", Args: map[string]any{"device": consoleID, "size": ConsoleSize, "format": "base64"}})
		if err == nil {
			_ = json.Unmarshal(b, &fresh) // what is no text leaves fresh empty
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.console = append(m.console, fresh...)
	if extra := len(m.console) - ConsoleSize; extra > 0 {
		m.console = append([]byte(nil), m.console[extra:]...)
	}
	return bytes.Clone(m.console)
}

// LastLines gives the last n lines of a console for people: printable
// characters only, for they come from a hostile place.
func LastLines(console []byte, n int) []string {
	text := strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || r >= ' ' && r < 0x7f {
			return r
		}
		return -1
	}, string(console))
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return lines[max(0, len(lines)-n):]
}
