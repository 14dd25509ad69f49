package keeper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Stop ends the keeper of dir, and with it the serving process. Without force
// it refuses while there are tasks.
func Stop(ctx context.Context, dir string, force bool) error {
	if !force {
		for _, d := range []string{"tasks", "pumps", "sandboxes"} {
			left, err := os.ReadDir(filepath.Join(dir, d))
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("look for tasks: %w", err)
			}
			if len(left) > 0 {
				return fmt.Errorf("%d %s are left in %s; delete them, or use --force to let them run on unattended", len(left), d, dir)
			}
		}
	}
	f, err := os.OpenFile(filepath.Join(dir, "keeper.lock"), os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open the keeper's lock: %w", err)
	}
	defer f.Close()
	for first := true; ; first = false {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return nil // nobody holds it (any more)
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		if first {
			if err := signalHolder(f.Name()); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond): // a lock cannot be waited for with a deadline
		}
	}
}

func signalHolder(lock string) error {
	b, err := os.ReadFile(lock)
	if err != nil {
		return fmt.Errorf("read the keeper's pid: %w", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 1 {
		return fmt.Errorf("%s holds no pid", lock)
	}
	if err := unix.Kill(pid, unix.SIGTERM); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("tell the keeper (pid %d) to end: %w", pid, err)
	}
	return nil
}
