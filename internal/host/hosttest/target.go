package hosttest

import (
	"path/filepath"
	"testing"

	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"

	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/host/vm/vmtest"
)

// Target is what the suite runs on: a backend, and what makes it different.
type Target struct {
	Backend string
	Runtime string // OCI runtime of the node; empty: the containers' is elsewhere
	// Machine has all containers run in one virtual machine of this kind.
	Machine *hostv1.MachineOptions
}

// OCI is the container backend with an OCI runtime.
func OCI(runtime string) Target { return Target{Backend: "container", Runtime: runtime} }

// VM is the vm backend with a guest made of this checkout.
func VM(t testing.TB) Target {
	t.Helper()
	agent := t.TempDir()
	if err := build(agent, "cloister.dev/cmd/cloister-agent"); err != nil {
		t.Fatal(err)
	}
	g := vmtest.GuestOf(t, filepath.Join(agent, "cloister-agent"))
	return Target{Backend: "vm", Machine: &hostv1.MachineOptions{Kernel: g.Kernel, Initrd: g.Initrd, Accel: "auto", BootTimeout: 180}}
}

// machineSandbox is the sandbox of a target with a machine.
const machineSandbox = "pod"

func (on Target) sandbox() string {
	if on.Machine == nil {
		return ""
	}
	return machineSandbox
}

// parallel is how many containers are made at a time: a machine has two of its
// 64 streams for each, and may be emulated.
func (on Target) parallel() int {
	if on.Machine != nil {
		return 8
	}
	return 50
}

// lines is how many lines a test writes where n are meant for the node's speed.
// An emulated machine wakes up for some hundred in a second.
func (on Target) lines(n int) int {
	if on.Machine != nil {
		return n / 16
	}
	return n
}

// need is what a test takes for granted.
type need int

const (
	nothing     need = iota
	nodeRuntime      // an OCI runtime that the test can put something in front of
	nodeKernel       // processes and namespaces of containers are the node's
)

func (on Target) lacks(n need) (reason string) {
	switch {
	case n == nodeRuntime && on.Runtime == "":
		return "the OCI runtime of its containers is not the node's"
	case n == nodeKernel && on.Machine != nil:
		return "its processes and namespaces are those of another kernel"
	}
	return ""
}

// startMachine makes the sandbox that all containers are in.
func (s *Shim) startMachine() {
	s.t.Helper()
	options := &hostv1.SandboxOptions{Extra: pack(s.t, s.on.Machine)}
	_, err := s.Sandbox.CreateSandbox(s.ctx(), &sandboxapi.CreateSandboxRequest{SandboxID: machineSandbox, BundlePath: s.Dir, Options: pack(s.t, options)})
	if err == nil {
		_, err = s.Sandbox.StartSandbox(s.ctx(), &sandboxapi.StartSandboxRequest{SandboxID: machineSandbox})
	}
	if err != nil {
		s.t.Fatalf("start the machine: %v", err)
	}
}
