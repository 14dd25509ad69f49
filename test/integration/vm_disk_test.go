package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// loopDevice makes a block device of some MiB.
func loopDevice(t *testing.T) string {
	t.Helper()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("this machine has no block device to give away: %v", err)
	}
	defer control.Close()
	backing, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer backing.Close()
	if err := backing.Truncate(8 << 20); err != nil {
		t.Fatal(err)
	}
	for range 20 { // another program may be quicker
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Fatal(err)
		}
		path := fmt.Sprintf("/dev/loop%d", n)
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		err = unix.IoctlSetInt(int(f.Fd()), unix.LOOP_SET_FD, int(backing.Fd()))
		f.Close()
		if err == nil {
			t.Cleanup(func() { detach(t, path) })
			return path
		}
	}
	t.Fatal("every loop device is taken away at once")
	return ""
}

func detach(t *testing.T, path string) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err == nil {
		_, err = unix.IoctlRetInt(int(f.Fd()), unix.LOOP_CLR_FD)
		f.Close()
	}
	if err != nil {
		t.Error(err)
	}
}

func device(host, inside, permissions string) containerOption {
	return func(c *cri.ContainerConfig) {
		c.Devices = append(c.Devices, &cri.Device{HostPath: host, ContainerPath: inside, Permissions: permissions})
	}
}

// writeAt and readAt are what the node does with a block device.
func writeAt(t *testing.T, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_SYNC, 0)
	if err == nil {
		_, err = f.WriteAt([]byte(text), 0)
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
}

func readAt(t *testing.T, path string, n int, at int64) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, n)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// holds tells whether a process of the node has a file open.
func holds(n *testnode.Node, path string) bool {
	for _, pid := range n.Processes() {
		fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		for _, fd := range fds {
			if to, err := os.Readlink(fd); err == nil && to == path {
				return true
			}
		}
	}
	return false
}

// A block device of the node is a disk of the machine as long as a container
// has it, and what the container wrote is on the node's device.
func TestMachineBlockDevice(t *testing.T) {
	n := machines(t)
	witness(t, n)
	check := noLeak(t, n)
	disk, other := loopDevice(t), loopDevice(t)
	writeAt(t, disk, "from the node")
	p := runMachine(t, n)
	c := p.idle(device(disk, "/dev/xvda", "mrw"), device(other, "/dev/data", "r"))
	c.says(map[string]string{
		"head -c 13 /dev/xvda":                                  "from the node",
		"test -b /dev/xvda && test -b /dev/data && echo blocks": "blocks",
		"wc -c </dev/xvda":                                      "8388608",
		"echo x 2>/dev/null >/dev/data || echo no":              "no",
		"printf inside | dd of=/dev/xvda bs=1 seek=4096 conv=notrunc 2>&1 | tail -n 1 | cut -c1-1": "6",
	})
	// Both containers of the pod see one disk, before anything is written back.
	second := p.idle(device(disk, "/dev/same", "rw"))
	if got := second.run("dd if=/dev/same bs=1 skip=4096 count=6 2>/dev/null"); got != "inside" {
		t.Errorf("the second container reads %q", got)
	}
	second.stop(1)
	second.remove()
	if got := c.run("dd if=/dev/xvda bs=1 skip=4096 count=6 2>/dev/null"); got != "inside" {
		t.Errorf("after the second container's end the first reads %q", got)
	}
	c.stop(1)
	c.remove()
	if got := readAt(t, disk, 6, 4096); got != "inside" {
		t.Errorf("the node reads %q", got)
	}
	for _, d := range []string{disk, other} {
		if holds(n, d) {
			t.Errorf("%s is still plugged in", d)
		}
	}
	// A container that comes back finds its disk again, and no other.
	c = p.idle(device(other, "/dev/xvda", "rw"))
	if got := c.run("head -c 13 /dev/xvda | tr '\\0' 0"); got != strings.Repeat("0", 13) {
		t.Errorf("the other disk holds %q", got)
	}
	killShim(t, n)
	c.stop(1)
	c.remove()
	if holds(n, other) {
		t.Error("the disk is still plugged in after the shim was killed")
	}
	p.remove()
	check()
}

// What no machine can have is refused, and a privileged container gets none of
// the node's disks but those that it asks for.
func TestMachineDevices(t *testing.T) {
	n := machines(t)
	disk := loopDevice(t)
	writeAt(t, disk, "privileged")
	p := runMachine(t, n, func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
	refused := p.create(busybox, []string{"true"}, device("/dev/loop-control", "/dev/x", "rwm"))
	wantError(t, refused.tryStart(), codes.InvalidArgument, "/dev/x", "block device", "handler")
	refused.remove()
	c := p.idle(device(disk, disk, "rw"), func(c *cri.ContainerConfig) { c.Linux.SecurityContext.Privileged = true })
	c.says(map[string]string{
		"head -c 10 " + disk: "privileged",
		"ls /dev/vd* /dev/sd* /dev/loop* 2>/dev/null | wc -l": "1",
		"find /sys/block/sd* | wc -l":                         "1",
	})
	p.remove()
}

// The same on a machine of type q35.
func TestMachineBlockDeviceQ35(t *testing.T) {
	needRoot(t)
	guests, err := guest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n, err := here.start(t.Context(), testnode.Options{Guests: guests, GuestOptions: []string{`machine_type = "q35"`, "boot_timeout = 180"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := closeNode(n); err != nil {
			t.Error(err)
		}
	})
	disk := loopDevice(t)
	writeAt(t, disk, "from the node")
	p := runMachine(t, n)
	c := p.idle(device(disk, "/dev/xvda", "rw"))
	c.says(map[string]string{"head -c 13 /dev/xvda": "from the node"})
	c.says(map[string]string{"printf inside >/dev/xvda && echo done": "done"})
	p.remove() // the machine ends with the container in it
	if got := readAt(t, disk, 13, 0); got != "insidehe node" {
		t.Errorf("the node reads %q", got)
	}
}
