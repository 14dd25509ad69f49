package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/emptypb"

	guestv1 "cloister.dev/api/guest/v1"
)

// diskTime bounds the wait for a disk that the host says it has plugged in.
const diskTime = time.Minute

// adapt gives the configuration of a container with what is this machine's to
// know: where its root file system is, and the numbers of its disks.
func (a *Agent) adapt(ctx context.Context, dir string, r *guestv1.LaunchRequest) ([]byte, error) {
	if r.Rootfs == nil && len(r.Disks) == 0 {
		return r.Config, nil
	}
	var spec specs.Spec
	if err := json.Unmarshal(r.Config, &spec); err != nil {
		return nil, fmt.Errorf("read the configuration: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if spec.Root == nil || spec.Linux == nil || spec.Linux.Resources == nil {
		return nil, fmt.Errorf("the configuration has no root or no rules for devices: %w", errdefs.ErrInvalidArgument)
	}
	if r.Rootfs != nil {
		var err error
		if spec.Root.Path, err = a.mountRootfs(ctx, dir, r.Rootfs); err != nil {
			return nil, err
		}
	}
	for _, d := range r.Disks {
		if err := a.numberDisk(ctx, spec.Linux, d); err != nil {
			return nil, fmt.Errorf("device %s: %w", d.Path, err)
		}
	}
	return json.Marshal(&spec)
}

// numberDisk gives the device that a disk is its number.
func (a *Agent) numberDisk(ctx context.Context, l *specs.Linux, d *guestv1.Disk) error {
	name, err := a.disk(ctx, d.Id)
	if err != nil {
		return err
	}
	major, minor, err := number(name)
	if err != nil {
		return err
	}
	for i := range l.Devices {
		if dev := &l.Devices[i]; dev.Path == d.Path {
			dev.Major, dev.Minor = major, minor
		}
	}
	l.Resources.Devices = append(l.Resources.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: "b", Major: &major, Minor: &minor, Access: d.Access})
	return nil
}

// disk waits for a disk and gives its name, such as sda.
func (a *Agent) disk(ctx context.Context, id string) (string, error) {
	for _, driver := range []string{"virtio_scsi", "sd_mod"} {
		// One that the kernel has built in is no module.
		if err := Modprobe(driver); err != nil && !errdefs.IsNotFound(err) {
			return "", fmt.Errorf("load the driver of disks: %w", err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, diskTime)
	defer cancel()
	for {
		changed := a.ports.awaitChange()
		if name := diskNamed(id); name != "" {
			return name, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return "", fmt.Errorf("disk %q does not appear: %w: %w", id, ctx.Err(), errdefs.ErrNotFound)
		}
	}
}

// serialHead is what stands before the serial number in a vital product data
// page.
const serialHead = 4

// diskNamed finds a disk by its serial number.
func diskNamed(id string) string {
	pages, err := filepath.Glob("/sys/block/sd*/device/vpd_pg80")
	if err != nil {
		return ""
	}
	for _, page := range pages {
		b, err := os.ReadFile(page)
		if err == nil && len(b) > serialHead && strings.TrimSpace(string(b[serialHead:])) == id {
			return filepath.Base(filepath.Dir(filepath.Dir(page)))
		}
	}
	return ""
}

func number(disk string) (major, minor int64, err error) {
	b, err := os.ReadFile(filepath.Join("/sys/block", disk, "dev"))
	if err == nil {
		_, err = fmt.Sscanf(string(b), "%d:%d", &major, &minor)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("read the number of disk %s: %w", disk, err)
	}
	return major, minor, nil
}

// ReleaseDisk is part of the service. Removing a disk writes what is to be
// written.
func (a *Agent) ReleaseDisk(_ context.Context, r *guestv1.ReleaseDiskRequest) (*emptypb.Empty, error) {
	name := diskNamed(r.Id)
	if name == "" {
		return &emptypb.Empty{}, nil
	}
	err := os.WriteFile(filepath.Join("/sys/block", name, "device/delete"), []byte("1"), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("release disk %s: %w", name, err)
	}
	return &emptypb.Empty{}, nil
}
