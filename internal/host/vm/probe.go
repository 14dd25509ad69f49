package vm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	guestv1 "cloister.dev/api/guest/v1"
	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/host"
	"cloister.dev/internal/host/proc"
	"cloister.dev/internal/host/vm/machine"
)

// probedAccel is what a probe of an accelerator found.
type probedAccel struct {
	works bool
	why   string
}

// chooseAccel decides on an accelerator: KVM where it boots a guest, TCG where
// the configuration allows that.
func (b *Backend) chooseAccel(ctx context.Context, qemu string, o *hostv1.MachineOptions) (string, error) {
	switch o.Accel {
	case machine.TCG:
		return machine.TCG, nil
	case machine.KVM, "auto":
	default:
		return "", fmt.Errorf("accel %q: want kvm, tcg or auto: %w", o.Accel, errdefs.ErrInvalidArgument)
	}
	b.mu.Lock()
	p, known := b.accel[qemu]
	b.mu.Unlock()
	if !known {
		p = b.probeKVM(ctx, qemu, o)
		b.mu.Lock()
		b.accel[qemu] = p
		b.mu.Unlock()
	}
	switch {
	case p.works:
		return machine.KVM, nil
	case o.Accel == "auto":
		return machine.TCG, nil
	}
	return "", fmt.Errorf("KVM does not work on this machine (%s): enable hardware virtualization, or allow emulation, which is slow, with accel = \"auto\": %w",
		p.why, errdefs.ErrFailedPrecondition)
}

// probeName is that of the machine that a probe boots.
const probeName = "probe"

// Probe is part of host.Backend: it boots a machine and asks its agent.
func (b *Backend) Probe(ctx context.Context, r *hostv1.ProbeRequest) (*hostv1.ProbeResponse, error) {
	began := time.Now()
	var unique [6]byte
	_, _ = rand.Read(unique[:]) // never fails
	id := probeName + "-" + hex.EncodeToString(unique[:])
	dir := filepath.Join(b.dir, "sandboxes", id)
	spec := &host.SandboxSpec{ID: id, Dir: dir, Extra: r.GetExtra().GetValue(), Hostname: probeName}
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
		err = s.call(ctx, func(ctx context.Context, g guestv1.GuestService) error {
			_, err := g.Metrics(ctx, nil)
			return err
		})
	}
	if err != nil {
		resp.Works, resp.Reason = false, err.Error()
	}
	if err := b.StopSandbox(ctx, spec, st.Process); err != nil {
		return nil, fmt.Errorf("end the probe's machine: %w", err)
	}
	return resp, nil
}

func (b *Backend) probeKVM(context.Context, string, *hostv1.MachineOptions) probedAccel {
	return probedAccel{why: "not probed"}
}
