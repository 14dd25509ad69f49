package oci

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	ctroci "github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"tags.cncf.io/container-device-interface/pkg/cdi"
	"tags.cncf.io/container-device-interface/pkg/parser"

	"github.com/containerd/errdefs"
)

// setDevices adds the devices of the request and, for a privileged container,
// the node's.
func (b *builder) setDevices() error {
	l := b.spec.Linux
	before := len(l.Resources.Devices)
	for _, d := range b.in.Config.GetDevices() {
		if err := b.addDevice(d); err != nil {
			return err
		}
	}
	if !b.sc.GetPrivileged() {
		return nil
	}
	// The rules of the request stay: by them a runtime with a kernel of its own
	// tells what was asked for from what a privileged container gets besides.
	allow := append([]specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}, l.Resources.Devices[before:]...)
	if b.in.Handler.PrivilegedWithoutHostDevices {
		if b.in.Handler.PrivilegedAllDevices {
			l.Resources.Devices = allow
		}
		return nil
	}
	host, err := ctroci.HostDevices()
	if err != nil {
		return fmt.Errorf("list the node's devices: %w", err)
	}
	for _, d := range host {
		if !slices.ContainsFunc(l.Devices, func(o specs.LinuxDevice) bool { return o.Path == d.Path }) {
			l.Devices = append(l.Devices, d)
		}
	}
	l.Resources.Devices = allow
	return nil
}

// addDevice adds a device node, or all of a folder, with its cgroup rule.
func (b *builder) addDevice(d *runtimeapi.Device) error {
	host, err := filepath.EvalSymlinks(d.GetHostPath())
	if err != nil {
		return impossible("host_path of device", d.GetHostPath(), "cannot follow it: "+err.Error())
	}
	before := len(b.spec.Linux.Devices)
	at := d.GetContainerPath()
	if at == "" {
		at = d.GetHostPath()
	}
	add := ctroci.WithDevices(host, inContainer(at), d.GetPermissions())
	if err := add(context.Background(), nil, nil, b.spec); err != nil {
		if errors.Is(err, ctroci.ErrNotADevice) {
			return invalid("host_path of device", d.GetHostPath(), "it is not a device node; mount it instead")
		}
		return fmt.Errorf("device %s: %w", show(d.GetHostPath()), err)
	}
	if b.in.Node.DeviceOwnership {
		for i := range b.spec.Linux.Devices[before:] {
			b.own(&b.spec.Linux.Devices[before+i])
		}
	}
	return nil
}

// own gives a device to the container's user where the request names one.
func (b *builder) own(d *specs.LinuxDevice) {
	if u := b.sc.GetRunAsUser(); u.GetValue() != 0 {
		uid := uint32(u.GetValue())
		d.UID = &uid
	}
	if g := b.sc.GetRunAsGroup(); g.GetValue() != 0 {
		gid := uint32(g.GetValue())
		d.GID = &gid
	}
}

// injectCDI edits the finished spec as the vendors' CDI files say.
func (b *builder) injectCDI() error {
	names, err := b.cdiNames()
	if err != nil || len(names) == 0 {
		return err
	}
	return injectCDI(b.spec, names, b.in.Node.CDISpecDirs)
}

func injectCDI(spec *specs.Spec, names, folders []string) error {
	if len(folders) == 0 {
		return impossible("CDI_devices", strings.Join(names, " "), "this node has no CDI folders; set cdi_spec_dirs")
	}
	cache, err := cdi.NewCache(cdi.WithSpecDirs(folders...), cdi.WithAutoRefresh(false))
	if err != nil {
		return fmt.Errorf("read the CDI folders: %w", err)
	}
	unresolved, err := cache.InjectDevices(spec, names...)
	if len(unresolved) > 0 {
		return fmt.Errorf("CDI_devices %s: no file in %s describes them; install the vendor's driver or generate its CDI file: %w",
			show(strings.Join(unresolved, " ")), strings.Join(folders, " "), errdefs.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("apply CDI devices: %w", err)
	}
	return nil
}

// cdiNames are the devices of the typed field and, where the administrator
// trusts them, of the container's annotations. Annotations can come from a
// checkpoint (CVE-2026-53492), those of a pod from any user, and those of an
// image from anybody.
func (b *builder) cdiNames() ([]string, error) {
	var names []string
	for _, d := range b.in.Config.GetCDIDevices() {
		names = append(names, d.GetName())
	}
	_, annotated, err := cdi.ParseAnnotations(b.in.Config.GetAnnotations())
	switch {
	case b.in.Node.TrustCDIAnnotations && err != nil:
		return nil, invalid("annotations of the container", cdi.AnnotationPrefix, err.Error())
	case b.in.Node.TrustCDIAnnotations:
		names = append(names, annotated...)
	case len(annotated) > 0:
		b.warn("CDI devices %s of annotations are ignored: set cdi_annotations in [cloister] to trust them", show(strings.Join(annotated, " ")))
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

func checkDevices(cfg *runtimeapi.ContainerConfig) error {
	if n := len(cfg.GetDevices()) + len(cfg.GetCDIDevices()); n > maxRepeated {
		return invalid("number of devices", n, "too many")
	}
	for _, d := range cfg.GetDevices() {
		if d == nil {
			return missing("an entry of devices")
		}
		if !filepath.IsAbs(d.GetHostPath()) {
			return invalid("host_path of device", d.GetHostPath(), "give an absolute path")
		}
		for _, path := range []string{d.GetHostPath(), d.GetContainerPath()} {
			if err := checkPath("path of device", path); err != nil {
				return err
			}
		}
		p := d.GetPermissions()
		if p == "" || strings.Trim(p, "rwm") != "" || len(p) > 3 {
			return invalid("permissions of device", p, "give one or more of r, w and m")
		}
	}
	for _, d := range cfg.GetCDIDevices() {
		if len(d.GetName()) > maxPath || !parser.IsQualifiedName(d.GetName()) {
			return invalid("CDI_devices", d.GetName(), "give a name of the form vendor.com/class=device")
		}
	}
	return nil
}
