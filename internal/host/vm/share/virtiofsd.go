package share

import (
	"bytes"
	"cmp"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cloister.dev/internal/host/proc"
	"cloister.dev/internal/osutil"
)

// Names in a FS's folder.
const (
	rootDir    = "fs"
	socketFile = "virtiofsd.sock"
	logFile    = "virtiofsd.log"
)

// Start makes the folder and runs virtiofsd on it. The machine may connect at
// once: the socket takes connections before virtiofsd does. On error nothing
// is left.
func Start(ctx context.Context, reaper *proc.Reaper, c Config) (_ *FS, err error) {
	var undo osutil.Undo
	defer undo.Run(ctx, &err)
	if !slices.Contains([]string{"", "auto", "always", "never"}, c.Cache) {
		return nil, fmt.Errorf("virtio_fs_cache is %q; there are auto, always and never: %w", c.Cache, errdefs.ErrInvalidArgument)
	}
	args, err := arguments(c)
	if err != nil {
		return nil, fmt.Errorf("virtiofsd: %w", err)
	}
	undo.Add("remove the share", func(context.Context) error { return removeFiles(c.Dir) })
	if err := os.Mkdir(filepath.Join(c.Dir, rootDir), 0o755); err != nil {
		return nil, err
	}
	socket, err := listen(filepath.Join(c.Dir, socketFile))
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	log, err := os.Create(filepath.Join(c.Dir, logFile))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	f := &FS{reaper: reaper, state: State{Dir: c.Dir}, done: make(chan struct{})}
	f.state.Pid, err = reaper.Start(proc.Command{Path: c.Program, Args: append([]string{c.Program}, args...), Env: []string{"LC_ALL=C", "PATH=/usr/bin:/bin"}, Dir: "/",
		Files: [3]*os.File{nil, log, log}, Extra: []*os.File{socket}, Sys: &syscall.SysProcAttr{Setsid: true}, Cgroups: c.Cgroups}, f.exited)
	if err != nil {
		return nil, fmt.Errorf("start virtiofsd: %w", err)
	}
	if st, err := proc.ReadStat(f.state.Pid); err == nil {
		f.state.Start = st.Start
	}
	undo.Release()
	return f, nil
}

func (f *FS) exited(proc.Exit) { close(f.done) }

// Attach takes up a FS that an earlier life of this program started.
func Attach(reaper *proc.Reaper, s State) *FS {
	f := &FS{reaper: reaper, state: s, done: make(chan struct{})}
	if s.Pid == 0 {
		return f
	}
	if pidfd := reaper.Resume(s.Pid, s.Start, nil, f.exited); pidfd != nil {
		pidfd.Close() // the watcher has its own
	}
	return f
}

// maxFiles is what virtiofsd may have open: a file in the guest's cache is an
// open one here.
const maxFiles = 1 << 20

// withoutTrusted is virtiofsd's way to say that there are no trusted attributes.
const withoutTrusted = "xattrmap=:unsupported:all:trusted.:trusted.::ok:all:::"

// arguments speaks the language of the virtiofsd that it is: QEMU's own, in C,
// up to version 7, or the one in Rust that took its place.
func arguments(c Config) ([]string, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil, err
	}
	files := strconv.FormatUint(min(limit.Max, maxFiles), 10)
	cache, root := cmp.Or(c.Cache, "auto"), filepath.Join(c.Dir, rootDir)
	inC, err := writtenInC(c.Program)
	if err != nil {
		return nil, err
	}
	args := []string{"--fd=3", "--rlimit-nofile=" + files}
	if !inC {
		args = append(args, "--shared-dir="+root, "--sandbox=namespace", "--cache="+cache, "--announce-submounts", "--xattr")
		if c.Overlays {
			args = append(args, "--"+withoutTrusted)
		}
		return append(args, c.ExtraArgs...), nil
	}
	if cache == "never" {
		cache = "none"
	}
	if strings.ContainsAny(root, ",\\") {
		return nil, fmt.Errorf("the path %q holds a comma or a backslash, which virtiofsd does not take: %w", root, errdefs.ErrInvalidArgument)
	}
	args = append(args, "-f", "-o", "source="+root+",sandbox=namespace,cache="+cache+",announce_submounts,xattr")
	if c.Overlays {
		args = append(args, "-o", withoutTrusted)
	}
	return append(args, c.ExtraArgs...), nil
}

func writtenInC(program string) (bool, error) {
	f, err := elf.Open(program)
	if err != nil {
		return false, fmt.Errorf("%w; virtiofsd comes with the package qemu-system-common or virtiofsd, and virtio_fs_daemon names it", err)
	}
	defer f.Close()
	libs, err := f.ImportedLibraries()
	return slices.Contains(libs, "libglib-2.0.so.0"), err
}

func listen(path string) (*os.File, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen for the machine: %w", err)
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, err
	}
	return l.File()
}

// stopTime is how long virtiofsd may take to end by itself.
const stopTime = 2 * time.Second

// Stop ends virtiofsd, and with it all mounts. It may be repeated.
func (f *FS) Stop(ctx context.Context) error {
	if f.state.Pid == 0 {
		// It serves one connection: it ends when that ends.
		if c, err := net.Dial("unix", f.Socket()); err == nil {
			c.Close()
		}
		return removeFiles(f.state.Dir)
	}
	err := proc.Signal(f.state.Pid, f.state.Start, unix.SIGTERM)
	if err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("end virtiofsd: %w", err)
	}
	if err == nil {
		if err := f.await(ctx); err != nil {
			return err
		}
	}
	return removeFiles(f.state.Dir)
}

// await waits for virtiofsd's end, and makes it end when it does not.
func (f *FS) await(ctx context.Context) error {
	soft := time.NewTimer(stopTime)
	defer soft.Stop()
	for {
		select {
		case <-f.done:
			return nil
		case <-soft.C:
			if err := proc.Signal(f.state.Pid, f.state.Start, unix.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
				return fmt.Errorf("kill virtiofsd: %w", err)
			}
		case <-ctx.Done():
			return fmt.Errorf("wait for the end of virtiofsd: %w", ctx.Err())
		}
	}
}

// removeFiles takes the folder's own files away; under DIR/fs are empty mount
// points and nothing else.
func removeFiles(dir string) error {
	errs := []error{removeEmpty(filepath.Join(dir, rootDir))}
	for _, name := range [...]string{socketFile, logFile} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// removeEmpty removes folders and empty files. A file with something in it is
// not ours and stays, with an error.
func removeEmpty(path string) error {
	entries, err := os.ReadDir(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		sub := filepath.Join(path, e.Name())
		if e.IsDir() {
			if err := removeEmpty(sub); err != nil {
				return err
			}
			continue
		}
		if info, err := e.Info(); err == nil && info.Size() > 0 {
			return fmt.Errorf("%s is no mount point of ours, and stays: %w", sub, errdefs.ErrFailedPrecondition)
		}
		if err := os.Remove(sub); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) { // Stop may be at it too
		return err
	}
	return nil
}

// Complaint is the end of what virtiofsd wrote, for an error.
func (f *FS) Complaint() string {
	b, err := os.ReadFile(filepath.Join(f.state.Dir, logFile))
	b = bytes.TrimSpace(b)
	if err != nil {
		return ""
	}
	return string(b[max(0, len(b)-1000):])
}
