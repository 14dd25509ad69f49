package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
)

// gcPercent keeps the agent small: its memory is the pod's.
const gcPercent = 50

// Prepare is part of the service.
func (a *Agent) Prepare(context.Context, *emptypb.Empty) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, a.ready()
}

// makeReady does once what containers need and a pod without them does not.
func (a *Agent) makeReady() (err error) {
	debug.SetGCPercent(gcPercent)
	if a.contents, err = readContents(); err != nil {
		return err
	}
	if err := mountFolders(); err != nil {
		return err
	}
	a.setup.mu.Lock()
	tag, shm := a.setup.request.GetShareTag(), a.setup.request.GetShmBytes()
	a.setup.mu.Unlock()
	if err := mountShm(shm); err != nil {
		return err
	}
	if tag == "" {
		return nil
	}
	// The kernel would ask for it, but a program that it starts takes longer.
	if err := loadNamed(a.contents, "virtiofs"); err != nil {
		return err
	}
	if err := unix.Mount(tag, ShareDir, "virtiofs", 0, ""); err != nil {
		return fmt.Errorf("mount the host's files (virtio-fs %q): %w", tag, err)
	}
	return nil
}

// mountShm mounts the memory that the containers share; 0 bytes are the
// kernel's default, half of all memory.
func mountShm(bytes int64) error {
	options := "mode=1777"
	if bytes > 0 {
		options += fmt.Sprintf(",size=%d", bytes)
	}
	if err := unix.Mount("shm", ShmDir, "tmpfs", locked, options); err != nil {
		return fmt.Errorf("mount shared memory: %w", err)
	}
	return nil
}

// mountFolders mounts what containers need.
func mountFolders() error {
	if err := mountAll([]fileSystem{
		{"devpts", "/dev/pts", unix.MS_NOSUID | unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620,gid=5"},
		{"tmpfs", "/dev/shm", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"tmpfs", "/tmp", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"cgroup2", "/sys/fs/cgroup", locked, "nsdelegate,memory_recursiveprot"},
		{"mqueue", "/dev/mqueue", locked, ""},
	}); err != nil {
		return err
	}
	for _, dir := range []string{tasksDir, ShareDir, ShmDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	for name, to := range map[string]string{"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"} {
		if err := os.Symlink(to, filepath.Join("/dev", name)); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return enableControllers("/sys/fs/cgroup")
}

// enableControllers lets the cgroups of containers have all controllers.
func enableControllers(dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return fmt.Errorf("read the controllers: %w", err)
	}
	names := strings.Fields(string(b))
	if len(names) == 0 {
		return nil
	}
	// All at once, for each change goes over all cgroups.
	if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+strings.Join(names, " +")), 0); err != nil {
		return fmt.Errorf("enable the controllers %s: %w", strings.Join(names, ", "), err)
	}
	return nil
}
