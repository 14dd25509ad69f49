package backend

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/tee"
	"cloister.dev/internal/tee/teec"
)

// TrustZoneOptions describe the memory of an iTrustee TEE as pods see it.
type TrustZoneOptions struct {
	Resource     string
	PrecisionKiB int64 // size of a unit
	ReserveKiB   int64 // of the secure memory, what the TEE itself keeps
	Devices      []string
	Folders      []string // of teecd; folders, so that its restart is seen in them
}

// memory is who is asked for the TEE's memory.
type memory interface {
	Memory(ctx context.Context) (teec.Memory, error)
}

// trustZone offers the secure memory of an iTrustee TEE in units. Nothing ties
// a unit to what a trusted application really takes: the TEE does not say who
// uses how much. So free memory is asked for at every allocation, too.
type trustZone struct {
	o        TrustZoneOptions
	m        tee.Machine
	mem      memory
	settings string // for errors
}

func (t *trustZone) Name() string { return "trustzone" }

func (t *trustZone) Scan(ctx context.Context) ([]tee.Resource, error) {
	m, err := t.mem.Memory(ctx)
	if err != nil {
		return nil, fmt.Errorf("ask the TEE for its memory (%s): %w", t.settings, err)
	}
	usable := m.TotalKiB - t.o.ReserveKiB
	if usable < t.o.PrecisionKiB {
		return nil, fmt.Errorf("the TEE has %d KiB of memory, %d KiB are reserved, and a unit takes %d KiB; lower reserve_kib or precision: %w",
			m.TotalKiB, t.o.ReserveKiB, t.o.PrecisionKiB, errdefs.ErrOutOfRange)
	}
	grant := tee.Grant{Devices: devices(t.m, t.o.Devices...)}
	for _, dir := range t.o.Folders {
		grant.Mounts = append(grant.Mounts, tee.Mount{Host: t.m.Path(dir), Container: dir, ReadOnly: true})
	}
	return []tee.Resource{{
		Name: t.o.Resource, Model: tee.Memory, UnitKiB: t.o.PrecisionKiB,
		Parts: []tee.Part{{Units: int(usable / t.o.PrecisionKiB), Grant: grant}},
	}}, nil
}

// Health looks at what a container would be given.
func (t *trustZone) Health(_ context.Context, found []tee.Resource) []tee.Ailment {
	for _, d := range t.o.Devices {
		if err := t.m.CharDevice(d); err != nil {
			return everything(found, err)
		}
	}
	for _, d := range t.o.Folders {
		if err := t.m.Folder(d); err != nil {
			return everything(found, fmt.Errorf("%w; is teecd running?", err))
		}
	}
	return nil
}

// Allocate refuses what is not free at this moment.
func (t *trustZone) Allocate(ctx context.Context, r tee.Resource, ids []string, _ *tee.Grant) error {
	m, err := t.mem.Memory(ctx)
	if err != nil {
		return fmt.Errorf("ask the TEE for its free memory: %w", err)
	}
	if free := m.FreeKiB / r.UnitKiB; int64(len(ids)) > free {
		return fmt.Errorf("%d units of %d KiB were asked for, but the TEE has %d KiB free: %w",
			len(ids), r.UnitKiB, m.FreeKiB, errdefs.ErrResourceExhausted)
	}
	return nil
}

func (t *trustZone) WatchPaths() []string {
	paths := make([]string, 0, len(t.o.Devices)+len(t.o.Folders))
	for _, p := range append(append(paths, t.o.Devices...), t.o.Folders...) {
		paths = append(paths, t.m.Path(p))
	}
	return paths
}

// Close ends the helper that holds the library.
func (t *trustZone) Close() error {
	if c, ok := t.mem.(interface{ Close() error }); ok {
		return c.Close()
	}
	return nil
}

// everything makes all parts unwell for one reason.
func everything(found []tee.Resource, err error) []tee.Ailment {
	var all []tee.Ailment
	for _, r := range found {
		all = append(all, tee.Ailment{Resource: r.Name, Part: tee.AllParts, Reason: err.Error()})
	}
	return all
}
