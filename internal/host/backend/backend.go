// Package backend says what a way to isolate containers has to do. It promises
// nothing itself and knows neither who asks, the services of package host or the
// agent in a guest, nor how it is done.
package backend

import (
	"context"
	"os"

	"google.golang.org/protobuf/types/known/anypb"

	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/host/proc"
)

// Backend is a way to isolate containers. The host keeps what all ways have in
// common: the table of tasks, records on disk, streams, logs, exits, and the
// services that clients see. A backend makes processes run.
//
// # Terms
//
// A task is a container; its first process is init. A process of a task is
// named by Process, which a backend makes and the host stores on disk, so that
// a later life of this program can hand it back. A sandbox groups tasks.
//
// # Life
//
//	Create ─▶ (init exists, waits) ─▶ Start ─▶ (init runs) ─▶ exited(…) ─▶ Settle ─▶ Delete
//
// With TaskSpec.RunOnStart the host leaves Create out, and Start does both.
// The host calls Create, Start, Delete, Pause, Resume and Update of one task
// one after the other, never two at the same time; everything else, and calls
// for different tasks, come concurrently. No call may serialize tasks.
//
// # Exits
//
// Create, Start and Exec receive a function exited. The backend calls it once
// for the process that they return, possibly before they return, never when
// they fail. When it returns, the exit is on disk; only after that may the
// backend let the kernel (or the guest) forget the process. It must not be
// called with a lock held that another call of the backend needs.
// After the host itself was killed, Watch takes the place of these three.
//
// # Files
//
// A backend may keep files of its own in TaskSpec.Dir under names that begin
// with "backend"; the host removes the folder after Delete. Streams given to a
// backend belong to the host, which closes them when the call returns; the
// processes must have their own references by then.
//
// # Errors
//
// Errors are typed with errdefs. Delete and StopSandbox succeed on what is not
// there. A failed Create or Start leaves nothing behind.
type Backend interface {
	// Name is "container", "vm" or "enclave".
	Name() string
	// Probe runs a micro container and tells what works.
	Probe(ctx context.Context, r *hostv1.ProbeRequest) (*hostv1.ProbeResponse, error)

	Create(ctx context.Context, t *TaskSpec, s Streams, exited func(proc.Exit)) (Started, error)
	Start(ctx context.Context, t *TaskSpec, s Streams, exited func(proc.Exit)) (Started, error)
	// Exec runs one more process in a running task. process is an OCI
	// Process as JSON; id names the exec within the task.
	Exec(ctx context.Context, t *TaskSpec, id string, process []byte, s Streams, exited func(proc.Exit)) (Started, error)
	// Watch goes on watching a process of an earlier life. held is the
	// surviving Pidfd or nil. It gives the Pidfd to hold from now on.
	Watch(t *TaskSpec, p Process, held *os.File, exited func(proc.Exit)) *os.File
	// Find tells what became of a Create (or Start) that a killed host had
	// begun: the process when it was made after all. When it was not, or only
	// by half, Find cleans up, and found is false.
	Find(ctx context.Context, t *TaskSpec, exited func(proc.Exit)) (s Started, found bool, err error)
	// Settle is called when init has exited. Nothing of the task runs any more
	// when it returns. It tells whether the kernel killed for want of memory.
	Settle(ctx context.Context, t *TaskSpec, init Process) (oom bool, err error)
	// Delete removes all that is left of a task whose init is not running.
	Delete(ctx context.Context, t *TaskSpec) error

	// Signal sends a signal to a process, or to all of the task (all). A
	// process that has gone is errdefs.ErrNotFound.
	Signal(ctx context.Context, t *TaskSpec, p Process, signal int, all bool) error
	Pause(ctx context.Context, t *TaskSpec) error
	Resume(ctx context.Context, t *TaskSpec) error
	// Update changes resources, an OCI LinuxResources as JSON.
	Update(ctx context.Context, t *TaskSpec, resources []byte) error
	Pids(ctx context.Context, t *TaskSpec, init Process) ([]int, error)
	// Stats gives cgroup metrics as containerd's shims do.
	Stats(ctx context.Context, t *TaskSpec, init Process) (*anypb.Any, error)

	// StartSandbox makes what the sandbox itself needs; the Process has pid 0
	// when that is no process.
	StartSandbox(ctx context.Context, s *SandboxSpec, exited func(proc.Exit)) (Started, error)
	StopSandbox(ctx context.Context, s *SandboxSpec, p Process) error
}

