package keeper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cloister.dev/internal/host/proc"
)

// Journal gives the exit journal that a keeper of dir writes.
func Journal(dir string) string { return filepath.Join(dir, "exits") }

// maxJournal bounds the exit journal; the older part is kept as exits.old.
const maxJournal = 256 << 10

// SocketFD is where the serving process finds its end of the socket pair.
const SocketFD = 3

// ErrRunning tells that another keeper holds the folder.
var ErrRunning = errors.New("another keeper is running")

// Options say what a keeper keeps alive.
type Options struct {
	Dir  string
	Args []string // of the serving process, with the program's path first
	// Adopt is the pid of a serving process that lost its keeper and started
	// this one; SocketFD connects them. 0: start one.
	Adopt int
	Log   *slog.Logger
}

type keeper struct {
	Options
	lock    *os.File
	journal *os.File
	files   map[string]int
	server  int // pid of the serving process
	quit    atomic.Bool
}

// Run keeps a serving process alive until that one, or ctx, says to end.
func Run(ctx context.Context, o Options) error {
	shrink()
	k := &keeper{Options: o, files: map[string]int{}}
	if err := k.open(); err != nil {
		return err
	}
	defer k.lock.Close()
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become a child subreaper: %w", err)
	}
	// The kernel's memory killer should look elsewhere first; without
	// CAP_SYS_RESOURCE it is not ours to say.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0); err != nil {
		o.Log.Debug("oom_score_adj not lowered", "err", err)
	}
	return k.loop(ctx)
}

// shrink trades speed, of which the keeper needs none, for memory.
func shrink() {
	runtime.GOMAXPROCS(1)
	debug.SetGCPercent(20)
	debug.SetMemoryLimit(8 << 20)
}

