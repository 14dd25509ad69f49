package check

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/host/proc"
	"cloister.dev/internal/host/vm"
	"cloister.dev/internal/host/vm/image"
	"cloister.dev/internal/host/vm/machine"
	"cloister.dev/internal/host/vm/share"
)

// output runs a program and gives what it printed.
func (c *checks) output(ctx context.Context, program string, args ...string) (string, error) {
	f, err := os.CreateTemp(c.dir, "out-")
	if err != nil {
		return "", err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	exit, err := c.reaper.RunCommand(ctx, proc.Command{Path: program, Args: append([]string{program}, args...), Env: os.Environ(), Dir: "/", Files: [3]*os.File{nil, f, f}})
	if err != nil {
		return "", err
	}
	b, err := os.ReadFile(f.Name())
	if exit.Status != 0 {
		err = fmt.Errorf("%s %s ended with status %d", program, strings.Join(args, " "), exit.Status)
	}
	return string(bytes.TrimSpace(b)), err
}

func firstLine(text string) string {
	line, _, _ := strings.Cut(text, "\n")
	return strings.TrimSpace(line)
}

func (c *checks) findQEMU(ctx context.Context) (string, error) {
	const install = "install qemu-system-x86, or name QEMU in the handler's option path"
	path, err := vm.FindQEMU(c.Machine.GetPath())
	if err != nil {
		return "", err
	}
	version, err := c.output(ctx, path, "--version")
	if err != nil {
		return path, remedy(err, install)
	}
	types, err := c.output(ctx, path, "-machine", "help")
	if err != nil {
		return path, remedy(err, install)
	}
	evidence := path + ", " + firstLine(version)
	if want := c.machineType(); !strings.Contains("\n"+types, "\n"+want+" ") {
		return evidence, remedy(fmt.Errorf("it has no machine type %q", want), "install another QEMU, or choose another machine_type")
	}
	c.qemu = path
	return evidence + ", has machine type " + c.machineType(), nil
}

func (c *checks) machineType() string {
	if t := c.Machine.GetMachineType(); t != "" {
		return t
	}
	return machine.Microvm
}

// findVirtiofsd starts it and ends it.
func (c *checks) findVirtiofsd(ctx context.Context) (string, error) {
	path, err := vm.FindVirtiofsd(c.Machine.GetVirtioFsDaemon())
	if err != nil {
		return "", err
	}
	version, err := c.output(ctx, path, "--version")
	if err != nil {
		return path, err
	}
	dir, err := os.MkdirTemp(c.dir, "fs")
	if err != nil {
		return path, err
	}
	f, err := share.Start(ctx, c.reaper, share.Config{Program: path, Dir: dir, Cache: c.Machine.GetVirtioFsCache(), ExtraArgs: c.Machine.GetVirtioFsExtraArgs()})
	if err != nil {
		return path, err
	}
	if err := f.Stop(ctx); err != nil {
		return path, err
	}
	return path + ", " + firstLine(version) + ", started and ended", nil
}

func (c *checks) findGuest(context.Context) (string, error) {
	if c.Machine.GetKernel() != "" {
		for _, path := range [...]string{c.Machine.GetKernel(), c.Machine.GetInitrd()} {
			if _, err := os.Stat(path); err != nil {
				return "", remedy(err, "mend the handler's options kernel and initrd")
			}
		}
		c.kernel, c.initrd = c.Machine.GetKernel(), c.Machine.GetInitrd()
		return c.kernel + " and " + c.initrd, nil
	}
	name := c.Machine.GetGuest()
	if name == "" {
		name = image.DefaultName
	}
	g, err := image.Open(c.Machine.GetGuests(), name)
	if err != nil {
		return "", remedy(err, "cloister guest build --guests "+c.Machine.GetGuests()+" "+name)
	}
	c.kernel, c.initrd = g.Kernel, g.Initrd
	return fmt.Sprintf("%s: Linux %s, %s, agent %s", g.Name, g.KernelVersion, g.Runtime, g.Agent), nil
}

func (c *checks) config(kind string) (machine.Config, error) {
	dir, err := os.MkdirTemp(c.dir, "m")
	memory := int64(c.Machine.GetDefaultMemory())
	if memory == 0 {
		memory = vm.DefaultMemory
	}
	return machine.Config{ID: "check", QEMU: c.qemu, Type: kind, Accel: machine.TCG, Kernel: c.kernel, Initrd: c.initrd,
		Size: machine.Size{CPUs: max(1, c.Machine.GetDefaultVcpus()), Memory: memory << 20}, Dir: dir}, err
}

// kvm tells whether a guest boots with it; whether that is needed is the
// handler's affair.
func (c *checks) kvm(ctx context.Context) (string, error) {
	cfg, err := c.config(c.machineType())
	if err != nil {
		return "", err
	}
	if _, err := os.Stat("/dev/kvm"); err != nil {
		return "", c.withoutKVM(err, "enable virtualization in the firmware, or nested virtualization where this machine is virtual itself, and load kvm_intel or kvm_amd")
	}
	if c.boot, err = machine.ProbeKVM(ctx, c.reaper, cfg); err != nil {
		return "/dev/kvm is there, and no guest comes up with it", c.withoutKVM(err, "this host's KVM cannot run an ordinary kernel")
	}
	return fmt.Sprintf("booted a kernel in %d ms", c.boot.Milliseconds()), nil
}

// withoutKVM is a failure only where the configuration insists on it.
func (c *checks) withoutKVM(err error, what string) error {
	if a := c.Machine.GetAccel(); a == machine.TCG || a == "auto" {
		return remedy(fmt.Errorf("%w: %w", err, errWarning), what+"; guests are emulated (accel = \""+a+"\"), which is slow")
	}
	return remedy(err, what+"; or set accel = \"auto\", which emulates, slowly, where KVM does not work")
}

// bare boots the kernel emulated.
func (c *checks) bare(ctx context.Context, kind string) (string, error) {
	cfg, err := c.config(kind)
	if err != nil {
		return "", err
	}
	c.boot, err = machine.Bare(ctx, c.reaper, cfg)
	if err == nil {
		return fmt.Sprintf("booted a kernel in %d ms", c.boot.Milliseconds()), nil
	}
	const what = "see the console above; another QEMU or another guest kernel may do"
	if kind != c.machineType() {
		return "", remedy(fmt.Errorf("%w: %w", err, errWarning), what) // no handler uses it
	}
	return "", remedy(err, what)
}

// pod boots a whole pod's machine and asks its agent.
func (c *checks) pod(ctx context.Context) (string, error) {
	dir := filepath.Join(c.dir, "vm")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	extra, err := proto.Marshal(c.Machine)
	if err != nil {
		return "", err
	}
	b := vm.New(dir, c.reaper, c.Log)
	defer b.Close()
	r, err := b.Probe(ctx, &hostv1.ProbeRequest{Extra: &anypb.Any{Value: extra}})
	if err != nil {
		return "", err
	}
	if !r.Works {
		return "", errors.New(r.Reason)
	}
	return fmt.Sprintf("%s, %s: its agent answered after %d ms", r.Path, r.Version, r.Millis), nil
}
