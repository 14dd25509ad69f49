// Package machine starts virtual machines and finds them again. It promises
// that a machine outlives the process that started it, that its end is told
// exactly once, and that an error of a machine that did not come up carries
// the last lines of its console.
//
// It knows nothing of pods, containers or the guest's agent: a machine is a
// kernel, memory, processors, and devices whose other ends are files and
// sockets.
//
// # Life
//
//	Start ─▶ (runs) ─▶ Done          the guest ended, or Kill, or QEMU died
//	         │  ▲
//	         ▼  │ Attach             after the starting process was killed
//
// A machine whose guest has ended is held by QEMU until somebody has read its
// console, so nothing of it is lost while nobody is attached.
package machine

import (
	"context"
	"os"

	"cloister.dev/internal/host/proc"
)

// Machine is a virtual machine that runs. Its methods may be called
// concurrently. Those that change it fail with errdefs.ErrUnavailable once it
// has ended.
type Machine interface {
	// State is what has to be on disk for Attach.
	State() State
	// Console gives the end of what the guest wrote on its console, at most
	// ConsoleSize bytes, also after the end of the machine.
	Console(ctx context.Context) []byte

	// AddPort gives the guest one more stream, RemovePort takes it away; a port
	// that is not there is success. Ports lists the names of all.
	AddPort(ctx context.Context, p Port) error
	RemovePort(ctx context.Context, name string) error
	Ports(ctx context.Context) ([]string, error)
	// AddDisk and RemoveDisk change the disks; a disk that is not there is
	// success for the latter, and so is one that was added by half. Disks lists
	// the IDs of all.
	AddDisk(ctx context.Context, d Disk) error
	RemoveDisk(ctx context.Context, id string) error
	Disks(ctx context.Context) ([]string, error)
	// Resize asks for another size and gives the size that was reached; the
	// guest has to bring new processors up, and to give memory back when it is
	// asked for it. A machine without MaxSize answers errdefs.ErrNotImplemented.
	Resize(ctx context.Context, want Size) (Size, error)
	// Pause stops all processors and Resume lets them go on.
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error

	// Done is closed at the machine's end, then Exit tells how.
	Done() <-chan struct{}
	Exit() Exit
	// Kill ends the machine and waits until its process is gone.
	Kill(ctx context.Context) error
	// Close lets go of the machine, which runs on.
	Close()
}

// Exit is how a machine ended.
type Exit struct {
	proc.Exit
	// Reason is a sentence for people: "the guest powered off", "QEMU was
	// killed by signal 9", "the guest's kernel panicked".
	Reason string
}

// ConsoleSize is how much of the console is kept, in bytes.
const ConsoleSize = 64 << 10

// Types of machines.
const (
	Microvm = "microvm"
	Q35     = "q35"
)

// Accelerators.
const (
	KVM = "kvm"
	TCG = "tcg"
)

// Config describes a machine to start.
type Config struct {
	ID    string // names the machine to people and in the process list
	QEMU  string // path of qemu-system-…
	Type  string // Microvm or Q35
	Accel string // KVM or TCG: already decided, see ProbeAccel
	CPU   string // QEMU's CPU model; empty: the best that the accelerator has

	Kernel, Initrd string
	// Params are added to the kernel's command line.
	Params []string

	Size    Size
	MaxSize Size // how far Resize may go; zero: not at all

	// Dir is a private folder that exists; a socket lies there, so its path
	// has to be short (at most 80 bytes).
	Dir string
	// Cgroups are folders of cgroups, at most one of each hierarchy, that hold
	// QEMU from its first instruction on. Empty: the starting process's own.
	Cgroups []string

	Shares []Share
	NICs   []NIC
	Disks  []Disk
}

// Size of a machine.
type Size struct {
	CPUs   uint32 `json:"cpus"`
	Memory int64  `json:"memory"` // bytes, a multiple of 1 MiB
}

// Port is a stream between the host and the guest, a virtio-serial port. QEMU
// holds the host's end: nobody is needed in between, and nothing is lost when
// the process that made it dies.
type Port struct {
	Name      string // 1 to 60 bytes of [a-z0-9.-]; the guest finds the port by it
	Direction Direction
	// File is the host's end. The machine gets a copy; this one is the caller's.
	File *os.File
}

// Direction of a port.
type Direction int

// Directions.
const (
	FromGuest Direction = iota // File is opened for writing: a FIFO, a pipe or a file
	ToGuest                    // File is opened for reading: a FIFO or a pipe
	BothWays                   // File is a connected stream socket
)

// Share is a folder served by virtiofsd.
type Share struct {
	Tag    string // the guest mounts the file system by it
	Socket string // virtiofsd's
}

// NIC is a network interface.
type NIC struct {
	MAC string
	// Tap is the open tap device, which is the caller's to close after Start.
	Tap *os.File
}

// Disk is a block device. The guest finds it by its serial number, the ID.
type Disk struct {
	ID       string // at most 20 bytes of [a-z0-9-]
	Path     string // a raw image or a block device
	ReadOnly bool
}

// State finds a machine again. It is stored as JSON. Whoever was killed before
// he could store it finds the machine by Dir alone.
type State struct {
	ID    string `json:"id"`
	Type  string `json:"type"`
	Dir   string `json:"dir"`
	Pid   int    `json:"pid,omitempty"`
	Start uint64 `json:"start,omitempty"` // with Pid, the process's identity
	Size  Size   `json:"size"`
	Max   Size   `json:"max"`
	Base  int64  `json:"base,omitempty"` // memory at the start
}

// Start boots a machine. It returns when QEMU runs, which is before the guest
// is up; whoever waits for the guest watches Done beside it. On error nothing
// is left.
func Start(ctx context.Context, reaper *proc.Reaper, c Config) (Machine, error) {
	return startQEMU(ctx, reaper, c)
}

// Attach takes up a machine that an earlier life of this program started; held
// is QEMU's pidfd where somebody kept it. A machine that has ended meanwhile is
// given back ended: Done is closed, or will be soon.
func Attach(ctx context.Context, reaper *proc.Reaper, s State, held *os.File) (Machine, error) {
	return attachQEMU(ctx, reaper, s, held)
}
