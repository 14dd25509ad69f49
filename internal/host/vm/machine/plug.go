package machine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

func (p Port) check() error {
	if !consists(p.Name, lower+".-", 60) || p.File == nil {
		return fmt.Errorf("port %q: a port has a file, and a name of 1 to 60 of a-z, 0-9, dot and dash: %w", p.Name, errdefs.ErrInvalidArgument)
	}
	return nil
}

// AddPort is part of Machine. QEMU takes the file first, then opens it as a
// character device, then plugs the port: three steps in one go.
func (m *qemu) AddPort(ctx context.Context, p Port) error {
	if err := p.check(); err != nil {
		return err
	}
	set, err := m.fdSet(ctx, p)
	if err != nil {
		return fmt.Errorf("add port %s: %w", p.Name, err)
	}
	backend := map[string]any{"type": "file"}
	path := fmt.Sprintf("/dev/fdset/%d", set)
	switch p.Direction {
	case FromGuest:
		backend["data"] = map[string]any{"out": path, "append": true}
	case ToGuest:
		backend["data"] = map[string]any{"in": path, "out": "/dev/null"}
	default:
		backend = map[string]any{"type": "socket", "data": map[string]any{"server": false,
			"addr": map[string]any{"type": "fd", "data": map[string]any{"str": "f-" + p.Name}}}}
	}
	chardev := command{Name: "chardev-add", Args: map[string]any{"id": "c-" + p.Name, "backend": backend}}
	device := command{Name: "device_add", Args: map[string]any{"driver": "virtserialport", "bus": serialID + ".0",
		"id": "p-" + p.Name, "name": p.Name, "chardev": "c-" + p.Name}}
	cs := []command{chardev, device}
	if p.Direction == BothWays {
		cs = append([]command{{Name: "getfd", Args: map[string]any{"fdname": "f-" + p.Name}, File: p.File}}, cs...)
	} else {
		// The character device has its own copy by then.
		cs = append(cs, command{Name: "remove-fd", Args: map[string]any{"fdset-id": set}})
	}
	if _, err := m.ask(ctx, cs...); err != nil {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandTime)
		defer cancel()
		// What was there before, another port of the name, has to stay.
		if !m.hasPort(clean, p.Name) {
			_, _ = m.ask(clean, command{Name: "chardev-remove", Args: map[string]any{"id": "c-" + p.Name}})
		}
		return fmt.Errorf("add port %s: %w", p.Name, err)
	}
	return nil
}

// fdSet gives QEMU a copy of the file under a number of its choice. QEMU finds
// it by the number only when it is opened the way the port needs.
func (m *qemu) fdSet(ctx context.Context, p Port) (int, error) {
	if p.Direction == BothWays {
		return 0, nil
	}
	b, err := m.ask(ctx, command{Name: "add-fd", File: p.File})
	if err != nil {
		return 0, err
	}
	var set struct {
		ID int `json:"fdset-id"`
	}
	return set.ID, json.Unmarshal(b, &set)
}

// RemovePort is part of Machine.
func (m *qemu) RemovePort(ctx context.Context, name string) error {
	_, err := m.ask(ctx, command{Name: "device_del", Args: map[string]any{"id": "p-" + name}})
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove port %s: %w", name, err)
	}
	return m.removeChardev(ctx, "c-"+name)
}

// removeChardev removes what a device was using; QEMU frees the device itself
// a moment after it is gone, and tells nobody when.
func (m *qemu) removeChardev(ctx context.Context, id string) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for range 1000 {
		_, err := m.ask(ctx, command{Name: "chardev-remove", Args: map[string]any{"id": id}})
		if err == nil {
			return nil
		}
		there, lerr := m.hasChardev(ctx, id)
		if lerr != nil || !there {
			return lerr
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		}
	}
	return fmt.Errorf("%s stays in use: %w", id, errdefs.ErrUnavailable)
}

func (m *qemu) hasChardev(ctx context.Context, id string) (bool, error) {
	all, err := m.chardevs(ctx)
	return slices.Contains(all, id), err
}

// chardevs lists QEMU's character devices.
func (m *qemu) chardevs(ctx context.Context) ([]string, error) {
	b, err := m.ask(ctx, command{Name: "query-chardev"})
	if err != nil {
		return nil, err
	}
	var all []struct {
		Label string `json:"label"`
	}
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, fmt.Errorf("read QEMU's character devices: %w", err)
	}
	var ids []string
	for _, c := range all {
		ids = append(ids, c.Label)
	}
	return ids, nil
}

func (m *qemu) hasPort(ctx context.Context, name string) bool {
	all, err := m.devices(ctx, "p-")
	return err != nil || slices.Contains(all, name)
}

// Ports is part of Machine. A port has been there, and may hold its file, as
// soon as its character device is, even when AddPort was cut off after that.
func (m *qemu) Ports(ctx context.Context) ([]string, error) {
	names, err := m.devices(ctx, "p-")
	if err != nil {
		return nil, err
	}
	ids, err := m.chardevs(ctx)
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		if name, ok := strings.CutPrefix(id, "c-"); ok && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names, nil
}

// devices lists what was plugged under names with a prefix.
func (m *qemu) devices(ctx context.Context, prefix string) ([]string, error) {
	b, err := m.ask(ctx, command{Name: "qom-list", Args: map[string]any{"path": "/machine/peripheral"}})
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	var all []struct {
		Name string `json:"name"`
	}
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, fmt.Errorf("read QEMU's devices: %w", err)
	}
	var names []string
	for _, d := range all {
		if name, ok := strings.CutPrefix(d.Name, prefix); ok {
			names = append(names, name)
		}
	}
	return names, nil
}