// TerminalResizer is a backend whose Started.Console is no terminal itself.
type TerminalResizer interface {
	ResizeTerminal(ctx context.Context, t *TaskSpec, p Process, width, height uint32) error
}

// Process names a process of a task for good.
type Process struct {
	Pid   int    `json:"pid,omitempty"`
	Start uint64 `json:"start,omitempty"` // what tells it from a later one of the same pid
	// Place is where the backend finds the process's resources; opaque.
	Place string `json:"place,omitempty"`
}

// Started is a process that runs.
type Started struct {
	Process
	// Pidfd is held (and given to the keeper) as long as the task exists: the
	// kernel can tell the status of a dead process through it. May be nil.
	Pidfd *os.File
	// Console is the master of the terminal, non-blocking, when the process
	// has one.
	Console *os.File
}

// Streams are the standard streams for a process without a terminal. A nil
// one is /dev/null.
type Streams struct {
	Stdin, Stdout, Stderr *os.File
	// Terminal asks for a terminal instead.
	Terminal bool
}

// Close closes the files that are there.
func (s Streams) Close() {
	for _, f := range [...]*os.File{s.Stdin, s.Stdout, s.Stderr} {
		if f != nil {
			f.Close()
		}
	}
}

// TaskSpec is what a backend is told of a task. It is on disk.
type TaskSpec struct {
	ID         string  `json:"id"`
	Bundle     string  `json:"bundle"`
	Dir        string  `json:"dir"`
	Terminal   bool    `json:"terminal,omitempty"`
	Rootfs     []Mount `json:"rootfs,omitempty"`
	Runtime    Runtime `json:"runtime"`
	RunOnStart bool    `json:"runOnStart,omitempty"`
	// Sandbox is the task's sandbox and TargetTask the one whose PID namespace
	// it joins, as far as the client told.
	Sandbox    string `json:"sandbox,omitempty"`
	TargetTask string `json:"targetTask,omitempty"`
}

// Runtime says which OCI runtime runs a task.
type Runtime struct {
	Binary        string `json:"binary,omitempty"` // path or name; empty: the backend's choice
	Root          string `json:"root,omitempty"`
	SystemdCgroup bool   `json:"systemdCgroup,omitempty"`
	NoNewKeyring  bool   `json:"noNewKeyring,omitempty"`
	NoPivotRoot   bool   `json:"noPivotRoot,omitempty"`
	// NoCgroup runs containers without a cgroup where the runtime can; the
	// others make one as they like.
	NoCgroup bool `json:"noCgroup,omitempty"`
}

// Mount is a file system to mount for a task.
type Mount struct {
	Type    string   `json:"type,omitempty"`
	Source  string   `json:"source,omitempty"`
	Target  string   `json:"target,omitempty"`
	Options []string `json:"options,omitempty"`
}

// SandboxSpec is what a backend is told of a sandbox. It is on disk.
type SandboxSpec struct {
	ID            string            `json:"id"`
	Bundle        string            `json:"bundle,omitempty"`
	Dir           string            `json:"dir"`
	NetNS         string            `json:"netns,omitempty"`
	SharePID      bool              `json:"sharePid,omitempty"`
	UserNamespace string            `json:"userNamespace,omitempty"`
	CgroupPath    string            `json:"cgroupPath,omitempty"`
	Annotations   map[string]string `json:"annotations,omitempty"`
	Extra         []byte            `json:"extra,omitempty"` // an Any for the backend alone

	// What concerns sandboxes with a kernel of their own.
	NodeNamespaces []string          `json:"nodeNamespaces,omitempty"` // "network", "pid", "ipc"
	Hostname       string            `json:"hostname,omitempty"`
	Sysctls        map[string]string `json:"sysctls,omitempty"`
	CPUQuota       int64             `json:"cpuQuota,omitempty"` // sums of all containers' limits
	CPUPeriod      int64             `json:"cpuPeriod,omitempty"`
	MemoryLimit    int64             `json:"memoryLimit,omitempty"`
}
