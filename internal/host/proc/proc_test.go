package proc

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestParseStat(t *testing.T) {
	rest := " Z 7 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4711 0 0 18446744073709551615 0 0 0 0 0 0 0 0 0 0 0 0 17 1 0 0 0 0 0 0 0 0 0 0 0 0 768\n"
	for _, name := range []string{"sh", "a b", "x) Z 9 (y", ""} {
		s, err := parseStat([]byte("12 (" + name + ")" + rest))
		if err != nil || s.State != 'Z' || s.PPid != 7 || s.Start != 4711 || decodeStatus(s.waitCode) != 3 {
			t.Errorf("%q: %+v %v", name, s, err)
		}
	}
	for _, bad := range []string{"", "12 (sh) Z", "12 sh Z 1", "12 (sh) Z x" + rest[4:]} {
		if s, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q: %+v", bad, s)
		}
	}
}

func TestJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "exits")
	if _, ok := FindRecord(path, 1, 2); ok {
		t.Error("found in a journal that does not exist")
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at := time.Unix(1000, 5)
	for _, r := range []Record{{1, 2, Exit{Status: 3, At: at}}, {1, 9, Exit{Status: 4, At: at}}, {5, 2, Exit{Status: 137, At: at}}} {
		if err := AppendRecord(f, r); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.WriteString("7 2 1"); err != nil { // torn
		t.Fatal(err)
	}
	for _, c := range []struct {
		pid    int
		start  uint64
		status int
		ok     bool
	}{{1, 2, 3, true}, {1, 9, 4, true}, {1, 0, 4, true}, {5, 2, 137, true}, {5, 3, 0, false}, {7, 2, 0, false}} {
		if e, ok := FindRecord(path, c.pid, c.start); ok != c.ok || e.Status != c.status || ok && !e.At.Equal(at) {
			t.Errorf("%+v: %+v %v", c, e, ok)
		}
	}
}

// TestStranger watches a process as after a crash: somebody else reaps it.
func TestStranger(t *testing.T) {
	dir := t.TempDir()
	r := &Reaper{log: slog.New(slog.DiscardHandler), watched: map[int]func(Exit){}, early: map[int]Exit{}, journals: []string{filepath.Join(dir, "none")}, exitInfo: exitInfo}
	for _, c := range []struct {
		script string
		signal unix.Signal
		status int
	}{{"exec sleep 60", unix.SIGKILL, 137}, {"exec sleep 60", unix.SIGTERM, 143}, {"read x; exit 42", 0, 42}} {
		cmd := exec.Command("sh", "-c", c.script)
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		st, err := ReadStat(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		exited := make(chan Exit, 1)
		pidfd := r.Resume(cmd.Process.Pid, st.Start, nil, func(e Exit) { exited <- e })
		if pidfd == nil {
			t.Fatal("no pidfd")
		}
		if c.signal != 0 {
			if err := Signal(cmd.Process.Pid, st.Start+1, c.signal); err == nil {
				t.Error("signalled a process of another start time")
			}
			if err := Signal(cmd.Process.Pid, st.Start, c.signal); err != nil {
				t.Error(err)
			}
		}
		in.Close()
		select {
		case e := <-exited: // while it is a zombie
			if e.Status != c.status || e.Unknown {
				t.Errorf("%s: %+v", c.script, e)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("the end is not told")
		}
		_ = cmd.Wait()
		// After it was reaped, the kernel tells through the pidfd (Linux 6.15).
		r.Resume(cmd.Process.Pid, st.Start, pidfd, func(e Exit) { exited <- e })
		if e := <-exited; !e.Unknown && e.Status != c.status {
			t.Errorf("%s, reaped: %+v", c.script, e)
		}
		pidfd.Close()
		r.Resume(cmd.Process.Pid, st.Start, nil, func(e Exit) { exited <- e })
		if e := <-exited; !e.Unknown || e.Status != 255 {
			t.Errorf("%s, gone: %+v", c.script, e)
		}
	}
	r.strangers.Wait()
}

// TestCommands runs many short commands, and one past its deadline. It owns
// the process's children, so it is the last test.
func TestZCommands(t *testing.T) {
	r, err := NewReaper(slog.New(slog.DiscardHandler), filepath.Join(t.TempDir(), "own"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	over := make(chan struct{})
	go func() { defer close(over); r.Run(ctx) }()
	defer func() { cancel(); <-over }()
	done := make(chan Exit, 50)
	for i := range cap(done) {
		go func() {
			e, err := r.RunCommand(ctx, Command{Path: "/bin/sh", Args: []string{"sh", "-c", "exit 7"}})
			if err != nil {
				t.Error(i, err)
			}
			done <- e
		}()
	}
	for range cap(done) {
		if e := <-done; e.Status != 7 {
			t.Errorf("%+v", e)
		}
	}
	short, stop := context.WithTimeout(ctx, 20*time.Millisecond)
	defer stop()
	if _, err := r.RunCommand(short, Command{Path: "/bin/sleep", Args: []string{"sleep", "60"}}); err == nil {
		t.Error("a command outlived its deadline")
	}
	// A child that a command leaves behind, already dead when it is adopted.
	birth := r.Birth()
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.RunCommand(ctx, Command{Path: "/bin/sh", Args: []string{"sh", "-c", "(exit 9) & echo $!"}, Files: [3]*os.File{nil, f, nil}}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	pid := 0
	for _, c := range b {
		if c >= '0' && c <= '9' {
			pid = pid*10 + int(c-'0')
		}
	}
	exited := make(chan Exit, 1)
	if _, _, err := r.Adopt(pid, func(e Exit) { exited <- e }); err != nil {
		t.Fatal(err)
	}
	if e := <-exited; e.Status != 9 && !e.Unknown { // sh may have reaped it itself
		t.Errorf("%+v", e)
	}
	birth() // as when the command has ended: what nobody expects is not noted any more
	adoptedEarly(t, r)
}

// adoptedEarly watches a process that becomes our child only later, when the
// command between has ended, on a kernel that tells no status through a pidfd.
func adoptedEarly(t *testing.T, r *Reaper) {
	t.Helper()
	r.exitInfo = func(int) (int, bool) { return 0, false }
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	command := make(chan Exit, 1)
	_, err = r.Start(Command{Path: "/bin/sh", Args: []string{"sh", "-c", "(sleep 0.4; exit 5) >/dev/null & echo $!; sleep 0.2"}, Files: [3]*os.File{nil, write, nil}},
		func(e Exit) { command <- e })
	write.Close()
	if err != nil {
		t.Fatal(err)
	}
	pid := 0
	if _, err := fmt.Fscan(read, &pid); err != nil {
		t.Fatal(err)
	}
	exited := make(chan Exit, 2)
	pidfd, _, err := r.Adopt(pid, func(e Exit) { exited <- e })
	if err != nil {
		t.Fatal(err)
	}
	defer pidfd.Close()
	<-command
	if e := <-exited; e.Status != 5 {
		t.Errorf("%+v, want status 5", e)
	}
	r.strangers.Wait()
	if len(exited) > 0 || len(r.foreign) > 0 {
		t.Errorf("told again %d times, %d still awaited", len(exited), len(r.foreign))
	}
}
