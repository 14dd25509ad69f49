package oci

import (
	"path"
	"strings"
)

const (
	// DefaultCgroup is the parent of containers whose pod names none, and whose
	// cgroups systemd does not manage.
	DefaultCgroup = "/cloister"
	defaultSlice  = "system.slice"
	// scope is what systemd's units of containers start with.
	scope = "cloister"
)

// cgroupsPath names a container's cgroup in the form that the cgroup driver of
// an OCI runtime reads.
func cgroupsPath(parent, id string, systemd bool) string {
	if !systemd {
		if parent == "" {
			parent = DefaultCgroup
		}
		return path.Join("/", parent, id)
	}
	if parent == "" {
		parent = defaultSlice
	}
	return path.Base(parent) + ":" + scope + ":" + id
}

// ContainerCgroup gives the path at which the kernel shows a container's
// cgroup.
func ContainerCgroup(parent, id string, systemd bool) string {
	return KernelCgroup(cgroupsPath(parent, id, systemd))
}

// KernelCgroup gives the path at which the kernel shows what a specification
// calls the cgroup, in either driver's form.
func KernelCgroup(cgroupsPath string) string {
	if parts := strings.Split(cgroupsPath, ":"); len(parts) == 3 { // slice:prefix:name
		return path.Join(ParentCgroup(parts[0]), parts[1]+"-"+parts[2]+".scope")
	}
	return cgroupsPath
}

// ContainerOf gives the id of the container whose cgroup is called name, the
// last part of a path, and name itself when it is none.
func ContainerOf(name string) string {
	return strings.TrimSuffix(strings.TrimPrefix(name, scope+"-"), ".scope")
}

// ParentCgroup gives the path of a cgroup parent in either driver's form: a
// slice stands for the chain of slices that its name spells.
func ParentCgroup(parent string) string {
	base := path.Base(parent)
	name, ok := strings.CutSuffix(base, ".slice")
	if !ok {
		return path.Join("/", parent)
	}
	if name == "-" { // systemd's name of the root
		return "/"
	}
	full := "/"
	for i, c := range name {
		if c == '-' {
			full = path.Join(full, name[:i]+".slice")
		}
	}
	return path.Join(full, base)
}