func (k *keeper) open() error {
	var err error
	if k.lock, err = os.OpenFile(filepath.Join(k.Dir, "keeper.lock"), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return fmt.Errorf("open the keeper's lock: %w", err)
	}
	if err = unix.Flock(int(k.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		k.lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("%w on %s", ErrRunning, k.Dir)
		}
		return fmt.Errorf("lock %s: %w", k.lock.Name(), err)
	}
	if err = k.lock.Truncate(0); err == nil {
		_, err = k.lock.WriteAt([]byte(strconv.Itoa(os.Getpid())), 0)
	}
	if err == nil {
		k.journal, err = os.OpenFile(Journal(k.Dir), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	}
	if err != nil {
		k.lock.Close()
		return fmt.Errorf("open the keeper's files: %w", err)
	}
	return nil
}

const (
	healthyLife = 300 * time.Millisecond // a server that lived so long gets a successor at once
	maxBackoff  = time.Second
)

func (k *keeper) loop(ctx context.Context) error {
	chld := make(chan os.Signal, 1)
	signal.Notify(chld, unix.SIGCHLD)
	defer signal.Stop(chld)
	var backoff time.Duration
	for {
		began := time.Now()
		ended, err := k.begin()
		if err != nil {
			k.Log.Error("serving process not started", "err", err)
		} else {
			debug.FreeOSMemory()
			k.attend(ctx, chld, ended)
			k.Log.Log(ctx, k.endLevel(), "serving process ended", "pid", k.server, "lived", time.Since(began).Round(time.Millisecond))
		}
		if k.quit.Load() {
			return nil
		}
		if time.Since(began) > healthyLife {
			backoff = 0
		} else {
			backoff = min(max(2*backoff, 10*time.Millisecond), maxBackoff)
		}
		k.pause(ctx, chld, backoff)
		if k.quit.Load() || ctx.Err() != nil {
			return nil
		}
	}
}

func (k *keeper) endLevel() slog.Level {
	if k.quit.Load() {
		return slog.LevelInfo
	}
	return slog.LevelError
}

// pause waits before a restart and goes on reaping.
func (k *keeper) pause(ctx context.Context, chld <-chan os.Signal, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	for {
		select {
		case <-chld:
			k.reap()
		case <-ctx.Done():
			return
		case <-t.C:
			return
		}
	}
}

// attend reaps orphans until the serving process has gone and all that it
// sent is handled.
func (k *keeper) attend(ctx context.Context, chld <-chan os.Signal, ended <-chan struct{}) {
	stop := ctx.Done()
	for {
		k.reap()
		select {
		case <-chld:
		case <-stop:
			stop = nil
			k.Log.Info("keeper told to end", "server", k.server)
			_ = unix.Kill(k.server, unix.SIGTERM)
			k.quit.Store(true)
		case <-ended:
			k.reap()
			return
		}
	}
}

func (k *keeper) reap() {
	for {
		pid, exit, ok := proc.Peek()
		if !ok {
			return
		}
		if pid != k.server {
			k.record(pid, exit)
		}
		proc.Reap(pid)
	}
}

func (k *keeper) record(pid int, exit proc.Exit) {
	st, err := proc.ReadStat(pid)
	if err == nil {
		if fi, e := k.journal.Stat(); e == nil && fi.Size() > maxJournal {
			k.turn()
		}
		err = proc.AppendRecord(k.journal, proc.Record{Pid: pid, Start: st.Start, Exit: exit})
	}
	if err != nil {
		k.Log.Error("exit of an orphan not journaled", "pid", pid, "status", exit.Status, "err", err)
	}
}

// turn begins a new journal.
func (k *keeper) turn() {
	if err := os.Rename(Journal(k.Dir), Journal(k.Dir)+".old"); err != nil {
		k.Log.Warn("exit journal not turned", "err", err)
		return
	}
	f, err := os.OpenFile(Journal(k.Dir), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		k.Log.Warn("new exit journal not opened", "err", err)
		return
	}
	k.journal.Close()
	k.journal = f
}

// begin gives the keeper a serving process: its own, or the first time the
// one that it shall adopt.
func (k *keeper) begin() (ended <-chan struct{}, err error) {
	if k.Adopt == 0 {
		return k.serve()
	}
	k.server, k.Adopt = k.Adopt, 0
	unix.CloseOnExec(SocketFD)
	k.Log.Info("serving process adopted", "pid", k.server)
	c := make(chan struct{})
	go k.receive(SocketFD, c)
	return c, nil
}

// serve starts the serving process and gives it the files. ended is closed
// when its end of the socket is closed and everything it sent was handled.
func (k *keeper) serve() (ended <-chan struct{}, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	attr := &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2, uintptr(pair[1])}}
	k.server, err = syscall.ForkExec(k.Args[0], k.Args, attr)
	if errors.Is(err, unix.ENOENT) { // removed by an upgrade: go on with what we are
		k.server, err = syscall.ForkExec("/proc/self/exe", k.Args, attr)
	}
	unix.Close(pair[1])
	if err != nil {
		unix.Close(pair[0])
		return nil, fmt.Errorf("run %s: %w", k.Args[0], err)
	}
	k.Log.Info("serving process started", "pid", k.server, "files", len(k.files))
	k.giveBack(pair[0])
	c := make(chan struct{})
	go k.receive(pair[0], c)
	return c, nil
}

func (k *keeper) giveBack(sock int) {
	for name, fd := range k.files {
		if err := send(sock, opFile, name, fd); err != nil {
			k.Log.Error("file not given back", "name", name, "err", err)
			return
		}
	}
	if err := send(sock, opReady, "", -1); err != nil {
		k.Log.Error("serving process does not listen", "err", err)
	}
}

// receive handles messages until the other end is closed. Between calls of
// serve it is the only one that touches files.
func (k *keeper) receive(sock int, done chan<- struct{}) {
	defer close(done)
	defer unix.Close(sock)
	buf, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*4))
	for {
		op, name, fd, err := receive(sock, buf, oob)
		if err != nil {
			if errors.Is(err, errCut) {
				k.Log.Error("message of the serving process lost", "err", err)
				continue
			}
			if !errors.Is(err, errClosed) && !errors.Is(err, unix.ECONNRESET) {
				k.Log.Error("messages of the serving process lost", "err", err)
			}
			return
		}
		k.handle(op, name, fd)
	}
}

func (k *keeper) handle(op byte, name string, fd int) {
	switch op {
	case opPut:
		if fd < 0 {
			return
		}
		k.drop(name)
		k.files[name] = fd
		return
	case opDrop:
		k.drop(name)
	case opClear:
		for n := range k.files {
			if strings.HasPrefix(n, name) {
				k.drop(n)
			}
		}
	case opQuit:
		k.quit.Store(true)
	}
	if fd >= 0 {
		unix.Close(fd)
	}
}

func (k *keeper) drop(name string) {
	if fd, ok := k.files[name]; ok {
		unix.Close(fd)
		delete(k.files, name)
	}
}
