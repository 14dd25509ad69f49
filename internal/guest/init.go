package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	guestv1 "cloister.dev/api/guest/v1"
	"cloister.dev/internal/host/container"
	"cloister.dev/internal/host/proc"
	"cloister.dev/internal/host/vm/image"
)

// Kernel parameters that the agent reads.
const (
	machineParam = "cloister.machine=" // the machine type
	logParam     = "cloister.log="     // the agent's log level
)

// Init is the first process of a machine. It returns only by turning the
// machine off.
func Init() {
	var level slog.LevelVar
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: &level}))
	err := run(log, &level)
	log.Error("this machine cannot be a pod", "err", err)
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART); err != nil {
		log.Error("the machine does not go off", "err", err)
	}
}

func run(log *slog.Logger, level *slog.LevelVar) error {
	// Until the machine is a pod, which needs a few megabytes, a collection
	// would only make somebody wait for it. See makeReady.
	debug.SetGCPercent(-1)
	began := time.Now()
	if err := mountKernel(); err != nil {
		return err
	}
	if err := checkTimer(); err != nil {
		return err
	}
	// An unreadable level leaves the default.
	_ = level.UnmarshalText([]byte(parameter(logParam)))
	if err := loadModules(parameter(machineParam)); err != nil {
		return err
	}
	if err := answerModprobe(); err != nil {
		return err
	}
	if err := leaveInitialRoot(); err != nil {
		return err
	}
	if err := mountRun(); err != nil {
		return err
	}
	reaper, err := proc.NewReaper(log, runDir+"/exits")
	if err != nil {
		return err
	}
	ctx := context.Background()
	go reaper.Run(ctx)
	ports, err := newPorts(log)
	if err != nil {
		return err
	}
	go ports.run(ctx)
	a := &Agent{log: log, backend: container.New(runDir, reaper, log).WithoutQuickMoves(), ports: ports, reaper: reaper,
		began: began, tasks: map[string]*task{}}
	a.ready = sync.OnceValue(a.makeReady)
	srv, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(a.intercept))
	if err != nil {
		return err
	}
	guestv1.RegisterGuestService(srv, a)
	return srv.Serve(ctx, listener{ports, ctx})
}

// intercept gives errors their gRPC code, and tells how long calls take.
func (a *Agent) intercept(ctx context.Context, unmarshal ttrpc.Unmarshaler, i *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	began := time.Now()
	resp, err := method(ctx, unmarshal)
	a.log.Debug("call", "method", i.FullMethod, "took", time.Since(began), "err", err)
	return resp, errgrpc.ToGRPC(err)
}

// fileSystem is one to mount at start.
type fileSystem struct {
	kind, target string
	flags        uintptr
	data         string
}

func mountAll(all []fileSystem) error {
	for _, m := range all {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.target, m.kind, m.flags, m.data); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return nil
}

const locked = unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV

func mountKernel() error {
	return mountAll([]fileSystem{
		{"proc", "/proc", locked, ""},
		{"sysfs", "/sys", locked, ""},
		{"devtmpfs", "/dev", unix.MS_NOSUID, "mode=755"},
	})
}

// mountRun mounts what the agent itself uses.
func mountRun() error {
	if err := mountAll([]fileSystem{{"tmpfs", "/run", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"}}); err != nil {
		return err
	}
	return os.Mkdir(runDir, 0o755)
}

// leaveInitialRoot makes a second mount of the initial file system the root:
// containers' runtimes pivot their root, which the kernel does not allow from
// the first mount.
func leaveInitialRoot() error {
	const dir = "/run"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/", dir, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind the root: %w", err)
	}
	for _, m := range []string{"/proc", "/sys", "/dev"} {
		if err := unix.Mount(m, dir+m, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", m, err)
		}
	}
	if err := unix.Chdir(dir); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("enter the new root: %w", err)
	}
	return unix.Chdir("/")
}

// checkTimer looks whether a processor has something that wakes it.
func checkTimer() error {
	b, err := os.ReadFile("/sys/devices/system/clockevents/clockevent0/current_device")
	if errors.Is(err, os.ErrNotExist) {
		return nil // a kernel that does not tell
	}
	if err == nil && strings.TrimSpace(string(b)) == "" {
		err = errors.New(NoTimer)
	}
	return err
}

func readContents() (image.Contents, error) {
	var c image.Contents
	b, err := os.ReadFile(image.ContentsPath)
	if err == nil {
		err = json.Unmarshal(b, &c)
	}
	if err != nil {
		return c, fmt.Errorf("read what this guest is made of: %w", err)
	}
	return c, nil
}

// loadModules loads what a machine of this type needs from the start.
func loadModules(machine string) error {
	b, err := os.ReadFile(image.BootPath(machine))
	if err != nil {
		return fmt.Errorf("read which modules this machine needs: %w", err)
	}
	for path := range strings.FieldsSeq(string(b)) {
		if err := loadModule(path); err != nil {
			return err
		}
	}
	return nil
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("load a kernel module: %w", err)
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load %s: %w", path, err)
	}
	return nil
}

// modprobe is where the kernel looks for whoever loads modules that it misses.
const modprobe = "/sbin/modprobe"

// answerModprobe makes this program the one that loads modules.
func answerModprobe() error {
	if err := os.MkdirAll(filepath.Dir(modprobe), 0o755); err != nil {
		return err
	}
	if err := os.Symlink("/init", modprobe); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("let the kernel ask for modules: %w", err)
	}
	return nil
}

// Modprobe loads the module that the kernel asks for, with what it needs. It
// has nothing but the guest's files: not even /proc.
func Modprobe(name string) error {
	c, err := readContents()
	if err != nil {
		return err
	}
	if len(c.Find(name)) == 0 {
		return fmt.Errorf("module %q is not in this guest: %w", name, errdefs.ErrNotFound)
	}
	return loadNamed(c, name)
}

// loadNamed loads a module with what it needs. One that the guest does not
// have is taken to be in its kernel.
func loadNamed(c image.Contents, name string) error {
	for _, file := range c.Find(name) {
		// Loading again does no harm, but the kernel reads the whole file first.
		if _, err := os.Stat("/sys/module/" + strings.TrimSuffix(filepath.Base(file), ".ko")); err == nil {
			continue
		}
		if err := loadModule(file); err != nil {
			return err
		}
	}
	return nil
}

// parameter gives the kernel parameter that begins with prefix.
func parameter(prefix string) string {
	b, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return ""
	}
	for p := range strings.FieldsSeq(string(b)) {
		if v, ok := strings.CutPrefix(p, prefix); ok {
			return v
		}
	}
	return ""
}

var _ net.Listener = listener{}
