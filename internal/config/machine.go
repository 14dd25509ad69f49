package config

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"

	"github.com/pelletier/go-toml/v2"
)

// MachineType is the runtime_type of handlers whose pods are virtual machines
// of Cloister's own.
const MachineType = "io.containerd.cloister-vm.v2"

// IsMachine tells whether the handler's pods are such virtual machines.
func (h Handler) IsMachine() bool { return h.RuntimeType == MachineType && h.RuntimePath == "" }

// MachineOptions are the options of a handler whose pods are virtual machines,
// under the names of Kata's configuration-qemu.toml where they mean the same.
type MachineOptions struct {
	// Path is QEMU's program. Empty: looked up in PATH.
	Path string `toml:"path"`
	// Guests is the folder of guests, by default "guests" beneath the daemon's root.
	Guests string `toml:"guests"`
	// Guest is the name of a guest that "cloister guest build" made.
	Guest string `toml:"guest"`
	// Kernel is used, with Initrd, instead of a built guest.
	Kernel string `toml:"kernel"`
	// Initrd is used, with Kernel, instead of a built guest.
	Initrd string `toml:"initrd"`
	// KernelParams are added to the guest kernel's command line.
	KernelParams string `toml:"kernel_params"`
	// MachineType is "microvm" (the default) or "q35".
	MachineType string `toml:"machine_type"`
	// Accel is "kvm" (the default), "tcg", or "auto": KVM where it works.
	Accel string `toml:"accel"`
	// DefaultVCPUs are those of a pod without CPU limits.
	DefaultVCPUs uint32 `toml:"default_vcpus"`
	// DefaultMaxVCPUs are the most that a machine may get.
	DefaultMaxVCPUs uint32 `toml:"default_maxvcpus"`
	// DefaultMemory is that of a pod without memory limits, in MiB.
	DefaultMemory uint32 `toml:"default_memory"`
	// DefaultMaxMemory is the most that a machine may get, in MiB.
	DefaultMaxMemory uint32 `toml:"default_maxmemory"`
	// OverheadMemory is what QEMU and virtiofsd use of the pod's cgroup, in MiB.
	OverheadMemory uint32 `toml:"overhead_memory"`
	// SharedFS is "virtio-fs".
	SharedFS string `toml:"shared_fs"`
	// ImageLayers is "virtio-fs" (the default), or "erofs": layers are read-only disks.
	ImageLayers string `toml:"image_layers"`
	// VirtioFSDaemon is virtiofsd's program. Empty: looked up.
	VirtioFSDaemon string `toml:"virtio_fs_daemon"`
	// VirtioFSCache is "auto", "always" or "never".
	VirtioFSCache string `toml:"virtio_fs_cache"`
	// VirtioFSExtraArgs are given to virtiofsd as they are.
	VirtioFSExtraArgs []string `toml:"virtio_fs_extra_args"`
	// EnableAnnotations lists what io.katacontainers.config.hypervisor.* may set for a pod.
	EnableAnnotations []string `toml:"enable_annotations"`
	// BootTimeout is how many seconds a guest may take to answer.
	BootTimeout uint32 `toml:"boot_timeout"`
}

// MachineOptions gives the options types.
func (h Handler) MachineOptions() (MachineOptions, error) {
	var o MachineOptions
	return o, h.DecodeOptions(&o)
}

// checkMachine judges the options' values.
func (h Handler) checkMachine() error {
	o, err := h.MachineOptions()
	if err != nil {
		return err
	}
	for _, c := range []struct {
		name, value string
		allowed     []string
	}{
		{"machine_type", o.MachineType, []string{"", "microvm", "q35"}},
		{"accel", o.Accel, []string{"", "kvm", "tcg", "auto"}},
		{"shared_fs", o.SharedFS, []string{"", "virtio-fs"}},
		{"image_layers", o.ImageLayers, []string{"", "virtio-fs", "erofs"}},
		{"virtio_fs_cache", o.VirtioFSCache, []string{"", "auto", "always", "never"}},
	} {
		if !slices.Contains(c.allowed, c.value) {
			return &optionError{c.name, fmt.Sprintf("the option %s is %q; allowed are %q", c.name, c.value, c.allowed[1:])}
		}
	}
	for name, path := range map[string]string{"guests": o.Guests, "kernel": o.Kernel, "initrd": o.Initrd} {
		if path != "" && !filepath.IsAbs(path) {
			return &optionError{name, fmt.Sprintf("the option %s is %q; it has to be absolute", name, path)}
		}
	}
	if (o.Kernel == "") != (o.Initrd == "") {
		return &optionError{"kernel", "the options kernel and initrd go together"}
	}
	return nil
}

// MachineHandler gives the handler of virtual machines called name; "" is the
// first one in the order of names, or an empty one when there is none.
func (c *Config) MachineHandler(name string) (string, Handler, error) {
	all := c.Runtime.Containerd.Runtimes
	if name != "" {
		h, ok := all[name]
		if !ok || !h.IsMachine() {
			return "", h, fmt.Errorf("the configuration has no handler %q of type %s", name, MachineType)
		}
		return name, h, nil
	}
	for _, n := range slices.Sorted(maps.Keys(all)) {
		if all[n].IsMachine() {
			return n, all[n], nil
		}
	}
	return "", Handler{}, nil
}

// ParseMachineOptions reads a file that holds such options and nothing else.
func ParseMachineOptions(text []byte) (MachineOptions, error) {
	var table map[string]any
	if err := toml.Unmarshal(text, &table); err != nil {
		return MachineOptions{}, fmt.Errorf("read TOML: %w", err)
	}
	h := Handler{RuntimeType: MachineType, Options: table}
	if err := h.checkMachine(); err != nil {
		return MachineOptions{}, err
	}
	return h.MachineOptions()
}
