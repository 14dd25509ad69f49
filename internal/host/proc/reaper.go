package proc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Reaper owns waitid for this process: nothing else in it may wait for
// children (os/exec must not be used).
//
// mu guards the maps. The loop holds it from finding that a pid is unknown
// until that pid is reaped, so whoever holds mu and can open a pidfd of a
// child knows that the child will still pass through the loop.
type Reaper struct {
	log      *slog.Logger
	journals []string // exit journals of other reapers, asked about strangers
	exitInfo func(pidfd int) (status int, ok bool)

	mu        sync.Mutex
	watched   map[int]func(Exit)
	foreign   map[int]uint64 // watched ones that were not our children then, with their start
	births    int            // commands running that may leave children behind
	early     map[int]Exit
	own       *os.File // journal of early exits
	strangers sync.WaitGroup
}

// NewReaper makes this process a child subreaper and prepares the reaper.
// ownJournal is a file for exits of children whose name nobody knew yet; it
// and journals are asked about strangers.
func NewReaper(log *slog.Logger, ownJournal string, journals ...string) (*Reaper, error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("become a child subreaper: %w", err)
	}
	own, err := os.OpenFile(ownJournal, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the exit journal: %w", err)
	}
	return &Reaper{log: log, own: own, journals: append(journals, ownJournal),
		watched: map[int]func(Exit){}, foreign: map[int]uint64{}, early: map[int]Exit{}, exitInfo: exitInfo}, nil
}

// Run reaps until ctx ends.
func (r *Reaper) Run(ctx context.Context) {
	c := make(chan os.Signal, 1)
	signal.Notify(c, unix.SIGCHLD)
	defer signal.Stop(c)
	for {
		for r.reapOne() {
		}
		select {
		case <-c:
		case <-ctx.Done():
			return
		}
	}
}

// Peek finds a child that has ended and leaves it unreaped.
func Peek() (pid int, exit Exit, ok bool) {
	var info unix.Siginfo
	for {
		err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOWAIT|unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, Exit{}, false
		}
		break
	}
	pid, code, status := siginfoChild(&info)
	if pid == 0 {
		return 0, Exit{}, false
	}
	exit = Exit{Status: status, At: time.Now()}
	if code != cldExited {
		exit.Status = 128 + status
	}
	return pid, exit, true
}

