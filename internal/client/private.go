package client

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// Private is where a user's own daemon lives: the one that "cloister run"
// starts when none serves the machine.
type Private struct {
	// State is under the user's runtime folder, Root under the user's data.
	State, Root string
}

const (
	privateStartTime = 60 * time.Second
	privateStopTime  = 20 * time.Second
)

// FindPrivate tells where this user's private daemon lives, running or not.
func FindPrivate() (Private, error) {
	uid := strconv.Itoa(os.Getuid())
	runtimeDir := os.Getenv("XDG_RUNTIME_DIR")
	if runtimeDir == "" {
		runtimeDir = filepath.Join("/run/user", uid)
		if _, err := os.Stat(runtimeDir); err != nil {
			runtimeDir = "/run"
		}
	}
	data := os.Getenv("XDG_DATA_HOME")
	if data == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return Private{}, fmt.Errorf("find a place for a private daemon: %w; set XDG_DATA_HOME", err)
		}
		data = filepath.Join(home, ".local", "share")
	}
	return Private{
		State: filepath.Join(runtimeDir, "cloister-private"),
		Root:  filepath.Join(data, "cloister"),
	}, nil
}

// Address is the private daemon's socket.
func (p Private) Address() string { return filepath.Join(p.State, "cloister.sock") }

// LogRoot is where the logs of its pods are.
func (p Private) LogRoot() string { return filepath.Join(p.Root, "logs") }

func (p Private) config() string {
	return fmt.Sprintf(`# Written by "cloister run" for its private daemon.
version = 3
root = %q
state = %q
[cloister]
network = "builtin"
[cloister.builtin_network]
bridge = "cloister-run0"
subnets = ["10.86.0.0/16"]
`, p.Root, p.State)
}

// Daemon is a private daemon that this process started.
type Daemon struct {
	cmd    *exec.Cmd
	exited chan error
	// Log is the file with its messages.
	Log string
}

// Start runs the private daemon and connects to it. When another process was
// faster, Daemon is nil and the connection leads to that one's.
func (p Private) Start(ctx context.Context, program string) (*Conn, *Daemon, error) {
	if os.Geteuid() != 0 {
		return nil, nil, errors.New("a private daemon needs root; run the command with sudo")
	}
	if err := os.MkdirAll(p.State, 0o711); err != nil {
		return nil, nil, fmt.Errorf("start a private daemon: %w", err)
	}
	unlock, err := p.lock()
	if err != nil {
		return nil, nil, fmt.Errorf("start a private daemon: %w", err)
	}
	defer unlock()
	if c, err := Dial(ctx, p.Address()); err == nil {
		return c, nil, nil
	}
	d, err := p.spawn(program)
	if err != nil {
		return nil, nil, fmt.Errorf("start a private daemon: %w", err)
	}
	c, err := d.await(ctx, p.Address())
	if err != nil {
		return nil, nil, errors.Join(err, d.Stop())
	}
	return c, d, nil
}

// lock makes starts of one user's daemon follow each other.
func (p Private) lock() (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(p.State, "start.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() { f.Close() }, nil
}

func (p Private) spawn(program string) (*Daemon, error) {
	config := filepath.Join(p.State, "config.toml")
	if err := os.WriteFile(config, []byte(p.config()), 0o600); err != nil {
		return nil, err
	}
	d := &Daemon{Log: filepath.Join(p.State, "daemon.log"), exited: make(chan error, 1)}
	out, err := os.OpenFile(d.Log, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	d.cmd = exec.Command(program, "daemon", "--config", config, "--ephemeral")
	d.cmd.Stdout, d.cmd.Stderr = out, out
	d.cmd.Dir = "/"
	// A session of its own: a key pressed for the container is not for it.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { d.exited <- d.cmd.Wait() }()
	return d, nil
}

func (d *Daemon) await(ctx context.Context, address string) (*Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, privateStartTime)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if c, err := Dial(ctx, address); err == nil {
			return c, nil
		}
		select {
		case <-tick.C:
		case err := <-d.exited:
			d.exited <- nil // for Stop
			return nil, errors.Join(fmt.Errorf("the private daemon ended at once; its messages are in %s", d.Log), err)
		case <-ctx.Done():
			return nil, fmt.Errorf("the private daemon does not answer at %s: %w; its messages are in %s", address, ctx.Err(), d.Log)
		}
	}
}

// PID of the daemon.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Stop ends the daemon. Pods that it still has go on without it.
func (d *Daemon) Stop() error {
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop the private daemon: %w", err)
	}
	timer := time.NewTimer(privateStopTime)
	defer timer.Stop()
	select {
	case err := <-d.exited:
		if err != nil {
			return fmt.Errorf("the private daemon did not end well: %w; its messages are in %s", err, d.Log)
		}
		return nil
	case <-timer.C:
	}
	if err := d.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill the private daemon: %w", err)
	}
	return errors.Join(fmt.Errorf("the private daemon did not end within %v; its messages are in %s", privateStopTime, d.Log), <-d.exited)
}
