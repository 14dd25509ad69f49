package machine

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// Names of QEMU's objects. Ports and disks are "p-" and "d-" with their own.
const (
	consoleID = "console"
	serialID  = "vser"
	scsiID    = "scsi"
	memoryID  = "mem"
	growID    = "grow" // memory for Resize
)

// maxPorts is how many serial ports a guest may have.
const maxPorts = 64

// arguments is a command line of QEMU and the files that it inherits.
type arguments struct {
	args  []string
	files []*os.File
}

func (a *arguments) add(option string, parts ...string) {
	a.args = append(a.args, option)
	if len(parts) > 0 {
		a.args = append(a.args, strings.Join(parts, ","))
	}
}

// inherit gives the number under which QEMU finds the file.
func (a *arguments) inherit(f *os.File) int {
	a.files = append(a.files, f)
	return 2 + len(a.files)
}

// quote protects a value in a list of options.
func quote(value string) string { return strings.ReplaceAll(value, ",", ",,") }

const (
	mebi       = int64(1 << 20)
	leastSpace = 64 * mebi // what no kernel boots below

	lower = "abcdefghijklmnopqrstuvwxyz0123456789"
	alnum = lower + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
)

// consists tells whether s has 1 to limit bytes, all of them of those in set.
// Seven regular expressions with such bounds took 1.4 ms to compile, at every
// start of this program and so of every guest.
func consists(s, set string, limit int) bool {
	return s != "" && len(s) <= limit && strings.Trim(s, set) == ""
}

func goodID(id string) bool {
	return consists(id, alnum+"._-", 128) && consists(id[:1], alnum, 1)
}

func goodParam(p string) bool {
	return p != "" && len(p) <= 512 && !strings.ContainsFunc(p, func(r rune) bool { return r < '!' || r > '~' })
}

func goodMAC(mac string) bool {
	hw, err := net.ParseMAC(mac)
	return err == nil && len(hw) == 6 && hw.String() == mac
}

// check refuses what QEMU would misunderstand.
func (c *Config) check() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("machine %q: %s: %w", c.ID, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
	}
	switch {
	case !goodID(c.ID):
		return bad("the name has characters that QEMU does not take")
	case c.Type != Microvm && c.Type != Q35:
		return bad("unknown machine type %q; there are %q and %q", c.Type, Microvm, Q35)
	case c.Accel != KVM && c.Accel != TCG:
		return bad("unknown accelerator %q; there are %q and %q", c.Accel, KVM, TCG)
	case c.CPU != "" && !consists(c.CPU, alnum+"._,=+-", 256):
		return bad("%q is no CPU model", c.CPU)
	case !filepath.IsAbs(c.Dir) || len(c.Dir) > 80:
		return bad("the folder %q has to be absolute and at most 80 bytes long", c.Dir)
	case c.Size.CPUs == 0 || c.Size.CPUs > 255:
		return bad("%d processors; there can be 1 to 255", c.Size.CPUs)
	case c.Size.Memory < leastSpace || c.Size.Memory%mebi != 0:
		return bad("%d bytes of memory; at least %d MiB are needed, in whole MiB", c.Size.Memory, leastSpace/mebi)
	case c.MaxSize != Size{} && c.Type != Q35:
		return bad("only machines of type %q can be resized", Q35)
	case c.MaxSize != Size{} && (c.MaxSize.CPUs < c.Size.CPUs || c.MaxSize.Memory < c.Size.Memory || c.MaxSize.CPUs > 255):
		return bad("the largest size %+v is below the first %+v", c.MaxSize, c.Size)
	}
	for _, p := range c.Params {
		if !goodParam(p) {
			return bad("kernel parameter %q has blanks or is too long", p)
		}
	}
	for _, s := range c.Shares {
		if !consists(s.Tag, lower+"-", 36) {
			return bad("share tag %q", s.Tag)
		}
	}
	for _, n := range c.NICs {
		if !goodMAC(n.MAC) || n.Tap == nil {
			return bad("network interface %q without a hardware address or a tap", n.MAC)
		}
	}
	for _, d := range c.Disks {
		if err := d.check(); err != nil {
			return fmt.Errorf("machine %q: %w", c.ID, err)
		}
	}
	return nil
}

// device names a virtio device as the machine's bus calls it.
func (c *Config) device(kind string) string {
	if c.Type == Microvm {
		return kind + "-device"
	}
	return kind + "-pci"
}