// Reap makes the kernel forget a child that Peek found.
func Reap(pid int) {
	for {
		_, err := unix.Wait4(pid, nil, 0, nil)
		if !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

func (r *Reaper) reapOne() bool {
	pid, exit, ok := Peek()
	if !ok {
		return false
	}
	r.mu.Lock()
	exited := r.watched[pid]
	if exited == nil {
		if r.births > 0 {
			if st, err := ReadStat(pid); err == nil {
				if err := AppendRecord(r.own, Record{pid, st.Start, exit}); err != nil {
					r.log.Error("exit not journaled", "pid", pid, "status", exit.Status, "err", err)
				}
			}
			r.early[pid] = exit
		}
		Reap(pid)
		r.mu.Unlock()
		return true
	}
	delete(r.watched, pid)
	delete(r.foreign, pid)
	r.mu.Unlock()
	exited(exit)
	Reap(pid)
	return true
}

// Birth announces commands that leave children behind. Exits of unknown
// children are remembered until done is called.
func (r *Reaper) Birth() (done func()) {
	r.mu.Lock()
	r.births++
	r.mu.Unlock()
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.births--; r.births > 0 {
			return
		}
		if len(r.early) > 0 {
			clear(r.early)
			if err := r.own.Truncate(0); err != nil {
				r.log.Warn("exit journal not truncated", "err", err)
			}
		}
	}
}

// Adopt watches a child that a command left behind, between Birth and done.
// exited is called once, from the reaping loop, before the child is reaped; it
// must not wait for other processes. start is 0 when the child had already
// gone before anybody could look.
func (r *Reaper) Adopt(pid int, exited func(Exit)) (pidfd *os.File, start uint64, err error) {
	r.mu.Lock()
	pidfd, err = OpenPidfd(pid)
	if err == nil {
		st, serr := ReadStat(pid)
		if serr == nil && st.PPid == os.Getpid() {
			r.watched[pid] = exited
			delete(r.foreign, pid)
			delete(r.early, pid)
			r.mu.Unlock()
			return pidfd, st.Start, nil
		}
		exit, gone := r.early[pid]
		if gone { // the pid belongs to another process by now
			r.mu.Unlock()
			pidfd.Close()
			exited(exit)
			return nil, 0, nil
		}
		if serr != nil {
			r.mu.Unlock()
			pidfd.Close()
			return nil, 0, fmt.Errorf("read the state of process %d: %w", pid, serr)
		}
		told := r.expect(pid, st.Start, exited)
		r.mu.Unlock()
		r.WatchStranger(pid, st.Start, pidfd, told)
		return pidfd, st.Start, nil
	}
	exit, ok := r.early[pid]
	r.mu.Unlock()
	if !errors.Is(err, unix.ESRCH) {
		return nil, 0, err
	}
	if !ok {
		exit = UnknownExit()
	}
	exited(exit)
	return nil, 0, nil
}

// expect prepares for a child's child becoming ours, when the command that
// began it ends: then the loop reaps it, and nobody else could tell its status.
// mu is held. What expect gives is for whoever watches the process meanwhile.
func (r *Reaper) expect(pid int, start uint64, exited func(Exit)) (told func(Exit)) {
	var once sync.Once
	tell := func(e Exit) { once.Do(func() { exited(e) }) }
	r.watched[pid], r.foreign[pid] = tell, start
	return func(e Exit) {
		tell(e)
		r.mu.Lock()
		defer r.mu.Unlock()
		if s, ok := r.foreign[pid]; ok && s == start {
			delete(r.foreign, pid)
			delete(r.watched, pid)
		}
	}
}

// Command is one program to run to its end.
type Command struct {
	Path  string
	Args  []string // with the program's name
	Env   []string
	Dir   string
	Files [3]*os.File // nil is /dev/null
	Extra []*os.File  // descriptors 3 and on
	Sys   *syscall.SysProcAttr
	// Cgroups are folders of cgroups, at most one of each hierarchy, that the
	// program is in from its first instruction on. Empty: this process's own.
	Cgroups []string
}

// Start forks c, on the calling thread unless it names cgroups, and reports
// its end to exited.
func (r *Reaper) Start(c Command, exited func(Exit)) (pid int, err error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	attr := &syscall.ProcAttr{Dir: c.Dir, Env: c.Env, Sys: c.Sys}
	for _, f := range append(c.Files[:], c.Extra...) {
		if f == nil {
			f = null
		}
		attr.Files = append(attr.Files, f.Fd())
	}
	done := r.Birth()
	defer done()
	if pid, err = fork(c, attr); err != nil {
		return 0, fmt.Errorf("run %s: %w", c.Path, err)
	}
	r.mu.Lock()
	if err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT|unix.WNOHANG, nil); errors.Is(err, unix.ECHILD) {
		exit, ok := r.early[pid]
		r.mu.Unlock()
		if !ok {
			exit = UnknownExit()
		}
		exited(exit)
		return pid, nil
	}
	r.watched[pid] = exited
	delete(r.foreign, pid)
	r.mu.Unlock()
	return pid, nil
}

// RunCommand runs c to its end. When ctx ends first, the command is killed and
// awaited, and the context's error is returned.
func (r *Reaper) RunCommand(ctx context.Context, c Command) (Exit, error) {
	if err := ctx.Err(); err != nil {
		return Exit{}, err
	}
	ended := make(chan Exit, 1)
	pid, err := r.Start(c, func(e Exit) { ended <- e })
	if err != nil {
		return Exit{}, err
	}
	return r.Await(ctx, c, pid, ended)
}

// Await waits for a command that Start began and whose exit goes to ended,
// which must be buffered.
func (r *Reaper) Await(ctx context.Context, c Command, pid int, ended <-chan Exit) (Exit, error) {
	select {
	case e := <-ended:
		return e, nil
	case <-ctx.Done():
	}
	r.mu.Lock()
	if r.watched[pid] != nil { // not reaped yet: the pid is still its own
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	r.mu.Unlock()
	<-ended
	return Exit{}, fmt.Errorf("run %s: %w", c.Path, ctx.Err())
}
