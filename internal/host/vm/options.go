package vm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/host/vm/image"
	"cloister.dev/internal/host/vm/machine"
)

// DefaultMemory is what a machine gets that nobody gave a size, in MiB.
const DefaultMemory = 512

// What a handler gets that says nothing.
const (
	defaultCPUs        = 1
	defaultBootSeconds = 60
	defaultOverhead    = 96 // MiB
)

// annotationPrefix is that of Kata's per-pod settings.
const annotationPrefix = "io.katacontainers.config.hypervisor."

// settable are the settings that a pod can change where the handler allows it,
// by the name that stands in enable_annotations.
var settable = map[string]func(o *hostv1.MachineOptions, value string) error{
	"default_vcpus":  func(o *hostv1.MachineOptions, v string) error { return setCount(&o.DefaultVcpus, v) },
	"default_memory": func(o *hostv1.MachineOptions, v string) error { return setCount(&o.DefaultMemory, v) },
	"kernel_params":  func(o *hostv1.MachineOptions, v string) error { o.KernelParams += " " + v; return nil },
	"machine_type":   func(o *hostv1.MachineOptions, v string) error { o.MachineType = v; return nil },
}

func setCount(to *uint32, value string) error {
	n, err := strconv.ParseUint(value, 10, 31)
	if err != nil || n == 0 {
		return fmt.Errorf("%q is not a positive number", value)
	}
	*to = uint32(n)
	return nil
}

// OptionsFile is a file in a sandbox's bundle with the handler's options, for
// clients that cannot send them along: hostv1.MachineOptions as bytes.
const OptionsFile = "cloister-machine"

func bundleOptions(bundle string) ([]byte, error) {
	if bundle == "" {
		return nil, nil
	}
	b, err := os.ReadFile(filepath.Join(bundle, OptionsFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return b, err
}

// readOptions gives the handler's options with what is not said filled in, and
// with the pod's own settings.
func readOptions(extra []byte, annotations map[string]string) (*hostv1.MachineOptions, error) {
	o := &hostv1.MachineOptions{}
	if err := proto.Unmarshal(extra, o); err != nil {
		return nil, fmt.Errorf("read the handler's options: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	for key, value := range annotations {
		name, ours := strings.CutPrefix(key, annotationPrefix)
		if !ours {
			continue
		}
		if !slices.Contains(o.EnableAnnotations, name) {
			return nil, fmt.Errorf("annotation %s is not allowed on this handler; an administrator can add %q to enable_annotations: %w",
				key, name, errdefs.ErrPermissionDenied)
		}
		set := settable[name]
		if set == nil {
			return nil, fmt.Errorf("annotation %s sets nothing that a pod can choose: %w", key, errdefs.ErrInvalidArgument)
		}
		if err := set(o, value); err != nil {
			return nil, fmt.Errorf("annotation %s: %w: %w", key, err, errdefs.ErrInvalidArgument)
		}
	}
	fill(o)
	if o.MachineType != machine.Microvm && o.MachineType != machine.Q35 {
		return nil, fmt.Errorf("machine_type %q: want %s or %s: %w", o.MachineType, machine.Microvm, machine.Q35, errdefs.ErrInvalidArgument)
	}
	if o.ImageLayers != layersShared && o.ImageLayers != layersEROFS {
		return nil, fmt.Errorf("image_layers %q: want %s or %s: %w", o.ImageLayers, layersShared, layersEROFS, errdefs.ErrInvalidArgument)
	}
	return o, nil
}

func fill(o *hostv1.MachineOptions) {
	orString(&o.MachineType, machine.Microvm)
	orString(&o.Accel, "kvm")
	orString(&o.Guest, image.DefaultName)
	orString(&o.ImageLayers, layersShared)
	orCount(&o.DefaultVcpus, defaultCPUs)
	orCount(&o.DefaultMemory, DefaultMemory)
	orCount(&o.BootTimeout, defaultBootSeconds)
	orCount(&o.OverheadMemory, defaultOverhead)
}

func orString(to *string, value string) {
	if *to == "" {
		*to = value
	}
}

func orCount(to *uint32, value uint32) {
	if *to == 0 {
		*to = value
	}
}
