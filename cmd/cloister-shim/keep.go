package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"cloister.dev/internal/host/keeper"
)

func keep(ctx context.Context, o options) error {
	if err := os.MkdirAll(o.state, 0o711); err != nil {
		return fmt.Errorf("make the state folder: %w", err)
	}
	// Away from the terminal and the process group of whoever started us. A
	// process that leads its group already cannot, and need not.
	if _, err := syscall.Setsid(); err != nil && !errors.Is(err, syscall.EPERM) {
		return fmt.Errorf("begin a session: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	// By its path, so that a server started after an upgrade is the new one.
	err = keeper.Run(ctx, keeper.Options{
		Dir:   o.state,
		Args:  []string{self, "serve", "--state", o.state, "--backend", o.backend, "--log-level", o.level.String()},
		Log:   o.log,
		Adopt: o.adopt,
	})
	if errors.Is(err, keeper.ErrRunning) {
		o.log.Info("nothing to do", "reason", err)
		return nil
	}
	return err
}

func stopKeeper(ctx context.Context, o options) error {
	return keeper.Stop(ctx, o.state, o.force)
}
