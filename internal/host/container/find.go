package container

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"

	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/proc"
)

// Find is part of backend.Backend. The runtime that was making the container may
// still be at it, without us: it is recognized by its command line, which
// names the task's own pid file. Once it has ended, that file holds the pid.
func (b *Backend) Find(ctx context.Context, t *backend.TaskSpec, exited func(proc.Exit)) (st backend.Started, found bool, err error) {
	pidFile := filepath.Join(t.Dir, "backend-pid")
	if pid := commandNaming(pidFile); pid != 0 {
		if err := awaitGone(ctx, pid); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return st, false, err
		}
	}
	pid, err := readPid(pidFile)
	if err == nil {
		if s, serr := proc.ReadStat(pid); serr == nil {
			st.Pid, st.Process.Start = pid, s.Start
			if st.Place, err = cgroupOf(pid); err != nil || placeLost(st.Place) {
				st.Place = placeOfSpec(t)
			}
			st.Pidfd = b.reaper.Resume(pid, s.Start, nil, exited)
			return st, true, nil
		}
		// It came into being and has ended. Nobody knows when it began, but
		// the journals' last process of this pid can only be it.
		exit, ok := b.reaper.Recorded(pid, 0)
		if !ok {
			exit = proc.UnknownExit()
		}
		exited(exit)
		return st, true, nil
	}
	return st, false, b.Delete(ctx, t)
}

// commandNaming finds a process with arg among its arguments.
func commandNaming(arg string) int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0
	}
	want := append(append([]byte{0}, arg...), 0)
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err == nil && bytes.Contains(b, want) {
			return pid
		}
	}
	return 0
}
