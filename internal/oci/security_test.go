package oci

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestCapabilities(t *testing.T) {
	all := testKernel().held
	without := func(from []string, names ...string) []string {
		return slices.DeleteFunc(slices.Clone(from), func(n string) bool { return slices.Contains(names, n) })
	}
	ordered := inKernelOrder
	for name, c := range map[string]struct {
		add, drop, ambient []string
		want, wantAmbient  []string
	}{
		"default":                {want: defaultCapabilities()},
		"add":                    {add: []string{"sys_admin"}, want: append(defaultCapabilities(), "CAP_SYS_ADMIN")},
		"add with prefix":        {add: []string{"CAP_NET_ADMIN"}, want: append(defaultCapabilities(), "CAP_NET_ADMIN")},
		"add twice":              {add: []string{"CHOWN", "CHOWN"}, want: defaultCapabilities()},
		"drop":                   {drop: []string{"NET_RAW"}, want: without(defaultCapabilities(), "CAP_NET_RAW")},
		"drop what is not there": {drop: []string{"SYS_BOOT"}, want: defaultCapabilities()},
		"drop all":               {drop: []string{"all"}},
		"drop all but":           {drop: []string{"ALL"}, add: []string{"CHOWN"}, want: []string{"CAP_CHOWN"}},
		"add all":                {add: []string{"ALL"}, want: all},
		"add all but":            {add: []string{"ALL"}, drop: []string{"CHOWN"}, want: without(all, "CAP_CHOWN")},
		"add and drop":           {add: []string{"SYS_ADMIN"}, drop: []string{"SYS_ADMIN"}, want: defaultCapabilities()},
		"ambient":                {drop: []string{"ALL"}, ambient: []string{"NET_BIND_SERVICE"}, want: []string{"CAP_NET_BIND_SERVICE"}, wantAmbient: []string{"CAP_NET_BIND_SERVICE"}},
		"ambient dropped":        {drop: []string{"CHOWN"}, ambient: []string{"CHOWN"}, want: without(defaultCapabilities(), "CAP_CHOWN")},
		"ambient all":            {ambient: []string{"ALL"}, want: all, wantAmbient: all},
	} {
		t.Run(name, func(t *testing.T) {
			in := typical(t)
			security(in).Capabilities = &runtimeapi.Capability{AddCapabilities: c.add, DropCapabilities: c.drop, AddAmbientCapabilities: c.ambient}
			got := build(t, in).Spec.Process.Capabilities
			want := ordered(c.want)
			for _, set := range [][]string{got.Bounding, got.Effective, got.Permitted} {
				if !slices.Equal(set, want) {
					t.Errorf("set is %v, want %v", set, want)
				}
			}
			for _, set := range [][]string{got.Ambient, got.Inheritable} {
				if !slices.Equal(set, c.wantAmbient) {
					t.Errorf("ambient or inheritable is %v, want %v", set, c.wantAmbient)
				}
			}
		})
	}
	in := typical(t)
	security(in).Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"NONSENSE"}}
	refuse(t, in, errdefs.ErrInvalidArgument, "NONSENSE")
	security(in).Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"SYS_TIME"}}
	refuse(t, in, errdefs.ErrFailedPrecondition, "CAP_SYS_TIME")
}

func TestDefaultCapabilitiesAreFourteen(t *testing.T) {
	if got := inKernelOrder(defaultCapabilities()); len(got) != 14 || !slices.Equal(got, defaultCapabilities()) {
		t.Errorf("defaults are %v", got)
	}
}

