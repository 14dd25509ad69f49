package plugin

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	v1beta1 "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
	specs "tags.cncf.io/container-device-interface/specs-go"

	"cloister.dev/internal/tee"
)

// cdiVendor is in front of the kind of all devices that are written here. It is
// not the domain of the resource: that vendor may write specifications of its own.
const cdiVendor = "cloister.dev/"

// wholePart names the CDI device of a part without a key.
const wholePart = "all"

// writeCDI writes the specification of a resource and gives the kind of its
// devices, which is empty when there is nothing to specify.
//
// Containers are given the same devices without CDI, too. A runtime that knows
// CDI replaces one by the other, one that does not has the other.
func (p *Plugin) writeCDI(r tee.Resource) (string, error) {
	if p.o.CDIDir == "" {
		return "", nil
	}
	kind := cdiVendor + flat(r.Name)
	spec := &specs.Spec{Kind: kind}
	for _, part := range r.Parts {
		edits := edits(part.Grant)
		if len(edits.DeviceNodes)+len(edits.Mounts)+len(edits.Env) == 0 {
			return "", nil
		}
		spec.Devices = append(spec.Devices, specs.Device{Name: cmp.Or(part.Key, wholePart), ContainerEdits: edits})
	}
	if len(spec.Devices) == 0 {
		return "", nil
	}
	version, err := specs.MinimumRequiredVersion(spec)
	if err != nil {
		return "", fmt.Errorf("CDI specification of %s: %w", r.Name, err)
	}
	spec.Version = version
	data, err := json.Marshal(spec)
	if err != nil {
		return "", fmt.Errorf("CDI specification of %s: %w", r.Name, err)
	}
	if err := replace(p.o.CDIDir, "cloister-"+flat(r.Name)+".json", data); err != nil {
		return "", fmt.Errorf("CDI specification of %s: %w", r.Name, err)
	}
	return kind, nil
}

// replace writes a file so that a reader sees the old or the new one. The
// library's own way leaves its temporary file in a folder that is full.
func replace(dir, name string, data []byte) (err error) {
	path := filepath.Join(dir, name)
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, data) {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, "."+name+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	_, err = f.Write(data)
	if err := errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

func edits(g tee.Grant) specs.ContainerEdits {
	var e specs.ContainerEdits
	for _, d := range g.Devices {
		e.DeviceNodes = append(e.DeviceNodes, &specs.DeviceNode{Path: d.Container, HostPath: d.Host, Permissions: d.Access})
	}
	for _, m := range g.Mounts {
		mode := "rw"
		if m.ReadOnly {
			mode = "ro"
		}
		e.Mounts = append(e.Mounts, &specs.Mount{HostPath: m.Host, ContainerPath: m.Container, Options: []string{"rbind", mode}})
	}
	for k, v := range g.Env {
		e.Env = append(e.Env, k+"="+v)
	}
	slices.Sort(e.Env)
	return e
}

// cdiDevices names the CDI devices of units.
func (e *endpoint) cdiDevices(ids []string) []*v1beta1.CDIDevice {
	now := e.current()
	if now.cdi == "" {
		return nil
	}
	var all []*v1beta1.CDIDevice
	for n, p := range now.state.Parts {
		if slices.ContainsFunc(ids, func(id string) bool { at, _, ok := now.state.Find(id); return ok && at == n }) {
			all = append(all, &v1beta1.CDIDevice{Name: now.cdi + "=" + cmp.Or(p.Key, wholePart)})
		}
	}
	return all
}
