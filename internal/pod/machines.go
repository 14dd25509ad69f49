package pod

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
)

// Machine is a pod's virtual machine.
type Machine struct {
	Pod                        string
	Pid                        uint32 // of QEMU
	Type, Accel, Kernel, State string
	CPUs                       uint32
	Memory                     int64
	BootMillis                 int64
	Console                    []byte
}

// Machines lists the virtual machines of pods, or that of one, with the end of
// each console when asked for.
func (s *Service) Machines(ctx context.Context, pod string, console bool) ([]Machine, error) {
	if pod != "" {
		if err := s.isMachine(pod); err != nil {
			return nil, err
		}
	}
	if !s.hasMachines() {
		return nil, nil
	}
	list, err := s.o.Shims.Machines(ctx, pod, console)
	if err != nil {
		return nil, err
	}
	var all []Machine
	for _, m := range list {
		all = append(all, Machine{Pod: m.SandboxId, Pid: m.Pid, Type: m.MachineType, Accel: m.Accel, Kernel: m.Kernel, State: m.State,
			CPUs: m.Cpus, Memory: m.Memory, BootMillis: m.BootMillis, Console: m.Console})
	}
	return all, nil
}

// hasMachines tells whether any pod is a virtual machine; without one the shim
// need not be asked, nor started.
func (s *Service) hasMachines() bool {
	for _, sb := range s.index.allSandboxes() {
		if sb.handler != nil && sb.handler.Machine() {
			return true
		}
	}
	return false
}

func (s *Service) isMachine(pod string) error {
	sb, err := s.index.sandbox(pod)
	if err != nil {
		return err
	}
	if sb.handler == nil || !sb.handler.Machine() {
		return fmt.Errorf("pod sandbox %.13s is no virtual machine: %w", pod, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// MachineRun is what a program in a guest ended with.
type MachineRun struct {
	Status         int32
	Stdout, Stderr []byte
}

// RunInMachine runs a program of a pod's guest; without arguments it gives the
// guest's figures.
func (s *Service) RunInMachine(ctx context.Context, pod string, args []string) (MachineRun, error) {
	if err := s.isMachine(pod); err != nil {
		return MachineRun{}, err
	}
	r, err := s.o.Shims.RunInMachine(ctx, pod, args)
	if err != nil {
		return MachineRun{}, err
	}
	return MachineRun{Status: r.Status, Stdout: r.Stdout, Stderr: r.Stderr}, nil
}
