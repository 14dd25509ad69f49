package shim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// resident is the connection to the one shim process that serves all pods of
// a backend. Its folder holds the socket and everything that the shim needs to
// take its containers up again.
type resident struct {
	dialer
	dir     string
	backend string
	binary  string
	level   string
	log     *slog.Logger
}

// residentStart bounds the time from starting the shim to its first answer.
const residentStart = 10 * time.Second

func newResident(dir, backend string, o Options) *resident {
	r := &resident{dir: dir, backend: backend, binary: o.Binary, level: o.LogLevel, log: o.Log}
	r.connect = r.dialOrStart
	return r
}

func (r *resident) socket() string { return filepath.Join(r.dir, "shim.sock") }

// dialOrStart connects to the running shim. When nobody serves the socket it
// starts a keeper, which does nothing if another one is alive: then the shim
// is just being restarted and answers soon.
func (r *resident) dialOrStart(ctx context.Context) (*conn, error) {
	if c, err := dial(ctx, r.socket()); err == nil {
		return c, nil
	}
	if err := r.start(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, residentStart)
	defer cancel()
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		c, err := dial(ctx, r.socket())
		if err == nil {
			return c, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("no answer from cloister-shim on %s within %v (its log: %s): %w",
				r.socket(), residentStart, r.logFile(), errors.Join(err, ctx.Err()))
		case <-time.After(pause):
		}
	}
}

func (r *resident) logFile() string { return filepath.Join(r.dir, "shim.log") }

func (r *resident) start() error {
	if err := os.MkdirAll(r.dir, 0o711); err != nil {
		return fmt.Errorf("make the shim's folder: %w", err)
	}
	out, err := os.OpenFile(r.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open the shim's log: %w", err)
	}
	defer out.Close()
	cmd := exec.Command(r.binary, "keep", "--state", r.dir, "--backend", r.backend, "--log-level", r.level)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w (it is installed beside the cloister program)", r.binary, err)
	}
	r.log.Info("shim keeper started", "pid", cmd.Process.Pid, "dir", r.dir)
	// The keeper lives on after us; while we live it must not stay a zombie.
	go func() {
		err := cmd.Wait()
		r.log.Info("shim keeper ended", "pid", cmd.Process.Pid, "err", err)
	}()
	return nil
}
