package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	guestv1 "cloister.dev/api/guest/v1"
	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/host/vm/machine"
)

// limits are what a task may use; 0 is without a limit.
type limits struct {
	CPU    float64 `json:"cpu,omitempty"` // processors
	Memory int64   `json:"memory,omitempty"`
}

// change lays the limits that r names over those of a task.
func (l limits) change(r *specs.LinuxResources) limits {
	if r == nil {
		return l
	}
	if m := r.Memory; m != nil && m.Limit != nil {
		l.Memory = max(0, *m.Limit)
	}
	if c := r.CPU; c != nil && c.Quota != nil {
		l.CPU = 0
		if *c.Quota > 0 && c.Period != nil && *c.Period > 0 {
			l.CPU = float64(*c.Quota) / float64(*c.Period)
		}
	}
	return l
}

// maxSizeOf is how far a machine can be resized; zero: not at all.
func maxSizeOf(size machine.Size, o *hostv1.MachineOptions) machine.Size {
	if o.MachineType != machine.Q35 || o.DefaultMaxvcpus == 0 && o.DefaultMaxmemory == 0 {
		return machine.Size{}
	}
	return machine.Size{CPUs: max(size.CPUs, o.DefaultMaxvcpus), Memory: max(size.Memory, int64(o.DefaultMaxmemory)*mib)}
}

// needed is the size that the sum of limits asks for, which is never less than
// what the machine was started with: zero where nothing has a limit.
func needed(all map[string]limits) machine.Size {
	var cpu float64
	var size machine.Size
	for _, l := range all {
		cpu += l.CPU
		size.Memory += l.Memory
	}
	size.CPUs = uint32(min(maxCPUs, math.Ceil(cpu)))
	if size.Memory > 0 {
		size.Memory += guestMemory
		size.Memory -= size.Memory % mib
	}
	return size
}

// limitTask notes the limits of a task that starts. The machine has its size
// from what the client said of the whole pod.
func (s *sandbox) limitTask(task string, r *specs.LinuxResources) error {
	l := limits{}.change(r)
	if l == (limits{}) {
		return nil
	}
	s.sizing.Lock()
	defer s.sizing.Unlock()
	return s.setLimits(task, l)
}

// setLimits notes them; sizing is held.
func (s *sandbox) setLimits(task string, l limits) error {
	return s.update(func(r *record) {
		all := maps.Clone(r.Limits) // readers have the old one
		if all == nil {
			all = map[string]limits{}
		}
		all[task] = l
		r.Limits = all
	})
}

func (s *sandbox) forgetLimits(task string) error {
	s.sizing.Lock()
	defer s.sizing.Unlock()
	if _, ok := s.record().Limits[task]; !ok {
		return nil
	}
	return s.update(func(r *record) {
		r.Limits = maps.Clone(r.Limits)
		delete(r.Limits, task)
	})
}

// resize changes a task's limits: a machine grows before, and gives back
// afterwards what no limit asks for any more. apply changes them in the guest.
func (s *sandbox) resize(ctx context.Context, task string, resources []byte, apply func() error) error {
	var r specs.LinuxResources
	if err := json.Unmarshal(resources, &r); err != nil {
		return fmt.Errorf("read the new limits: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	s.sizing.Lock()
	defer s.sizing.Unlock()
	rec := s.record()
	all := maps.Clone(rec.Limits)
	if all == nil {
		all = map[string]limits{}
	}
	before := needed(all)
	all[task] = all[task].change(&r)
	want := needed(all)
	if grows := want.CPUs > max(before.CPUs, rec.Machine.Size.CPUs) || want.Memory > max(before.Memory, rec.Machine.Size.Memory); grows {
		if err := s.reach(ctx, want); err != nil {
			return err
		}
	}
	if err := apply(); err != nil {
		return err
	}
	if err := s.setLimits(task, all[task]); err != nil {
		return err
	}
	if rec.Machine.Max != (machine.Size{}) && want.Memory < rec.Machine.Size.Memory {
		// What the guest cannot give back now stays the machine's.
		_, err := s.machine().Resize(ctx, machine.Size{CPUs: rec.Machine.Size.CPUs, Memory: want.Memory})
		return s.keepSize(err)
	}
	return nil
}

// reach makes the machine as large as wanted, or tells why it cannot be.
func (s *sandbox) reach(ctx context.Context, want machine.Size) error {
	have := s.record().Machine.Size
	want.CPUs, want.Memory = max(want.CPUs, have.CPUs), max(want.Memory, have.Memory)
	if s.record().Machine.Max == (machine.Size{}) {
		return fmt.Errorf("the pod's virtual machine has %d processors and %d MiB, and %d and %d MiB would be needed: it keeps its size (machine_type = %q with default_maxvcpus and default_maxmemory can grow): %w",
			have.CPUs, have.Memory/mib, want.CPUs, want.Memory/mib, machine.Q35, errdefs.ErrFailedPrecondition)
	}
	// The guest's driver is there before it is asked for anything.
	if err := s.online(ctx); err != nil {
		return err
	}
	got, err := s.machine().Resize(ctx, want)
	if err = s.keepSize(err); err != nil {
		return err
	}
	if got.CPUs < want.CPUs || got.Memory < want.Memory {
		return fmt.Errorf("the pod's virtual machine grew to %d processors and %d MiB, not to %d and %d MiB: %w",
			got.CPUs, got.Memory/mib, want.CPUs, want.Memory/mib, errdefs.ErrUnavailable)
	}
	return s.online(ctx)
}

// keepSize writes down what the machine has become, whatever else failed.
func (s *sandbox) keepSize(err error) error {
	state := s.machine().State()
	return errors.Join(err, s.update(func(r *record) { r.Machine = state }))
}

// online has the guest use what was plugged in.
func (s *sandbox) online(ctx context.Context) error {
	return s.call(ctx, func(ctx context.Context, g guestv1.GuestService) error {
		_, err := g.Online(ctx, &guestv1.OnlineRequest{})
		return err
	})
}
