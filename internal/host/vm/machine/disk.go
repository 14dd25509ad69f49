package machine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
)

func (d Disk) check() error {
	if !goodDisk(d.ID) || !filepath.IsAbs(d.Path) {
		return fmt.Errorf("disk %q at %q: a disk has an absolute path, and a name of 1 to 20 of a-z, 0-9 and dash: %w", d.ID, d.Path, errdefs.ErrInvalidArgument)
	}
	return nil
}

// driver is what QEMU opens the disk with. It knows regular files and block
// devices apart; what is neither, or not there, is its to refuse.
func (d Disk) driver() string {
	if info, err := os.Stat(d.Path); err == nil && info.Mode().Type() == os.ModeDevice {
		return "host_device"
	}
	return "file"
}

// disk adds one to the command line.
func (a *arguments) disk(d Disk) {
	ro := "off"
	if d.ReadOnly {
		ro = "on"
	}
	a.add("-blockdev", "driver=raw", "node-name=n-"+d.ID, "read-only="+ro, "discard=unmap",
		"file.driver="+d.driver(), "file.filename="+quote(d.Path), "file.locking=off")
	a.add("-device", "scsi-hd", "bus="+scsiID+".0", "id=d-"+d.ID, "drive=n-"+d.ID, "serial="+d.ID)
}

// AddDisk is part of Machine. Disks hang on one SCSI controller, which takes
// them while the guest runs on every type of machine.
func (m *qemu) AddDisk(ctx context.Context, d Disk) error {
	if err := d.check(); err != nil {
		return err
	}
	node := command{Name: "blockdev-add", Args: map[string]any{"driver": "raw", "node-name": "n-" + d.ID, "read-only": d.ReadOnly, "discard": "unmap",
		"file": map[string]any{"driver": d.driver(), "filename": d.Path, "locking": "off"}}}
	if _, err := m.ask(ctx, node); err != nil {
		return fmt.Errorf("add disk %s: %w", d.ID, err)
	}
	device := command{Name: "device_add", Args: map[string]any{"driver": "scsi-hd", "bus": scsiID + ".0", "id": "d-" + d.ID, "drive": "n-" + d.ID, "serial": d.ID}}
	if _, err := m.ask(ctx, device); err != nil {
		_, uerr := m.ask(ctx, command{Name: "blockdev-del", Args: map[string]any{"node-name": "n-" + d.ID}})
		return errors.Join(fmt.Errorf("add disk %s: %w", d.ID, err), uerr)
	}
	return nil
}

// RemoveDisk is part of Machine.
func (m *qemu) RemoveDisk(ctx context.Context, id string) error {
	if !goodDisk(id) {
		return fmt.Errorf("disk %q: %w", id, errdefs.ErrInvalidArgument)
	}
	_, err := m.ask(ctx, command{Name: "device_del", Args: map[string]any{"id": "d-" + id}})
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove disk %s: %w", id, err)
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		_, err := m.ask(ctx, command{Name: "blockdev-del", Args: map[string]any{"node-name": "n-" + id}})
		if err == nil {
			return nil
		}
		if there, lerr := m.hasNode(ctx, id); lerr != nil || !there {
			return lerr
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("remove disk %s: %w", id, err), ctx.Err())
		}
	}
}

func (m *qemu) hasNode(ctx context.Context, id string) (bool, error) {
	b, err := m.ask(ctx, command{Name: "query-named-block-nodes", Args: map[string]any{"flat": true}})
	if err != nil {
		return false, err
	}
	var all []struct {
		Name string `json:"node-name"`
	}
	if err := json.Unmarshal(b, &all); err != nil {
		return false, fmt.Errorf("read QEMU's disks: %w", err)
	}
	for _, n := range all {
		if n.Name == "n-"+id {
			return true, nil
		}
	}
	return false, nil
}

// Disks is part of Machine.
func (m *qemu) Disks(ctx context.Context) ([]string, error) { return m.devices(ctx, "d-") }

func goodDisk(id string) bool { return consists(id, lower+"-", 20) }
