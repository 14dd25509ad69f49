package machine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/host/proc"
)

const (
	// bareProgram and bareMark are package image's: a program that tells that
	// the kernel is up.
	bareProgram = "/bare"
	bareMark    = "cloister: the kernel is up"
	// noRoot is what a kernel says that came up and found no such program.
	noRoot = "Unable to mount root fs"
	// lookPeriod is how often the console is read for it.
	lookPeriod = 2 * time.Millisecond
)

// Bare boots a machine as far as its first program, which does nothing, and
// ends it. It gives the time from the start of QEMU to that program's first
// word: the floor for everything that boots this guest on this machine.
func Bare(ctx context.Context, reaper *proc.Reaper, c Config) (_ time.Duration, err error) {
	c.Params = append(c.Params, "rdinit="+bareProgram)
	began := time.Now()
	m, err := Start(ctx, reaper, c)
	if err != nil {
		return 0, err
	}
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandTime)
		defer cancel()
		err = errors.Join(err, m.Kill(clean))
		m.Close()
	}()
	tick := time.NewTicker(lookPeriod)
	defer tick.Stop()
	for {
		console := m.Console(ctx)
		if bytes.Contains(console, []byte(bareMark)) || bytes.Contains(console, []byte(noRoot)) {
			return time.Since(began), nil
		}
		select {
		case <-tick.C:
		case <-m.Done():
			return 0, fmt.Errorf("the kernel did not come up: %s: %w%s", m.Exit().Reason, errdefs.ErrUnavailable, tail(m.Console(ctx)))
		case <-ctx.Done():
			return 0, fmt.Errorf("the kernel did not come up within %v: %w%s", time.Since(began).Round(time.Second/10), ctx.Err(), tail(console))
		}
	}
}

func tail(console []byte) string {
	text := strings.TrimSpace(strings.Join(LastLines(console, 50), "\n"))
	if text == "" {
		return "; its console is empty"
	}
	return "; its console says:\n" + text
}

// kvmTime is how long a kernel may take to come up with KVM. A machine whose
// KVM works needs a tenth of a second; one whose does not never ends by itself.
const kvmTime = 5 * time.Second

// ProbeKVM boots the guest of c with KVM, whatever c says of accelerator and
// size, and tells how long that took. No error means that its kernel has
// really come up. That a device file is
// there, or that it makes a machine, proves nothing: some hosts offer a KVM
// that no ordinary kernel runs on.
func ProbeKVM(ctx context.Context, reaper *proc.Reaper, c Config) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, kvmTime)
	defer cancel()
	c.Accel, c.Size, c.MaxSize = KVM, Size{CPUs: 1, Memory: 256 << 20}, Size{}
	if took, err = Bare(ctx, reaper, c); err != nil {
		return 0, fmt.Errorf("boot a guest with KVM: %w", err)
	}
	return took, nil
}
