package oci

import (
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/pkg/cap"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// defaultCapabilities are the fourteen that Docker and containerd give, in the
// kernel's order.
func defaultCapabilities() []string {
	return []string{
		"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL",
		"CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE",
		"CAP_NET_RAW", "CAP_SYS_CHROOT", "CAP_MKNOD", "CAP_AUDIT_WRITE",
		"CAP_SETFCAP",
	}
}

// setCapabilities writes the sets. Inheritable stays empty but for ambient
// capabilities, which the kernel takes from nowhere else.
func (b *builder) setCapabilities() error {
	// A new user namespace owns all capabilities, whatever this process has.
	available := b.k.held
	if b.userNamespace() {
		available = b.k.known
	}
	p := b.spec.Process
	base := defaultCapabilities()
	if b.in.Handler.BaseSpec != "" && p.Capabilities != nil {
		base = p.Capabilities.Bounding
	}
	set, ambient := available, []string(nil)
	if !b.sc.GetPrivileged() {
		var err error
		if set, ambient, err = b.changeCapabilities(base, available); err != nil {
			return err
		}
	}
	p.Capabilities = &specs.LinuxCapabilities{
		Bounding:    slices.Clone(set),
		Effective:   slices.Clone(set),
		Permitted:   slices.Clone(set),
		Inheritable: slices.Clone(ambient),
		Ambient:     slices.Clone(ambient),
	}
	return nil
}

// changeCapabilities applies add and drop; ALL comes first, so that the names
// beside it refine it.
func (b *builder) changeCapabilities(base, available []string) (set, ambient []string, err error) {
	c := b.sc.GetCapabilities()
	add, err := b.capabilities("add_capabilities", c.GetAddCapabilities())
	if err != nil {
		return nil, nil, err
	}
	drop, err := b.capabilities("drop_capabilities", c.GetDropCapabilities())
	if err != nil {
		return nil, nil, err
	}
	if ambient, err = b.capabilities("add_ambient_capabilities", c.GetAddAmbientCapabilities()); err != nil {
		return nil, nil, err
	}
	set = slices.Clone(base)
	if hasAll(c.GetAddCapabilities()) || hasAll(c.GetAddAmbientCapabilities()) {
		set = slices.Clone(available)
	}
	if hasAll(c.GetDropCapabilities()) {
		set = nil
	} else if hasAll(c.GetAddAmbientCapabilities()) {
		ambient = append(ambient, available...)
	}
	for _, name := range slices.Concat(add, ambient) {
		if !slices.Contains(available, name) {
			return nil, nil, impossible("capability", name, "this node cannot give it: the kernel or the daemon itself does not have it; remove it from the container")
		}
	}
	dropped := func(name string) bool { return slices.Contains(drop, name) }
	set = slices.DeleteFunc(slices.Concat(set, add, ambient), dropped)
	ambient = slices.DeleteFunc(ambient, dropped)
	return inKernelOrder(set), inKernelOrder(ambient), nil
}

// capabilities turns CRI names ("NET_ADMIN", also "CAP_NET_ADMIN", in any
// case) into the kernel's and leaves ALL out.
func (b *builder) capabilities(field string, names []string) ([]string, error) {
	var list []string
	for _, name := range names {
		if strings.EqualFold(name, "ALL") {
			continue
		}
		full, err := capabilityName(field, name)
		if err != nil {
			return nil, err
		}
		list = append(list, full)
	}
	return list, nil
}

func capabilityName(field, name string) (string, error) {
	full := "CAP_" + strings.TrimPrefix(strings.ToUpper(name), "CAP_")
	if !slices.Contains(cap.Known(), full) {
		return "", invalid(field, name, "no such capability; see capabilities(7), written without CAP_")
	}
	return full, nil
}

func checkCapabilities(c *runtimeapi.Capability) error {
	lists := []struct {
		field string
		names []string
	}{
		{"add_capabilities", c.GetAddCapabilities()},
		{"drop_capabilities", c.GetDropCapabilities()},
		{"add_ambient_capabilities", c.GetAddAmbientCapabilities()},
	}
	for _, l := range lists {
		if len(l.names) > maxRepeated {
			return invalid("number of "+l.field, len(l.names), "too many")
		}
		for _, name := range l.names {
			if strings.EqualFold(name, "ALL") {
				continue
			}
			if _, err := capabilityName(l.field, name); err != nil {
				return err
			}
		}
	}
	return nil
}

func hasAll(names []string) bool {
	return slices.ContainsFunc(names, func(n string) bool { return strings.EqualFold(n, "ALL") })
}

// inKernelOrder makes equal sets equal lists.
func inKernelOrder(set []string) []string {
	var ordered []string
	for _, name := range cap.Known() {
		if slices.Contains(set, name) {
			ordered = append(ordered, name)
		}
	}
	return ordered
}
