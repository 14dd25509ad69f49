// Package manifest writes the Kubernetes objects that run the device plugin as
// a DaemonSet, and pods that try what it offers. The names in them are those of
// the backend, so that nothing has to be edited but the image.
package manifest

import (
	"bytes"
	_ "embed" // the templates
	"fmt"
	"strings"
	"text/template"

	"github.com/containerd/errdefs"
)

//go:embed daemonset.yaml
var daemonSet string

//go:embed testpod.yaml
var testPod string

// Options choose what is written.
type Options struct {
	Backend   string
	Image     string // of the plugin
	TestImage string // of the test pod
	Resource  string // what the test pod asks for, as the backend calls it
	Precision int    // KiB a unit
	Health    string // interval, as the flag takes it
	Test      bool   // also the test pod
}

// fill is what the templates see.
type fill struct {
	Options
	Selector   string // NAME: "VALUE"
	LabelArg   string // NAME=VALUE
	Privileged bool
	API        bool // it writes the Node object
	Devices    []string
	Folders    []folder
	Units      int
	Memory     bool
}

type folder struct{ Name, Host, Path, Type string }

// Write gives the objects as YAML.
func Write(o Options) ([]byte, error) {
	f := fill{Options: o, Units: 1}
	switch o.Backend {
	case "trustzone":
		f.Selector, f.LabelArg = `teetype: "trustzone"`, "teetype=trustzone"
		// The container opens the TEE's devices itself, and only a privileged one may.
		f.Privileged, f.Memory, f.Units = true, true, 10
		f.Folders = []folder{{"teecd", "/var/itrustee/teecd", "/var/itrustee/teecd", "Directory"}, {"ta", "/data", "/data", "Directory"}}
	case "sgx":
		f.Selector, f.LabelArg = `sgx.intel.com/capable: "true"`, "sgx.intel.com/capable=true"
		f.API = true
		f.Devices = []string{"/dev/sgx_enclave", "/dev/sgx_provision"}
	case "sev", "tdx":
		// A container sees its own cgroup, and misc.capacity is in the root's.
		f.Folders = []folder{{"cgroup", "/sys/fs/cgroup", "/host/sys/fs/cgroup", "Directory"}}
		if o.Backend == "sev" {
			f.Devices = []string{"/dev/sev"}
		}
	case "tpm":
		f.Devices = []string{"/dev/tpmrm0"}
	case "sim":
		f.Memory, f.Units = true, 2
	default:
		return nil, fmt.Errorf("the backend is %q; choose one of trustzone, sgx, sev, tdx, tpm and sim: %w", o.Backend, errdefs.ErrInvalidArgument)
	}
	if f.Selector == "" {
		f.Selector, f.LabelArg = "tee.cloister.dev/"+o.Backend+`: "true"`, "tee.cloister.dev/"+o.Backend+"=true"
	}
	if o.Image == "" || strings.ContainsAny(o.Image+o.TestImage+o.Resource+o.Health, "\n\"'{}") {
		return nil, fmt.Errorf("image %q, test image %q: an image reference has no quotes and is not empty: %w", o.Image, o.TestImage, errdefs.ErrInvalidArgument)
	}
	parts := []string{daemonSet}
	if o.Test {
		parts = append(parts, testPod)
	}
	var out bytes.Buffer
	for n, text := range parts {
		t, err := template.New("manifest").Parse(text)
		if err != nil {
			return nil, fmt.Errorf("template: %w", err)
		}
		if n > 0 {
			out.WriteString("---\n")
		}
		if err := t.Execute(&out, f); err != nil {
			return nil, fmt.Errorf("write the manifest: %w", err)
		}
	}
	return out.Bytes(), nil
}
