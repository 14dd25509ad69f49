package check

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/host/container"
	"cloister.dev/internal/host/vm/link"
	"cloister.dev/internal/osutil"
)

// cgroups makes one and removes it.
func (c *checks) cgroups(context.Context) (string, error) {
	version, dirs := "version 2", []string{"/sys/fs/cgroup"}
	if !osutil.CgroupV2() {
		version, dirs = "version 1", []string{"/sys/fs/cgroup/memory", "/sys/fs/cgroup/pids", "/sys/fs/cgroup/cpu"}
	}
	for _, d := range dirs {
		path := filepath.Join(d, filepath.Base(c.dir))
		if err := os.Mkdir(path, 0o755); err != nil {
			return version, remedy(fmt.Errorf("make a cgroup: %w", err), "mount the cgroup file systems writable under /sys/fs/cgroup, with the controllers cpu, memory and pids")
		}
		if err := os.Remove(path); err != nil {
			return version, err
		}
	}
	return version + ", made and removed one in " + strings.Join(dirs, ", "), nil
}

// mounts does what the folders of a machine are shared with.
func (c *checks) mounts(context.Context) (string, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, c.dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err == nil {
		defer unix.Close(fd)
		err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	}
	if err != nil {
		return "", remedy(fmt.Errorf("clone a mount and make it read-only: %w", err), "virtual machines need Linux 5.12 or newer, and CAP_SYS_ADMIN")
	}
	return "cloned a mount and made it read-only (open_tree, mount_setattr)", nil
}

// container runs one with an OCI runtime.
func (c *checks) container(ctx context.Context, binary string) (string, error) {
	b := container.New(c.dir, c.reaper, c.Log)
	r, err := b.Probe(ctx, &hostv1.ProbeRequest{Binary: binary})
	if err != nil {
		return "", err
	}
	if !r.Works {
		return "", remedy(fmt.Errorf("%s: %w", r.Reason, errWarning), "install "+binary+", or use another OCI runtime that works here")
	}
	return fmt.Sprintf("%s, %s, ran a container in %d ms", r.Path, r.Version, r.Millis), nil
}

// tap connects one to an interface in a namespace of its own.
func (c *checks) tap(context.Context) (string, error) {
	path := filepath.Join(c.dir, "netns")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return "", err
	}
	err := osutil.OnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network namespace: %w", err)
		}
		if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("pin a network namespace: %w", err)
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "eth0"
		l := &netlink.Veth{LinkAttrs: attrs, PeerName: "peer"}
		if err := netlink.LinkAdd(l); err != nil {
			return fmt.Errorf("make a pair of interfaces: %w", err)
		}
		return netlink.LinkSetUp(l)
	})
	defer func() { _ = unix.Unmount(path, unix.MNT_DETACH) }() // not mounted when that failed
	if err != nil {
		return "", remedy(err, "the kernel needs network namespaces and veth")
	}
	a, err := link.Attach(path)
	if err != nil {
		return "", remedy(err, "load the modules tun, sch_ingress, cls_u32 and act_mirred, and see that /dev/net/tun is there")
	}
	a.Close()
	if len(a.Taps) != 1 {
		return "", errors.New("no tap was made")
	}
	return "made a tap and had packets redirected to it", nil
}
