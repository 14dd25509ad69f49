package oci

import (
	"encoding/json"
	"fmt"

	nri "github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/runtime-tools/generate"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Adjust changes a finished spec as NRI plugins want it. Plugins are the
// node's, like the daemon: they may ask for anything that a spec can say.
func Adjust(spec *specs.Spec, a *nri.ContainerAdjustment, node Node) error {
	if a == nil {
		return nil
	}
	if err := editor(spec, node).Adjust(a); err != nil {
		return fmt.Errorf("apply what NRI plugins adjust: %w", err)
	}
	return nil
}

// AdjustResources returns the resources of spec with those of an NRI plugin
// over them. spec is not changed.
func AdjustResources(spec *specs.Spec, r *nri.LinuxResources, node Node) (*specs.LinuxResources, error) {
	// What lies beneath the resources is changed too, so all of it is copied.
	data, err := json.Marshal(spec.Linux.Resources)
	if err != nil {
		return nil, fmt.Errorf("copy resources: %w", err)
	}
	fresh := &specs.Spec{Linux: &specs.Linux{Resources: &specs.LinuxResources{}}}
	if err := json.Unmarshal(data, fresh.Linux.Resources); err != nil {
		return nil, fmt.Errorf("copy resources: %w", err)
	}
	e := editor(fresh, node)
	if err := e.AdjustResources(r); err != nil {
		return nil, err
	}
	if err := e.AdjustBlockIOClass(r.GetBlockioClass().Get()); err != nil {
		return nil, err
	}
	return fresh.Linux.Resources, nil
}

func editor(spec *specs.Spec, node Node) *generate.Generator {
	return generate.SpecGenerator(&specEditor{spec},
		generate.WithBlockIOResolver(func(class string) (*specs.LinuxBlockIO, error) {
			if node.Classes.BlockIO == nil {
				return nil, impossible("blockio class", class, "this node has no blockio classes; set blockio_config_file")
			}
			return node.Classes.BlockIO(class)
		}),
		generate.WithRdtResolver(func(class string) (*specs.LinuxIntelRdt, error) {
			if node.Classes.RDT == nil {
				return nil, errNoRDT
			}
			return &specs.LinuxIntelRdt{ClosID: class}, nil
		}),
		generate.WithResourceChecker(func(r *specs.LinuxResources) error {
			k, err := thisKernel()
			if err == nil && !k.swap && r.Memory != nil {
				r.Memory.Swap = nil // a limit of memory brings one of swap with it
			}
			return err
		}),
		generate.WithCDIDeviceInjector(func(s *specs.Spec, names []string) error { return injectCDI(s, names, node.CDISpecDirs) }),
	)
}

// specEditor makes the single changes that NRI's generator asks for.
type specEditor struct{ spec *specs.Spec }

var _ generate.UnderlyingGenerator = (*specEditor)(nil)

func (e *specEditor) linux() *specs.Linux {
	if e.spec.Linux == nil {
		e.spec.Linux = &specs.Linux{}
	}
	return e.spec.Linux
}

func (e *specEditor) resources() *specs.LinuxResources {
	l := e.linux()
	if l.Resources == nil {
		l.Resources = &specs.LinuxResources{}
	}
	return l.Resources
}

func (e *specEditor) cpu() *specs.LinuxCPU {
	r := e.resources()
	if r.CPU == nil {
		r.CPU = &specs.LinuxCPU{}
	}
	return r.CPU
}

func (e *specEditor) memory() *specs.LinuxMemory {
	r := e.resources()
	if r.Memory == nil {
		r.Memory = &specs.LinuxMemory{}
	}
	return r.Memory
}

func (e *specEditor) process() *specs.Process {
	if e.spec.Process == nil {
		e.spec.Process = &specs.Process{}
	}
	return e.spec.Process
}

func (e *specEditor) hooks() *specs.Hooks {
	if e.spec.Hooks == nil {
		e.spec.Hooks = &specs.Hooks{}
	}
	return e.spec.Hooks
}

func set(m *map[string]string, key, value string) {
	if *m == nil {
		*m = map[string]string{}
	}
	(*m)[key] = value
}
