package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/proc"
)

// On a hybrid machine cgroup v1 hierarchies stand beside a mounted v2 one.
// Some runtimes refuse that as soon as the v2 hierarchy holds any controller
// (crun 1.8: hugetlb is enough). In a mount namespace without the v2 mount
// they work: for them every invocation gets such a namespace.

const (
	cgroupRoot  = "/sys/fs/cgroup"
	unifiedRoot = "/sys/fs/cgroup/unified"
)

// isHybrid tells whether this is such a machine.
func isHybrid() bool {
	var st unix.Statfs_t
	return unix.Statfs(unifiedRoot, &st) == nil && int64(st.Type) == unix.CGROUP2_SUPER_MAGIC //nolint:unconvert // it is int32 on some architectures
}

// learn finds out, once, whether r needs the v2 hierarchy hidden.
func (b *Backend) learn(ctx context.Context, r *ociRuntime) error {
	r.learn.Lock()
	defer r.learn.Unlock()
	if r.known {
		return nil
	}
	if !isHybrid() {
		r.known = true
		return nil
	}
	_, hide, err := b.firstRun(ctx, r, backend.Runtime{})
	if ctx.Err() != nil {
		return fmt.Errorf("try %s out: %w", r.path, err)
	}
	// A runtime that works in no way says so better when it is really used.
	r.known, r.hideUnified = true, hide
	return nil
}

// runHidden forks cmd from a thread that has its own mount namespace, which
// ends with the thread; the processes that cmd leaves behind keep it.
func (b *Backend) runHidden(ctx context.Context, cmd proc.Command) (exit proc.Exit, err error) {
	type forked struct {
		ended chan proc.Exit
		pid   int
		err   error
	}
	c := make(chan forked, 1)
	go func() {
		// Not unlocked: the thread must not serve anybody else afterwards.
		runtime.LockOSThread()
		f := forked{ended: make(chan proc.Exit, 1)}
		if f.err = hideUnified(); f.err == nil {
			f.pid, f.err = b.reaper.Start(cmd, func(e proc.Exit) { f.ended <- e })
		}
		c <- f
	}()
	f := <-c
	if f.err != nil {
		return proc.Exit{}, f.err
	}
	return b.reaper.Await(ctx, cmd, f.pid, f.ended)
}

// hideUnified gives this thread a mount namespace without the v2 hierarchy.
// Only the cgroup folder's own mount loses its propagation: those of volumes
// and root file systems must keep theirs.
func hideUnified() error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace: %w", err)
	}
	if err := unix.Mount("", cgroupRoot, "", unix.MS_PRIVATE, ""); err != nil && !errors.Is(err, unix.EINVAL) {
		return &os.PathError{Op: "make private", Path: cgroupRoot, Err: err}
	}
	if err := unix.Unmount(unifiedRoot, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return &os.PathError{Op: "unmount", Path: unifiedRoot, Err: err}
	}
	return nil
}