// commandLine describes the whole machine. qmp listens for its control.
func (c *Config) commandLine(qmp *os.File, tsc uint64) arguments {
	var a arguments
	a.add("-name", "guest="+quote(c.ID))
	a.add("-nodefaults")
	a.add("-no-user-config")
	a.add("-display", "none")
	a.add("-sandbox", "on", "obsolete=deny", "elevateprivileges=deny", "spawn=deny", "resourcecontrol=deny")
	// What ends is held until its console was read.
	a.add("-action", "reboot=shutdown", "shutdown=pause", "panic=pause")
	a.add("-pidfile", filepath.Join(c.Dir, pidFile))
	a.add("-chardev", "socket", "id=qmp", "fd="+strconv.Itoa(a.inherit(qmp)), "server=on", "wait=off")
	a.add("-mon", "chardev=qmp", "mode=control")
	a.add("-chardev", "ringbuf", "id="+consoleID, "size="+strconv.Itoa(ConsoleSize))
	a.add("-serial", "chardev:"+consoleID)
	c.board(&a)
	a.add("-kernel", c.Kernel)
	a.add("-initrd", c.Initrd)
	a.add("-append", strings.Join(c.kernelParams(tsc), " "))
	a.add("-device", c.device("virtio-serial"), "id="+serialID, "max_ports="+strconv.Itoa(maxPorts))
	a.add("-device", c.device("virtio-scsi"), "id="+scsiID)
	for _, d := range c.Disks {
		a.disk(d)
	}
	for i, s := range c.Shares {
		id := "fs" + strconv.Itoa(i)
		a.add("-chardev", "socket", "id="+id, "path="+quote(s.Socket))
		a.add("-device", c.device("vhost-user-fs"), "chardev="+id, "tag="+s.Tag, "queue-size=1024")
	}
	for i, n := range c.NICs {
		id := "net" + strconv.Itoa(i)
		a.add("-netdev", "tap", "id="+id, "fd="+strconv.Itoa(a.inherit(n.Tap)))
		a.add("-device", c.device("virtio-net"), "netdev="+id, "mac="+n.MAC)
	}
	return a
}

// board is the machine itself: type, processors and memory.
func (c *Config) board(a *arguments) {
	cpu := c.CPU
	machine := []string{c.Type, "accel=" + c.Accel, "memory-backend=" + memoryID}
	if c.Type == Microvm {
		// TCG has no clock of its own to offer and needs the old timer.
		timer := "off"
		if c.Accel == TCG {
			timer = "on"
		}
		machine = append(machine, "isa-serial=on", "rtc=on", "pic=off", "pit="+timer)
		a.add("-global", "virtio-mmio.force-legacy=false") // virtio-fs is modern only
	} else {
		machine = append(machine, "smm=off", "vmport=off", "usb=off")
	}
	switch {
	case cpu != "":
	case c.Accel == KVM:
		cpu = "host,pmu=off"
	default:
		// An emulated processor copies and clears byte by byte with the
		// instructions that erms calls fast; without it kernels use words.
		cpu = "max,-erms"
	}
	a.add("-machine", machine...)
	a.add("-cpu", cpu)
	smp := []string{strconv.FormatUint(uint64(c.Size.CPUs), 10)}
	mem := []string{mib(c.Size.Memory)}
	if c.MaxSize != (Size{}) {
		smp = append(smp, "maxcpus="+strconv.FormatUint(uint64(c.MaxSize.CPUs), 10))
		mem = append(mem, "maxmem="+mib(c.MaxSize.Memory+growBlock), "slots=1")
	}
	a.add("-smp", smp...)
	a.add("-m", mem...)
	a.add("-object", "memory-backend-memfd", "id="+memoryID, "size="+mib(c.Size.Memory), "share=on")
	if more := c.MaxSize.Memory - c.Size.Memory; more > 0 {
		more = (more + growBlock - 1) / growBlock * growBlock
		a.add("-object", "memory-backend-memfd", "id=m-"+growID, "size="+mib(more), "share=on", "reserve=off")
		a.add("-device", "virtio-mem-pci", "id="+growID, "memdev=m-"+growID, "requested-size=0")
	}
}

func mib(bytes int64) string { return strconv.FormatInt(bytes/mebi, 10) + "M" }

// skipped are steps of the kernel's start that cost a tenth of it. A kernel
// without a step of that name ignores it.
var skipped = [...]string{"crypto_kdf108_init", "init_kprobe_trace", "load_system_certificate_list", "slab_sysfs_init"}

// kernelParams is the command line of the guest's kernel.
func (c *Config) kernelParams(tsc uint64) []string {
	p := []string{"console=ttyS0", "quiet", "cloister.machine=" + c.Type,
		// A panic prints the whole log, which was quiet before, and ends the machine.
		// So does a bug in the kernel, after which calls might never be answered.
		"panic=-1", "panic_print=32", "oops=panic", "reboot=t",
		"random.trust_cpu=on", "audit=0", "no_timer_check", "cgroup_no_v1=all",
		// What a kernel does at its start and no guest has use for: tests of
		// itself, policies that nobody loads, keys of other vendors.
		"cryptomgr.notests", "apparmor=0", "initcall_blacklist=" + strings.Join(skipped[:], ","),
	}
	if c.Accel == TCG {
		// They guard against what an emulated processor does not do.
		p = append(p, "mitigations=off")
	}
	if c.Accel == TCG && tsc > 0 {
		// The emulated clock counts what the host's counts. Without these a
		// guest on a busy host fails to measure that and hangs for ever.
		p = append(p, "tsc_early_khz="+strconv.FormatUint(tsc, 10), "tsc=reliable")
	}
	return append(p, c.Params...)
}
