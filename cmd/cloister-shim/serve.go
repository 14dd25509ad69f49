package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"cloister.dev/internal/host"
	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/container"
	"cloister.dev/internal/host/keeper"
	"cloister.dev/internal/host/proc"
	"cloister.dev/internal/host/vm"
)

func serve(ctx context.Context, o options) error {
	// Most of what this process does is wait: memory matters more than speed.
	debug.SetGCPercent(50)
	if err := os.MkdirAll(o.state, 0o711); err != nil {
		return fmt.Errorf("make the state folder: %w", err)
	}
	store, held, err := connect(o)
	if err != nil {
		return err
	}
	lock, err := lockServing(ctx, o.state)
	if err != nil {
		return err
	}
	defer lock.Close()
	reaper, err := proc.NewReaper(o.log, filepath.Join(o.state, "exits.serve"), keeper.Journal(o.state), keeper.Journal(o.state)+".old")
	if err != nil {
		return err
	}
	var reaping sync.WaitGroup
	// The reaper must work until the last task is let go, longer than ctx.
	rctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer reaping.Wait()
	defer stop()
	reaping.Go(func() { reaper.Run(rctx) })

	if store != nil {
		g := guard{options: o, ctx: ctx, reaper: reaper, store: store}
		g.watchParent()
	}
	backend, letGo := newBackend(o, reaper)
	defer letGo()
	h, err := host.New(ctx, host.Config{Dir: o.state, Version: version(), Log: o.log, Store: store, Held: held, Backend: backend})
	if err != nil {
		return err
	}
	l, err := host.Listen(o.state)
	if err != nil {
		return err
	}
	o.log.Info("serving", "socket", host.Socket(o.state), "pid", os.Getpid(), "version", version())
	err = h.Serve(ctx, l)
	// Whoever asked this process to end does not want another one.
	store.Quit()
	h.Shutdown()
	o.log.Info("no longer serving; tasks run on")
	return err
}

// newBackend gives the backend and what is to be done at the end.
func newBackend(o options, reaper *proc.Reaper) (backend.Backend, func()) {
	if o.backend == vmBackend {
		b := vm.New(o.state, reaper, o.log)
		return b, b.Close
	}
	return container.New(o.state, reaper, o.log), func() {}
}

// connect finds the keeper, when it is one that started us.
func connect(o options) (*keeper.Store, map[string]*os.File, error) {
	kind, err := unix.GetsockoptInt(keeper.SocketFD, unix.SOL_SOCKET, unix.SO_TYPE)
	if kept := err == nil && kind == unix.SOCK_SEQPACKET; !kept {
		o.log.Warn("no keeper: the end of this process may lose output and exits")
		return nil, nil, nil
	}
	return keeper.Connect(keeper.SocketFD, o.log)
}

// lockTime is how long a killed predecessor may take to be gone.
const lockTime = 5 * time.Second

// lockServing makes sure that one process alone serves a state folder.
func lockServing(ctx context.Context, dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "serve.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the server's lock: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, lockTime)
	defer cancel()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("another process serves %s", dir)
		case <-time.After(5 * time.Millisecond): // a lock cannot be waited for with a deadline
		}
	}
}

// guard starts a new keeper whenever the keeper dies, and hands it what the
// old one held.
type guard struct {
	options
	ctx    context.Context // ends with serving
	reaper *proc.Reaper
	store  *keeper.Store
}

func (g *guard) watchParent() {
	pid := os.Getppid()
	st, err := proc.ReadStat(pid)
	if err != nil {
		g.log.Warn("keeper cannot be watched", "pid", pid, "err", err)
		return
	}
	if pidfd := g.reaper.Resume(pid, st.Start, nil, g.keeperDied); pidfd != nil {
		pidfd.Close()
	}
}

// keeperDied is called from the reaping loop, which must go on meanwhile.
func (g *guard) keeperDied(proc.Exit) {
	if g.ctx.Err() != nil {
		return
	}
	go func() {
		g.log.Error("the keeper died; starting another one")
		if err := g.store.Replace(g.start); err != nil {
			g.log.Error("no new keeper: the end of this process may lose output and exits", "err", err)
		}
	}()
}

func (g *guard) start(socket *os.File) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	args := []string{self, "keep", "--state", g.state, "--backend", g.backend, "--log-level", g.level.String(), "--adopt", strconv.Itoa(os.Getpid())}
	_, err = g.reaper.Start(proc.Command{Path: self, Args: args, Env: os.Environ(), Dir: "/",
		Files: [3]*os.File{nil, os.Stdout, os.Stderr}, Extra: []*os.File{socket}}, g.keeperDied)
	return err
}