func TestSeccomp(t *testing.T) {
	root := t.TempDir()
	write(t, filepath.Join(root, "p/ok.json"), `{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW"}]}`)
	outside := filepath.Join(t.TempDir(), "outside.json")
	write(t, outside, `{"defaultAction":"SCMP_ACT_ALLOW"}`)
	if err := os.Symlink(outside, filepath.Join(root, "link.json")); err != nil {
		t.Fatal(err)
	}
	const (
		def        = runtimeapi.SecurityProfile_RuntimeDefault
		unconfined = runtimeapi.SecurityProfile_Unconfined
		local      = runtimeapi.SecurityProfile_Localhost
	)
	for name, c := range map[string]struct {
		profile *runtimeapi.SecurityProfile
		old     string
		node    string
		want    specs.LinuxSeccompAction // empty: no filter
		calls   int                      // exact number of rules when positive
		bad     error
	}{
		"none":              {},
		"node's default":    {node: "runtime/default", want: specs.ActErrno},
		"default":           {profile: &runtimeapi.SecurityProfile{ProfileType: def}, want: specs.ActErrno},
		"unconfined":        {profile: &runtimeapi.SecurityProfile{ProfileType: unconfined}, node: "runtime/default"},
		"old default":       {old: "runtime/default", want: specs.ActErrno},
		"old docker":        {old: "docker/default", want: specs.ActErrno},
		"old unconfined":    {old: "unconfined", node: "runtime/default"},
		"old local":         {old: "localhost/p/ok.json", want: specs.ActErrno, calls: 1},
		"old nonsense":      {old: "p/ok.json", bad: errdefs.ErrInvalidArgument},
		"local relative":    {profile: &runtimeapi.SecurityProfile{ProfileType: local, LocalhostRef: "p/ok.json"}, want: specs.ActErrno, calls: 1},
		"local absolute":    {profile: &runtimeapi.SecurityProfile{ProfileType: local, LocalhostRef: filepath.Join(root, "p/ok.json")}, want: specs.ActErrno, calls: 1},
		"local climbs":      {profile: &runtimeapi.SecurityProfile{ProfileType: local, LocalhostRef: "../x"}, bad: errdefs.ErrInvalidArgument},
		"local link":        {profile: &runtimeapi.SecurityProfile{ProfileType: local, LocalhostRef: "link.json"}, bad: errdefs.ErrFailedPrecondition},
		"local absent":      {profile: &runtimeapi.SecurityProfile{ProfileType: local, LocalhostRef: "absent.json"}, bad: errdefs.ErrFailedPrecondition},
		"local folder":      {profile: &runtimeapi.SecurityProfile{ProfileType: local, LocalhostRef: "p"}, bad: errdefs.ErrFailedPrecondition},
		"local empty":       {profile: &runtimeapi.SecurityProfile{ProfileType: local}, bad: errdefs.ErrInvalidArgument},
		"default with ref":  {profile: &runtimeapi.SecurityProfile{ProfileType: def, LocalhostRef: "x"}, bad: errdefs.ErrInvalidArgument},
		"unknown type":      {profile: &runtimeapi.SecurityProfile{ProfileType: 7}, bad: errdefs.ErrInvalidArgument},
		"typed beats old":   {profile: &runtimeapi.SecurityProfile{ProfileType: unconfined}, old: "runtime/default"},
		"no seccomp wanted": {old: "unconfined"},
	} {
		t.Run(name, func(t *testing.T) {
			in := typical(t)
			security(in).Seccomp, security(in).SeccompProfilePath = c.profile, c.old //nolint:staticcheck // old kubelets
			in.Node.DefaultSeccomp, in.Node.SeccompProfileRoot = c.node, root
			if c.bad != nil {
				refuse(t, in, c.bad)
				return
			}
			got := build(t, in).Spec.Linux.Seccomp
			switch {
			case c.want == "" && got != nil:
				t.Errorf("filter %v, want none", got.DefaultAction)
			case c.want != "" && (got == nil || got.DefaultAction != c.want):
				t.Errorf("filter %+v, want %v", got, c.want)
			case c.calls > 0 && len(got.Syscalls) != c.calls:
				t.Errorf("filter has %d rules, want %d", len(got.Syscalls), c.calls)
			}
		})
	}
	in := typical(t)
	in.Node.Seccomp = false
	refuse(t, in, errdefs.ErrFailedPrecondition, "no seccomp")
}

