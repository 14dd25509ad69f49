// Package guest is the first process of a virtual machine: it makes a bare
// kernel a place where a pod can live, and runs the pod's containers with the
// container backend of the host, as the shim outside asks.
//
// It promises that the end of a process, with its status, is kept until the
// host has noted it, whatever becomes of the connection meanwhile; that output
// is carried without passing any call; and that it never ends while the
// machine runs. A machine that cannot be made a pod says why on its console
// and goes off.
//
// The host is trusted; what containers do is not. Nothing here knows of
// Kubernetes, images or pods' specifications: the host sends configurations
// that hold inside the machine.
//
// Lock order: container.op, then Agent.mu; ports.mu and output.mu are taken
// with nothing else held.
package guest

// Folders of the guest.
const (
	runDir   = "/run/cloister"
	tasksDir = runDir + "/tasks"
)

// Paths that a configuration sent to the guest may name.
const (
	// ShareDir is where the files that the host shares are.
	ShareDir = runDir + "/share"
	// ShmDir is the pod's shared memory.
	ShmDir = runDir + "/shm"
	// PodPIDNamespace is the namespace that the containers of a pod share.
	PodPIDNamespace = runDir + "/pidns"
)

// NoTimer is what the agent says on the console, before it ends the machine,
// when the kernel has no timer to wake anything with: another start may have
// one. A kernel on a busy host fails to measure it now and then.
const NoTimer = "the kernel has found no timer that works"

// TaskPIDNamespace is the PID namespace of a running task.
func TaskPIDNamespace(task string) string { return tasksDir + "/" + task + "/pidns" }
