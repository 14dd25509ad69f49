package vm

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// aDisk finds a block device of this machine.
func aDisk(t *testing.T) (major, minor int64, path string) {
	t.Helper()
	files, err := filepath.Glob("/sys/block/*/dev")
	if err != nil || len(files) == 0 {
		t.Skip("no block device here")
	}
	b, err := os.ReadFile(files[0])
	if err == nil {
		_, err = fmt.Sscanf(string(b), "%d:%d", &major, &minor)
	}
	if err != nil {
		t.Fatal(err)
	}
	return major, minor, "/dev/" + filepath.Base(filepath.Dir(files[0]))
}

func TestTakeDevices(t *testing.T) {
	major, minor, path := aDisk(t)
	rule := func(kind string, major, minor int64, access string) specs.LinuxDeviceCgroup {
		return specs.LinuxDeviceCgroup{Allow: true, Type: kind, Major: &major, Minor: &minor, Access: access}
	}
	all := specs.LinuxDeviceCgroup{Allow: true, Access: "rwm"}
	null := specs.LinuxDevice{Type: "c", Major: 1, Minor: 3, Path: "/dev/null"}
	disk := specs.LinuxDevice{Type: "b", Major: major, Minor: minor, Path: "/dev/x"}
	readable, writable := fmt.Sprintf("b%d-%d-r", major, minor), fmt.Sprintf("b%d-%d-w", major, minor)
	for name, test := range map[string]struct {
		device specs.LinuxDevice
		rules  []specs.LinuxDeviceCgroup
		want   string // the disk's ID
		kept   int
		is     func(error) bool
	}{
		"in every kernel":       {null, []specs.LinuxDeviceCgroup{rule("c", 1, 3, "rwm")}, "", 1, nil},
		"fuse":                  {specs.LinuxDevice{Type: "c", Major: 10, Minor: 229, Path: "/dev/fuse"}, nil, "", 1, nil},
		"a block device":        {disk, []specs.LinuxDeviceCgroup{rule("b", major, minor, "rwm")}, writable, 1, nil},
		"read-only":             {disk, []specs.LinuxDeviceCgroup{rule("b", major, minor, "r")}, readable, 1, nil},
		"privileged":            {disk, []specs.LinuxDeviceCgroup{all}, "", 0, nil},
		"privileged, asked for": {disk, []specs.LinuxDeviceCgroup{all, rule("b", major, minor, "rw")}, writable, 1, nil},
		"no block device":       {specs.LinuxDevice{Type: "c", Major: 195, Path: "/dev/gpu"}, []specs.LinuxDeviceCgroup{rule("c", 195, 0, "rw")}, "", 0, errdefs.IsInvalidArgument},
		"not there":             {specs.LinuxDevice{Type: "b", Major: 4000, Path: "/dev/gone"}, []specs.LinuxDeviceCgroup{rule("b", 4000, 0, "rw")}, "", 0, errdefs.IsNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			l := &specs.Linux{Devices: []specs.LinuxDevice{test.device}, Resources: &specs.LinuxResources{Devices: slices.Clone(test.rules)}}
			volumes, err := takeDevices(l)
			if test.is != nil {
				if !test.is(err) {
					t.Errorf("error is %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if len(l.Devices) != test.kept {
				t.Errorf("devices are %v", l.Devices)
			}
			if test.want == "" {
				if len(volumes) > 0 {
					t.Errorf("volumes are %+v", volumes)
				}
				return
			}
			if len(volumes) != 1 || volumes[0].disk.ID != test.want || volumes[0].disk.Path != path || volumes[0].disk.ReadOnly != (test.want == readable) {
				t.Errorf("volumes are %+v, want %s at %s", volumes, test.want, path)
			}
			for _, r := range l.Resources.Devices {
				if r.Type == "b" {
					t.Errorf("a rule of the node's numbers is left: %+v", r)
				}
			}
		})
	}
}
