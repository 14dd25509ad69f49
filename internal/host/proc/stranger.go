package proc

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"cloister.dev/internal/osutil"
)

// WatchStranger tells the end of a process that is not our child. It takes
// its own copy of pidfd.
func (r *Reaper) WatchStranger(pid int, start uint64, pidfd *os.File, exited func(Exit)) {
	own, err := osutil.Dup(pidfd)
	r.strangers.Add(1)
	go func() {
		defer r.strangers.Done()
		if err != nil {
			r.log.Error("process cannot be watched", "pid", pid, "err", err)
			exited(UnknownExit())
			return
		}
		defer own.Close()
		exited(r.awaitStranger(own, pid, start))
	}()
}

func (r *Reaper) awaitStranger(pidfd *os.File, pid int, start uint64) Exit {
	rc, err := pidfd.SyscallConn()
	if err != nil {
		return UnknownExit()
	}
	var exit Exit
	err = rc.Read(func(fd uintptr) bool {
		if !hasEnded(int(fd)) {
			return false
		}
		exit = r.strangerExit(int(fd), pid, start)
		return true
	})
	if err != nil {
		r.log.Error("process cannot be watched", "pid", pid, "err", err)
		return UnknownExit()
	}
	return exit
}

func hasEnded(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(p, 0)
		if !errors.Is(err, unix.EINTR) {
			return p[0].Revents != 0
		}
	}
}

// strangerExit finds the status of a process that has ended: in a journal of
// whoever reaps it, in /proc as long as nobody reaped it, from the kernel once
// somebody did. Between the last two the process may pass from one state to
// the other, hence the second round.
func (r *Reaper) strangerExit(fd, pid int, start uint64) Exit {
	for range 2 {
		if e, ok := r.Recorded(pid, start); ok {
			return e
		}
		if st, err := ReadStat(pid); err == nil && st.Start == start && st.State == 'Z' {
			return Exit{Status: decodeStatus(st.waitCode), At: time.Now()}
		}
		if s, ok := r.exitInfo(fd); ok {
			return Exit{Status: s, At: time.Now()}
		}
	}
	return UnknownExit()
}

// Recorded looks a process up in the exit journals.
func (r *Reaper) Recorded(pid int, start uint64) (Exit, bool) {
	for _, path := range r.journals {
		if e, ok := FindRecord(path, pid, start); ok {
			return e, true
		}
	}
	return Exit{}, false
}

// Resume watches a process that an earlier life of this program watched.
// held is the pidfd that survived, or nil. exited may be called before Resume
// returns. It gives the pidfd to hold, nil when the process has gone.
func (r *Reaper) Resume(pid int, start uint64, held *os.File, exited func(Exit)) *os.File {
	if held == nil {
		f, err := OpenPidfd(pid)
		if err == nil {
			if st, err := ReadStat(pid); err == nil && st.Start == start {
				held = f
			} else {
				f.Close()
			}
		}
	}
	if held == nil {
		e, ok := r.Recorded(pid, start)
		if !ok {
			e = UnknownExit()
		}
		exited(e)
		return nil
	}
	r.WatchStranger(pid, start, held, exited)
	return held
}
