package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"

	"golang.org/x/sys/unix"

	"cloister.dev/internal/host"
	"cloister.dev/internal/host/container"
	"cloister.dev/internal/host/keeper"
	"cloister.dev/internal/host/proc"
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

	h, err := host.New(ctx, host.Config{Dir: o.state, Version: version(), Log: o.log, Store: store, Held: held,
		Backend: container.New(o.state, reaper, o.log)})
	if err != nil {
		return err
	}
	l, err := host.Listen(o.state)
	if err != nil {
		return err
	}
	o.log.Info("serving", "socket", host.Socket(o.state), "pid", os.Getpid(), "version", version())
	err = h.Serve(ctx, l)
	if ctx.Err() != nil {
		store.Quit()
	}
	h.Shutdown()
	o.log.Info("no longer serving; tasks run on")
	return err
}

// connect finds the keeper, when it is one that started us.
func connect(o options) (*keeper.Store, map[string]*os.File, error) {
	if t, err := unix.GetsockoptInt(keeper.SocketFD, unix.SOL_SOCKET, unix.SO_TYPE); err != nil || t != unix.SOCK_SEQPACKET {
		o.log.Warn("no keeper: the end of this process may lose output and exits")
		return nil, nil, nil
	}
	return keeper.Connect(keeper.SocketFD, o.log)
}
