package vm

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	guestv1 "cloister.dev/api/guest/v1"
	"cloister.dev/internal/host/vm/machine"
)

// volume is a block device of the node that a container gets.
type volume struct {
	disk   machine.Disk
	path   string // in the container
	access string
}

// takeDevices takes out of a configuration what is a device of the node's
// kernel. Block devices come back, to be disks of the machine.
func takeDevices(l *specs.Linux) ([]volume, error) {
	var kept []specs.LinuxDevice
	var volumes []volume
	for _, d := range l.Devices {
		access, asked := accessOf(l.Resources, d)
		switch {
		case inEveryKernel(d):
			kept = append(kept, d)
		case !asked: // one of all that a privileged container gets
		case d.Type != "b":
			return nil, fmt.Errorf("device %s: only block devices of the node can be given to a virtual machine, and this is none: use a handler that shares the node's kernel: %w",
				d.Path, errdefs.ErrInvalidArgument)
		default:
			source, err := deviceFile(d.Major, d.Minor)
			if err != nil {
				return nil, fmt.Errorf("device %s: %w", d.Path, err)
			}
			v := volume{disk: machine.Disk{ID: fmt.Sprintf("b%d-%d-w", d.Major, d.Minor), Path: source}, path: d.Path, access: access}
			if !strings.Contains(access, "w") {
				// Another disk than that of a container which may write.
				v.disk.ID, v.disk.ReadOnly = fmt.Sprintf("b%d-%d-r", d.Major, d.Minor), true
			}
			d.Major, d.Minor = 0, 0
			kept, volumes = append(kept, d), append(volumes, v)
		}
	}
	l.Devices = kept
	if l.Resources != nil {
		// A number of the node's is that of something else in the machine.
		l.Resources.Devices = slices.DeleteFunc(l.Resources.Devices, func(r specs.LinuxDeviceCgroup) bool {
			return r.Type == "b" && r.Major != nil && *r.Major >= 0
		})
	}
	return volumes, nil
}

// accessOf tells what the rule that names a device allows. The devices that
// nobody asked for by name have none.
func accessOf(r *specs.LinuxResources, d specs.LinuxDevice) (access string, asked bool) {
	if r == nil {
		return "", false
	}
	for _, rule := range r.Devices {
		if rule.Allow && rule.Type == d.Type && rule.Major != nil && *rule.Major == d.Major && rule.Minor != nil && *rule.Minor == d.Minor {
			return rule.Access, true
		}
	}
	return "", false
}

// inEveryKernel tells of devices that have no hardware behind them.
func inEveryKernel(d specs.LinuxDevice) bool {
	const memory, terminals, misc = 1, 5, 10
	const fuse, tun = 229, 200
	return d.Type == "c" && (d.Major == memory || d.Major == terminals || d.Major == misc && (d.Minor == fuse || d.Minor == tun))
}

// deviceFile finds a block device by its number, as the kernel names it.
func deviceFile(major, minor int64) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/uevent", major, minor))
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("the node has no block device %d:%d any more: %w", major, minor, errdefs.ErrNotFound)
	}
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); ok {
			return filepath.Join("/dev", name), nil
		}
	}
	return "", fmt.Errorf("the kernel does not name block device %d:%d: %w", major, minor, errdefs.ErrNotFound)
}

// plugVolumes plugs the disks of a task in, those that are not there yet:
// containers of a pod that have the same device see the same disk.
func (s *sandbox) plugVolumes(ctx context.Context, task string, volumes []volume) ([]*guestv1.Disk, error) {
	var disks []*guestv1.Disk
	for _, v := range volumes {
		if err := s.plugDisk(ctx, task, v.disk); err != nil {
			return nil, fmt.Errorf("device %s: %w", v.path, err)
		}
		disks = append(disks, &guestv1.Disk{Id: v.disk.ID, Path: v.path, Access: v.access})
	}
	return disks, nil
}

// plugDisk notes that a task uses a disk, and plugs it in. Users are noted
// first: what a killed shim leaves is released with the task.
func (s *sandbox) plugDisk(ctx context.Context, task string, d machine.Disk) error {
	s.plugging.Lock()
	defer s.plugging.Unlock()
	if err := s.changeUsers(d.ID, func(users []string) []string {
		if slices.Contains(users, task) {
			return users
		}
		return append(slices.Clone(users), task)
	}); err != nil {
		return err
	}
	m := s.machine()
	there, err := m.Disks(ctx)
	if err != nil {
		return err
	}
	if slices.Contains(there, d.ID) {
		return nil
	}
	// A shim that was killed may have added it by half.
	if err := errors.Join(m.RemoveDisk(ctx, d.ID), m.AddDisk(ctx, d)); err != nil {
		return fmt.Errorf("plug %s into the machine: %w", d.Path, err)
	}
	return nil
}

// releaseDisks pulls out the disks that nobody but the task used.
func (s *sandbox) releaseDisks(ctx context.Context, task string) error {
	s.plugging.Lock()
	defer s.plugging.Unlock()
	for _, id := range slices.Sorted(maps.Keys(s.record().Disks)) {
		users := s.record().Disks[id]
		if !slices.Contains(users, task) {
			continue
		}
		if len(users) == 1 {
			if err := s.pullDisk(ctx, id); err != nil && !ended(s.machine()) {
				return err
			}
		}
		if err := s.changeUsers(id, func(users []string) []string {
			return slices.DeleteFunc(slices.Clone(users), func(u string) bool { return u == task })
		}); err != nil {
			return err
		}
	}
	return nil
}

// pullDisk has the guest let go of a disk first. One that does not loses it
// all the same.
func (s *sandbox) pullDisk(ctx context.Context, id string) error {
	err := s.call(ctx, func(ctx context.Context, g guestv1.GuestService) error {
		_, err := g.ReleaseDisk(ctx, &guestv1.ReleaseDiskRequest{Id: id})
		return err
	})
	if err != nil && !ended(s.machine()) {
		s.backend.log.Warn("disk is pulled out of a guest that did not release it", "sandbox", s.id, "disk", id, "err", err)
	}
	return s.machine().RemoveDisk(ctx, id)
}

// changeUsers changes who uses a disk; plugging is held.
func (s *sandbox) changeUsers(id string, f func([]string) []string) error {
	return s.update(func(r *record) {
		all := maps.Clone(r.Disks) // readers have the old one
		if all == nil {
			all = map[string][]string{}
		}
		if all[id] = f(all[id]); len(all[id]) == 0 {
			delete(all, id)
		}
		r.Disks = all
	})
}
