package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	guestv1 "cloister.dev/api/guest/v1"
	"cloister.dev/internal/host"
	"cloister.dev/internal/host/proc"
	"cloister.dev/internal/host/vm/link"
	"cloister.dev/internal/osutil"
)

// gcPercent keeps the agent small: its memory is the pod's.
const gcPercent = 50

// setup is what Setup has done.
type setup struct {
	mu   sync.Mutex
	done bool
	err  error
}

// Setup is part of the service.
func (a *Agent) Setup(ctx context.Context, r *guestv1.SetupRequest) (*guestv1.SetupResponse, error) {
	a.setup.mu.Lock()
	defer a.setup.mu.Unlock()
	if !a.setup.done {
		a.setup.done = true
		a.setup.err = a.makePod(context.WithoutCancel(ctx), r)
		debug.SetGCPercent(gcPercent)
	}
	if a.setup.err != nil {
		return nil, a.setup.err
	}
	resp := &guestv1.SetupResponse{Version: a.version, Cpus: uint32(runtime.NumCPU())}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		resp.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		resp.Memory = int64(info.Totalram) * int64(info.Unit)
	}
	resp.UptimeMillis = a.began.Sub(bootTime()).Milliseconds()
	return resp, nil
}

func bootTime() time.Time {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return time.Now()
	}
	return time.Now().Add(-time.Duration(ts.Nano()))
}

// makePod does everything that is done once.
func (a *Agent) makePod(ctx context.Context, r *guestv1.SetupRequest) error {
	if err := setTime(r.TimeNanos); err != nil {
		return err
	}
	if r.Hostname != "" {
		if err := unix.Sethostname([]byte(r.Hostname)); err != nil {
			return fmt.Errorf("set the hostname: %w", err)
		}
	}
	if r.ShareTag != "" {
		if err := unix.Mount(r.ShareTag, ShareDir, "virtiofs", 0, ""); err != nil {
			return fmt.Errorf("mount the host's files (virtio-fs %q): %w", r.ShareTag, err)
		}
	}
	shm := "mode=1777"
	if r.ShmBytes > 0 {
		shm += fmt.Sprintf(",size=%d", r.ShmBytes)
	}
	if err := unix.Mount("shm", ShmDir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, shm); err != nil {
		return fmt.Errorf("mount shared memory: %w", err)
	}
	var network link.Network
	if len(r.Network) > 0 {
		if err := json.Unmarshal(r.Network, &network); err != nil {
			return fmt.Errorf("read the network: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	if err := applyNetwork(network); err != nil {
		return err
	}
	for name, value := range r.Sysctls {
		if err := setSysctl(name, value); err != nil {
			return err
		}
	}
	if r.SharePid {
		return a.holdPIDs(ctx)
	}
	return nil
}

// holdPIDs makes the PID namespace that the containers share.
func (a *Agent) holdPIDs(ctx context.Context) error {
	st, err := a.backend.StartSandbox(ctx, &host.SandboxSpec{ID: "pod", Dir: runDir, SharePID: true}, func(e proc.Exit) {
		a.log.Error("the holder of the PID namespace ended", "status", e.Status)
	})
	if err != nil {
		return err
	}
	return os.Symlink(fmt.Sprintf("/proc/%d/ns/pid", st.Pid), PodPIDNamespace)
}

func setTime(nanos int64) error {
	if nanos == 0 {
		return nil
	}
	tv := unix.NsecToTimeval(nanos)
	if err := unix.Settimeofday(&tv); err != nil {
		return fmt.Errorf("set the clock: %w", err)
	}
	return nil
}

// SetTime is part of the service.
func (a *Agent) SetTime(_ context.Context, r *guestv1.SetTimeRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, setTime(r.TimeNanos)
}

func setSysctl(name, value string) error {
	path := filepath.Join("/proc/sys", strings.ReplaceAll(name, ".", "/"))
	if !filepath.IsLocal(strings.ReplaceAll(name, ".", "/")) {
		return fmt.Errorf("sysctl %q is no name: %w", name, errdefs.ErrInvalidArgument)
	}
	if err := os.WriteFile(path, []byte(value), 0); errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("sysctl %s does not exist in the guest's kernel: %w: %w", name, err, errdefs.ErrInvalidArgument)
	} else if err != nil {
		return fmt.Errorf("set sysctl %s: %w", name, err)
	}
	return nil
}

func resize(console *os.File, width, height uint32) error {
	if console == nil {
		return fmt.Errorf("the process has no terminal: %w", errdefs.ErrFailedPrecondition)
	}
	if err := osutil.SetWindow(console, width, height); err != nil {
		return fmt.Errorf("resize the terminal: %w", err)
	}
	return nil
}
