package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	guestv1 "cloister.dev/api/guest/v1"
	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/proc"
	"cloister.dev/internal/host/vm/link"
	"cloister.dev/internal/osutil"
)

// setup is what Setup has done.
type setup struct {
	mu      sync.Mutex
	request *guestv1.SetupRequest // nil: not called yet
	err     error
}

// Setup is part of the service.
func (a *Agent) Setup(ctx context.Context, r *guestv1.SetupRequest) (*guestv1.SetupResponse, error) {
	a.setup.mu.Lock()
	defer a.setup.mu.Unlock()
	if a.setup.request == nil {
		a.setup.request = r
		a.setup.err = a.makePod(context.WithoutCancel(ctx), r)
	}
	if a.setup.err != nil {
		return nil, a.setup.err
	}
	resp := &guestv1.SetupResponse{UptimeMillis: a.began.Sub(bootTime()).Milliseconds()}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		resp.Kernel = unix.ByteSliceToString(u.Release[:])
	}
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
	st, err := a.backend.StartSandbox(ctx, &backend.SandboxSpec{ID: "pod", Dir: runDir, SharePID: true}, func(e proc.Exit) {
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
