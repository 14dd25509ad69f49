package machine

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
)

// growBlock is the grain of memory that can be added: the guest takes blocks
// of this size into use.
const growBlock = 128 << 20

// growStep is the grain in which memory is asked for.
const growStep = 2 << 20

// settleTime bounds the wait for a guest that is asked for another size.
const settleTime = 3 * time.Second

// Resize is part of Machine. Processors are only added: a guest need not give
// one back. Memory goes both ways as far as the guest can follow, and never
// below the size that the machine was started with.
func (m *qemu) Resize(ctx context.Context, want Size) (Size, error) {
	s := m.State()
	if s.Max == (Size{}) {
		return s.Size, fmt.Errorf("machine %s of type %s keeps the size that it was started with: %w", s.ID, s.Type, errdefs.ErrNotImplemented)
	}
	if want.CPUs > s.Max.CPUs || want.Memory > s.Max.Memory {
		return s.Size, fmt.Errorf("machine %s: %d processors and %d MiB are more than its largest size of %d and %d MiB (default_maxvcpus, default_maxmemory): %w",
			s.ID, want.CPUs, want.Memory>>20, s.Max.CPUs, s.Max.Memory>>20, errdefs.ErrInvalidArgument)
	}
	select {
	case m.resize <- struct{}{}:
	case <-ctx.Done():
		return s.Size, ctx.Err()
	}
	defer func() { <-m.resize }()
	got := m.State().Size
	var err error
	if got.CPUs, err = m.addCPUs(ctx, want.CPUs); err == nil && s.Max.Memory > s.Base {
		got.Memory, err = m.setMemory(ctx, s.Base, max(want.Memory, s.Base))
	}
	m.mu.Lock()
	m.state.Size = got
	m.mu.Unlock()
	if err != nil {
		return got, fmt.Errorf("resize machine %s: %w", s.ID, err)
	}
	return got, nil
}

// slot is a place for a processor.
type slot struct {
	Type  string         `json:"type"`
	Props map[string]any `json:"props"`
	Path  string         `json:"qom-path"` // of what is plugged there
}

func (m *qemu) addCPUs(ctx context.Context, want uint32) (uint32, error) {
	b, err := m.ask(ctx, command{Name: "query-hotpluggable-cpus"})
	if err != nil {
		return m.State().Size.CPUs, err
	}
	var slots []slot
	if err := json.Unmarshal(b, &slots); err != nil {
		return m.State().Size.CPUs, fmt.Errorf("read QEMU's processors: %w", err)
	}
	have := uint32(0)
	for _, s := range slots {
		if s.Path != "" {
			have++
		}
	}
	// QEMU lists the last place first.
	for i := len(slots) - 1; i >= 0 && have < want; i-- {
		if slots[i].Path != "" {
			continue
		}
		args := map[string]any{"driver": slots[i].Type, "id": fmt.Sprintf("cpu%d", have)}
		for k, v := range slots[i].Props {
			args[k] = v
		}
		if _, err := m.ask(ctx, command{Name: "device_add", Args: args}); err != nil {
			return have, fmt.Errorf("add a processor: %w", err)
		}
		have++
	}
	return have, nil
}

// setMemory asks the guest to use more or less, and waits a while for it.
func (m *qemu) setMemory(ctx context.Context, base, want int64) (int64, error) {
	more := (want - base) / growStep * growStep
	path := "/machine/peripheral/" + growID
	if _, err := m.ask(ctx, command{Name: "qom-set", Args: map[string]any{"path": path, "property": "requested-size", "value": more}}); err != nil {
		return m.State().Size.Memory, fmt.Errorf("ask for memory: %w", err)
	}
	limit := time.NewTimer(settleTime)
	defer limit.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		b, err := m.ask(ctx, command{Name: "qom-get", Args: map[string]any{"path": path, "property": "size"}})
		var have int64
		if err == nil {
			err = json.Unmarshal(b, &have)
		}
		if err != nil {
			return m.State().Size.Memory, fmt.Errorf("ask for the size of memory: %w", err)
		}
		if have == more {
			return base + have, nil
		}
		select {
		case <-tick.C:
		case <-limit.C:
			return base + have, nil // what was reached is the answer
		case <-ctx.Done():
			return base + have, ctx.Err()
		}
	}
}