func TestDefaultSeccompFollowsCapabilities(t *testing.T) {
	allows := func(in Input, call string) bool {
		return slices.ContainsFunc(build(t, in).Spec.Linux.Seccomp.Syscalls, func(r specs.LinuxSyscall) bool {
			return r.Action == specs.ActAllow && len(r.Args) == 0 && slices.Contains(r.Names, call)
		})
	}
	in := typical(t)
	if allows(in, "mount") || !allows(in, "openat") {
		t.Error("an ordinary container may mount, or not open files")
	}
	security(in).Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"SYS_ADMIN"}}
	if !allows(in, "mount") {
		t.Error("a container with SYS_ADMIN may not mount")
	}
}

func TestParseSeccomp(t *testing.T) {
	for _, bad := range []string{
		``, `[]`, `{}`, `{"defaultAction":"SCMP_ACT_NOTHING"}`,
		`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"]}]}`,
		`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"action":"SCMP_ACT_ALLOW"}]}`,
	} {
		if p, err := parseSeccomp([]byte(bad)); err == nil {
			t.Errorf("%s became %+v", bad, p)
		}
	}
}

func FuzzSeccomp(f *testing.F) {
	f.Add([]byte(`{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64"],"syscalls":[{"names":["a"],"action":"SCMP_ACT_ALLOW","args":[{"index":1,"value":2,"op":"SCMP_CMP_EQ"}]}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if p, err := parseSeccomp(data); err == nil && p.DefaultAction == "" {
			t.Error("a profile without default action")
		}
	})
}

func TestAppArmor(t *testing.T) {
	list := filepath.Join(t.TempDir(), "profiles")
	write(t, list, "mine (enforce)\nmine-too (complain)\n")
	k := testKernel()
	k.appArmorProfiles = list
	for name, c := range map[string]struct {
		profile    *runtimeapi.SecurityProfile
		old        string
		privileged bool
		want       string
		isDefault  bool
		bad        error
	}{
		"none":               {want: DefaultAppArmorProfile, isDefault: true},
		"default":            {profile: &runtimeapi.SecurityProfile{}, want: DefaultAppArmorProfile, isDefault: true},
		"default privileged": {privileged: true},
		"unconfined":         {profile: &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}},
		"loaded":             {profile: &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "mine"}, want: "mine"},
		"loaded privileged":  {old: "localhost/mine", privileged: true, want: "mine"},
		"prefix of a name":   {old: "localhost/min", bad: errdefs.ErrFailedPrecondition},
		"nonsense":           {old: "mine", bad: errdefs.ErrInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			in := typical(t)
			in.Node.AppArmor = true
			in.Sandbox.Linux.SecurityContext.Privileged = c.privileged
			security(in).Privileged, security(in).Apparmor, security(in).ApparmorProfile = c.privileged, c.profile, c.old //nolint:staticcheck // old kubelets
			res, err := container(in, k)
			if c.bad != nil {
				wantError(t, err, c.bad, "min")
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if res.Spec.Process.ApparmorProfile != c.want || res.DefaultAppArmor != c.isDefault {
				t.Errorf("profile is %q, default %v", res.Spec.Process.ApparmorProfile, res.DefaultAppArmor)
			}
		})
	}
	in := typical(t)
	security(in).Apparmor = &runtimeapi.SecurityProfile{}
	refuse(t, in, errdefs.ErrFailedPrecondition, "no AppArmor")
	security(in).Apparmor.ProfileType = runtimeapi.SecurityProfile_Unconfined
	build(t, in)
}

func TestSELinuxShape(t *testing.T) {
	in := typical(t)
	security(in).SelinuxOptions = &runtimeapi.SELinuxOption{User: "u", Role: "r", Type: "t", Level: "s0:c1.c3,c9"}
	if s := build(t, in).Spec; s.Process.SelinuxLabel != "" || s.Linux.MountLabel != "" {
		t.Error("there is a label where SELinux is off")
	}
	for _, o := range []*runtimeapi.SELinuxOption{{Level: "s0:c99999"}, {Level: "s0\n"}, {Type: "a:b"}, {User: "a b"}, {Role: strings.Repeat("r", 300)}} {
		security(in).SelinuxOptions = o
		refuse(t, in, errdefs.ErrInvalidArgument, "selinux_options")
	}
}

func TestDevices(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink("/dev/null", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	in := typical(t)
	in.Config.Devices = []*runtimeapi.Device{
		{HostPath: filepath.Join(dir, "link"), ContainerPath: "/dev/mine", Permissions: "rw"},
		{HostPath: "/dev/zero", Permissions: "r"},
	}
	in.Node.DeviceOwnership = true
	l := build(t, in).Spec.Linux
	if len(l.Devices) != 2 || l.Devices[0].Path != "/dev/mine" || l.Devices[0].Minor != 3 || l.Devices[1].Path != "/dev/zero" || *l.Devices[1].UID != 1000 {
		t.Errorf("devices are %+v", l.Devices)
	}
	if d := l.Resources.Devices; len(d) != 3 || d[0].Allow || d[1].Access != "rw" || d[2].Access != "r" {
		t.Errorf("rules are %+v", d)
	}
	for _, c := range []struct {
		d    *runtimeapi.Device
		kind error
	}{
		{&runtimeapi.Device{HostPath: "/dev/null", Permissions: "x"}, errdefs.ErrInvalidArgument},
		{&runtimeapi.Device{HostPath: "/dev/null"}, errdefs.ErrInvalidArgument},
		{&runtimeapi.Device{HostPath: "dev/null", Permissions: "r"}, errdefs.ErrInvalidArgument},
		{&runtimeapi.Device{HostPath: "/dev/../etc/passwd", Permissions: "r"}, errdefs.ErrInvalidArgument},
		{&runtimeapi.Device{HostPath: "/etc/passwd", Permissions: "r"}, errdefs.ErrInvalidArgument},
		{&runtimeapi.Device{HostPath: "/dev/no-such", Permissions: "r"}, errdefs.ErrFailedPrecondition},
	} {
		in.Config.Devices = []*runtimeapi.Device{c.d}
		refuse(t, in, c.kind, "device")
	}
	in.Config.Devices = []*runtimeapi.Device{nil}
	refuse(t, in, errdefs.ErrInvalidArgument, "devices")
}

func TestCDI(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "vendor.json"), `{"cdiVersion":"0.5.0","kind":"vendor.com/dev","devices":[
		{"name":"one","containerEdits":{"env":["CDI=1"],"deviceNodes":[{"path":"/dev/null"}],
		"mounts":[{"hostPath":"/usr","containerPath":"/vendor","options":["ro","bind"]}]}}]}`)
	in := typical(t)
	in.Node.CDISpecDirs = []string{dir}
	in.Config.CDIDevices = []*runtimeapi.CDIDevice{{Name: "vendor.com/dev=one"}, {Name: "vendor.com/dev=one"}}
	s := build(t, in).Spec
	findMount(t, s, "/vendor")
	if !slices.Contains(s.Process.Env, "CDI=1") || len(s.Linux.Devices) != 1 {
		t.Errorf("variables %q, devices %v", s.Process.Env, s.Linux.Devices)
	}
	in.Config.CDIDevices = []*runtimeapi.CDIDevice{{Name: "vendor.com/dev=two"}}
	refuse(t, in, errdefs.ErrNotFound, "vendor.com/dev=two")
	in.Config.CDIDevices = []*runtimeapi.CDIDevice{{Name: "../x"}}
	refuse(t, in, errdefs.ErrInvalidArgument, "vendor.com/class=device")
	in.Config.CDIDevices = []*runtimeapi.CDIDevice{{Name: "vendor.com/dev=one"}}
	in.Node.CDISpecDirs = nil
	refuse(t, in, errdefs.ErrFailedPrecondition, "cdi_spec_dirs")
}
