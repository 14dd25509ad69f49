package vm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/proc"
	"cloister.dev/internal/host/vm/machine"
)

// probedKVM is what a probe of KVM found.
type probedKVM struct {
	done chan struct{} // closed when err is final
	err  error         // nil: it boots guests
}

// chooseAccel decides on an accelerator: KVM where it boots this guest, TCG
// where the configuration allows that.
func (b *Backend) chooseAccel(ctx context.Context, c machine.Config, accel string) (string, error) {
	switch accel {
	case machine.TCG:
		return machine.TCG, nil
	case machine.KVM, "auto":
	default:
		return "", fmt.Errorf("accel %q: want kvm, tcg or auto: %w", accel, errdefs.ErrInvalidArgument)
	}
	err := b.kvm(ctx, c)
	switch {
	case err == nil:
		return machine.KVM, nil
	case ctx.Err() != nil:
		return "", err
	case accel == "auto":
		return machine.TCG, nil
	}
	return "", fmt.Errorf("KVM boots no guest on this machine: %w; enable hardware virtualization, or allow emulation, which is slow, with accel = \"auto\": %w",
		err, errdefs.ErrFailedPrecondition)
}

// kvm tells, from one probe for each QEMU, guest and machine type, why KVM does
// not work.
func (b *Backend) kvm(ctx context.Context, c machine.Config) error {
	key := strings.Join([]string{c.QEMU, c.Kernel, c.Type}, "\x00")
	b.mu.Lock()
	p := b.probes[key]
	if p == nil {
		p = &probedKVM{done: make(chan struct{})}
		b.probes[key] = p
		b.workers.Go(func() {
			p.err = b.probeKVM(c)
			close(p.done)
		})
	}
	b.mu.Unlock()
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return fmt.Errorf("wait for the probe of KVM: %w", ctx.Err())
	}
}

func (b *Backend) probeKVM(c machine.Config) error {
	c.ID = probePrefix + "kvm-" + unique()
	c.Dir = b.shortDir(c.ID)
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return fmt.Errorf("make the probe's folder: %w", err)
	}
	defer os.RemoveAll(c.Dir)
	_, err := machine.ProbeKVM(b.ctx, b.reaper, c)
	b.log.Info("KVM probed", "qemu", c.QEMU, "kernel", c.Kernel, "type", c.Type, "err", err)
	return err
}

func unique() string {
	var b [6]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// The machine that a probe boots: its hostname, and how its sandbox's ID begins,
// which is no pod's.
const (
	probeName   = "probe"
	probePrefix = "cloister.probe-"
)

// Probe is part of backend.Backend: it boots a machine and has it
// made ready for containers.
func (b *Backend) Probe(ctx context.Context, r *hostv1.ProbeRequest) (*hostv1.ProbeResponse, error) {
	// Close breaks a probe off and waits until its machine is gone.
	b.workers.Add(1)
	defer b.workers.Done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(b.ctx, cancel)()
	machine.Warm()
	began := time.Now()
	id := probePrefix + unique()
	dir := b.sandboxDir(id)
	spec := &backend.SandboxSpec{ID: id, Dir: dir, Extra: r.GetExtra().GetValue(), Hostname: probeName}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the probe's folder: %w", err)
	}
	defer os.RemoveAll(dir)
	st, err := b.StartSandbox(ctx, spec, func(proc.Exit) {})
	if err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("probe virtual machines: %w", err)
		}
		return &hostv1.ProbeResponse{Reason: err.Error()}, nil
	}
	resp := &hostv1.ProbeResponse{Works: true, OciVersion: guestVersion, RecursiveReadOnly: true, Millis: uint32(time.Since(began).Milliseconds())}
	s, err := b.sandbox(ctx, id)
	if err == nil {
		rec := s.record()
		resp.Path = rec.Machine.Type + "/" + rec.Accel
		resp.Version = "Linux " + strings.Trim(rec.Kernel, `"`)
		err = s.prepareContainers(ctx)
	}
	if err != nil {
		resp.Works, resp.Reason = false, err.Error()
	}
	if err := b.StopSandbox(ctx, spec, st.Process); err != nil {
		return nil, fmt.Errorf("end the probe's machine: %w", err)
	}
	return resp, nil
}
