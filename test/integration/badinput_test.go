package integration

import (
	"math"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// hostileNames are no ids and no names.
var hostileNames = map[string]string{
	"slash":     "a/b",
	"absolute":  "/etc/passwd",
	"dots":      "..",
	"climbing":  "../../etc",
	"newline":   "a\nb",
	"NUL":       "a\x00b",
	"long":      strings.Repeat("a", 10000),
	"control":   "a\x1b[31m",
	"backslash": `a\..\b`,
}

// calls are all RPCs that take an id, with what they answer to one that
// nothing has.
func calls(n *testnode.Node) map[string]struct {
	unknown codes.Code
	call    func(t *testing.T, id string) error
} {
	type call = struct {
		unknown codes.Code
		call    func(t *testing.T, id string) error
	}
	r := n.Runtime
	return map[string]call{
		"PodSandboxStatus": {codes.NotFound, func(t *testing.T, id string) error {
			_, err := r.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: id})
			return err
		}},
		"StopPodSandbox": {codes.OK, func(t *testing.T, id string) error {
			_, err := r.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: id})
			return err
		}},
		"RemovePodSandbox": {codes.OK, func(t *testing.T, id string) error {
			_, err := r.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: id})
			return err
		}},
		"PodSandboxStats": {codes.NotFound, func(t *testing.T, id string) error {
			_, err := r.PodSandboxStats(t.Context(), &cri.PodSandboxStatsRequest{PodSandboxId: id})
			return err
		}},
		"PortForward": {codes.NotFound, func(t *testing.T, id string) error {
			_, err := r.PortForward(t.Context(), &cri.PortForwardRequest{PodSandboxId: id, Port: []int32{80}})
			return err
		}},
		"UpdatePodSandboxResources": {codes.NotFound, func(t *testing.T, id string) error {
			_, err := r.UpdatePodSandboxResources(t.Context(), &cri.UpdatePodSandboxResourcesRequest{PodSandboxId: id})
			return err
		}},
		"CreateContainer": {codes.NotFound, func(t *testing.T, id string) error {
			cfg := podConfig(n, t)
			_, err := r.CreateContainer(t.Context(), &cri.CreateContainerRequest{PodSandboxId: id, SandboxConfig: cfg, Config: containerConfig(busybox, nil)})
			return err
		}},
		"StartContainer": {codes.NotFound, func(t *testing.T, id string) error {
			_, err := r.StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: id})
			return err
		}},
		"StopContainer": {codes.OK, func(t *testing.T, id string) error {
			_, err := r.StopContainer(t.Context(), &cri.StopContainerRequest{ContainerId: id})
			return err
		}},
		"RemoveContainer": {codes.OK, func(t *testing.T, id string) error {
			_, err := r.RemoveContainer(t.Context(), &cri.RemoveContainerRequest{ContainerId: id})
			return err
		}},
		"ContainerStatus": {codes.NotFound, func(t *testing.T, id string) error {
			_, err := r.ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: id})
			return err
		}},
		"ContainerStats": {codes.NotFound, func(t *testing.T, id string) error {
			_, err := r.ContainerStats(t.Context(), &cri.ContainerStatsRequest{ContainerId: id})
			return err
		}},
		"UpdateContainerResources": {codes.NotFound, func(t *testing.T, id string) error {
			_, err := r.UpdateContainerResources(t.Context(), &cri.UpdateContainerResourcesRequest{ContainerId: id, Linux: &cri.LinuxContainerResources{}})
			return err
		}},
		"ReopenContainerLog": {codes.NotFound, func(t *testing.T, id string) error {
			_, err := r.ReopenContainerLog(t.Context(), &cri.ReopenContainerLogRequest{ContainerId: id})
			return err
		}},
		"ExecSync": {codes.NotFound, func(t *testing.T, id string) error {
			_, err := r.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"true"}})
			return err
		}},
		"Exec": {codes.NotFound, func(t *testing.T, id string) error {
			_, err := r.Exec(t.Context(), &cri.ExecRequest{ContainerId: id, Cmd: []string{"true"}, Stdout: true})
			return err
		}},
		"Attach": {codes.NotFound, func(t *testing.T, id string) error {
			_, err := r.Attach(t.Context(), &cri.AttachRequest{ContainerId: id, Stdout: true})
			return err
		}},
	}
}

func TestIDsThatAreNone(t *testing.T) {
	n := shared(t)
	for name, c := range calls(n) {
		t.Run(name, func(t *testing.T) {
			unknown := strings.Repeat("f", 64)
			if err := c.call(t, unknown); c.unknown != codes.OK {
				wantError(t, err, c.unknown, unknown[:10])
			} else if err != nil {
				t.Errorf("unknown id: %v, but the call is idempotent", err)
			}
			wantError(t, c.call(t, ""), codes.InvalidArgument, "id")
			for kind, id := range hostileNames {
				if !strings.Contains(id, "\x00") {
					wantError(t, c.call(t, id), codes.InvalidArgument, "id")
				} else if c.call(t, id) == nil {
					t.Errorf("%s is taken for an id", kind)
				}
			}
		})
	}
}

func TestMissingConfigurations(t *testing.T) {
	n := shared(t)
	p := runPod(t, n)
	for name, cfg := range map[string]*cri.PodSandboxConfig{
		"config":        nil,
		"metadata":      {},
		"metadata.name": {Metadata: &cri.PodSandboxMetadata{}},
	} {
		_, err := n.Runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: cfg})
		wantError(t, err, codes.InvalidArgument, name)
	}
	for name, cfg := range map[string]*cri.ContainerConfig{
		"config":        nil,
		"metadata":      {Image: &cri.ImageSpec{Image: busybox}},
		"metadata.name": {Image: &cri.ImageSpec{Image: busybox}, Metadata: &cri.ContainerMetadata{}},
		"image":         {Metadata: &cri.ContainerMetadata{Name: "x"}},
		"nothing-there": {Metadata: &cri.ContainerMetadata{Name: "x"}, Image: &cri.ImageSpec{Image: "nothing-there:1"}},
	} {
		_, err := p.tryCreate(t.Context(), cfg)
		wantOneOf(t, err, []codes.Code{codes.InvalidArgument, codes.NotFound}, name)
	}
	// Without its Linux part a configuration means the defaults.
	bare, err := p.tryCreate(t.Context(), &cri.ContainerConfig{Metadata: &cri.ContainerMetadata{Name: "bare"}, Image: &cri.ImageSpec{Image: busybox}, Command: []string{"true"}})
	if err != nil {
		t.Fatal(err)
	}
	bare.start()
	if st := bare.ended(); st.ExitCode != 0 {
		t.Errorf("a container without Linux configuration ended with %d: %s", st.ExitCode, st.Message)
	}
	for name, err := range map[string]error{
		"PullImage":        second(n.Image.PullImage(t.Context(), &cri.PullImageRequest{})),
		"ImageStatus":      second(n.Image.ImageStatus(t.Context(), &cri.ImageStatusRequest{})),
		"RemoveImage":      second(n.Image.RemoveImage(t.Context(), &cri.RemoveImageRequest{})),
		"UpdateContainer":  second(n.Runtime.UpdateContainerResources(t.Context(), &cri.UpdateContainerResourcesRequest{ContainerId: bare.id})),
		"ExecSync":         second(n.Runtime.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: bare.id})),
		"negative timeout": second(n.Runtime.StopContainer(t.Context(), &cri.StopContainerRequest{ContainerId: bare.id, Timeout: -1})),
	} {
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func TestNamesThatAreNone(t *testing.T) {
	n := shared(t)
	check := noPods(t, n)
	for kind, value := range hostileNames {
		if strings.Contains(value, "\x00") {
			continue // protobuf strings hold it, but what is refused is the same
		}
		for field, set := range map[string]podOption{
			"name":      func(c *cri.PodSandboxConfig) { c.Metadata.Name = value },
			"uid":       func(c *cri.PodSandboxConfig) { c.Metadata.Uid = value },
			"namespace": func(c *cri.PodSandboxConfig) { c.Metadata.Namespace = value },
			"hostname":  func(c *cri.PodSandboxConfig) { c.Hostname = value },
		} {
			if kind == "backslash" && field != "hostname" {
				continue // odd, and harmless
			}
			_, err := n.Runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: podConfig(n, t, set)})
			if status.Code(err) != codes.InvalidArgument {
				t.Errorf("%s in %s: %.200v", kind, field, err)
			}
		}
		_, err := n.Runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: podConfig(n, t), RuntimeHandler: value})
		wantError(t, err, codes.InvalidArgument, "handler")
	}
	_, err := n.Runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: podConfig(n, t), RuntimeHandler: "no-such"})
	wantOneOf(t, err, []codes.Code{codes.InvalidArgument, codes.NotFound}, "no-such", "handler")
	check()
}

// noPods checks that no pod of this test came to be, on a node where others
// make pods at the same time.
func noPods(t *testing.T, n *testnode.Node) (check func()) {
	name := strings.ToLower(t.Name())
	return func() {
		t.Helper()
		list, err := n.Runtime.ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range list.Items {
			if strings.HasPrefix(p.Metadata.Name, name) {
				t.Errorf("pod %s came to be", p.Metadata.Name)
			}
		}
	}
}

func TestHostileContainerConfigurations(t *testing.T) {
	n := own(t, testnode.Options{})
	witness(t, n)
	p := runPod(t, n)
	check := noLeak(t, n)
	type resources = cri.LinuxContainerResources
	with := func(r *resources) containerOption {
		return func(c *cri.ContainerConfig) { c.Linux.Resources = r }
	}
	logPath := func(path string) containerOption { return func(c *cri.ContainerConfig) { c.LogPath = path } }
	mount := func(m *cri.Mount) containerOption {
		return func(c *cri.ContainerConfig) { c.Mounts = []*cri.Mount{m} }
	}
	security := func(f func(*cri.LinuxContainerSecurityContext)) containerOption {
		return func(c *cri.ContainerConfig) { f(c.Linux.SecurityContext) }
	}
	for name, c := range map[string]struct {
		change containerOption
		words  []string
		late   bool // only the kernel knows, so that the start fails
	}{
		"negative shares":    {with(&resources{CpuShares: -5}), []string{"-5"}, false},
		"overflowing shares": {with(&resources{CpuShares: math.MaxInt64}), []string{"shares"}, false},
		"overflowing quota":  {with(&resources{CpuQuota: math.MaxInt64, CpuPeriod: 100000}), []string{"quota"}, false},
		"negative period":    {with(&resources{CpuPeriod: -1}), []string{"period"}, false},
		"negative memory":    {with(&resources{MemoryLimitInBytes: -7}), []string{"memory"}, false},
		"tiny memory":        {with(&resources{MemoryLimitInBytes: 1}), []string{"memory"}, true},
		"oom score":          {with(&resources{OomScoreAdj: 5000}), []string{"oom"}, false},
		"cpuset":             {with(&resources{CpusetCpus: "0-99999"}), []string{"cpu"}, true},
		"cpuset words":       {with(&resources{CpusetCpus: "a/../b\n"}), []string{"cpu"}, false},
		"huge pages":         {with(&resources{HugepageLimits: []*cri.HugepageLimit{{PageSize: "../x", Limit: 1}}}), []string{"page"}, false},
		"unified":            {with(&resources{Unified: map[string]string{"../../x": "1"}}), []string{"unified"}, false},
		"log climbs":         {logPath("../../escape.log"), []string{"log"}, false},
		"log absolute":       {logPath("/tmp/escape.log"), []string{"log"}, false},
		"log newline":        {logPath("a\nb.log"), []string{"log"}, false},
		"log long":           {logPath(strings.Repeat("a", 10000)), []string{"log"}, false},
		"mount nothing":      {mount(&cri.Mount{ContainerPath: "/x"}), []string{"mount"}, false},
		"mount climbing":     {mount(&cri.Mount{ContainerPath: "/a/../../x", HostPath: "relative"}), []string{"mount"}, false},
		"mount rro writable": {mount(&cri.Mount{ContainerPath: "/x", HostPath: "/tmp", RecursiveReadOnly: true}), []string{"read"}, false},
		"mount propagation":  {mount(&cri.Mount{ContainerPath: "/x", HostPath: "/tmp", Propagation: 77}), []string{"propagation"}, false},
		"group alone":        {security(func(s *cri.LinuxContainerSecurityContext) { s.RunAsGroup = &cri.Int64Value{Value: 5} }), []string{"group"}, false},
		"user overflows":     {security(func(s *cri.LinuxContainerSecurityContext) { s.RunAsUser = &cri.Int64Value{Value: 1 << 32} }), []string{"4294967296"}, false},
		"user negative":      {security(func(s *cri.LinuxContainerSecurityContext) { s.RunAsUser = &cri.Int64Value{Value: -1} }), []string{"-1"}, false},
		"user name":          {security(func(s *cri.LinuxContainerSecurityContext) { s.RunAsUsername = "no-such-user" }), []string{"no-such-user"}, false},
		"group overflows":    {security(func(s *cri.LinuxContainerSecurityContext) { s.SupplementalGroups = []int64{1 << 40} }), []string{"group"}, false},
		"capability": {security(func(s *cri.LinuxContainerSecurityContext) {
			s.Capabilities = &cri.Capability{AddCapabilities: []string{"CAP_MAGIC"}}
		}), []string{"magic"}, false},
		"seccomp missing": {security(func(s *cri.LinuxContainerSecurityContext) {
			s.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "/no/such.json"}
		}), []string{"/no/such.json"}, false},
		"device missing": {func(c *cri.ContainerConfig) {
			c.Devices = []*cri.Device{{HostPath: "/dev/no-such", ContainerPath: "/dev/x", Permissions: "rwm"}}
		}, []string{"/dev/no-such"}, false},
		"device permissions": {func(c *cri.ContainerConfig) {
			c.Devices = []*cri.Device{{HostPath: "/dev/null", ContainerPath: "/dev/x", Permissions: "xyz"}}
		}, []string{"xyz"}, false},
		"environment": {func(c *cri.ContainerConfig) { c.Envs = []*cri.KeyValue{{Key: "A=B"}} }, []string{"env"}, false},
		"stop signal": {func(c *cri.ContainerConfig) { c.StopSignal = 999 }, []string{"signal"}, false},
		"target": {security(func(s *cri.LinuxContainerSecurityContext) {
			s.NamespaceOptions = &cri.NamespaceOption{Pid: cri.NamespaceMode_TARGET, TargetId: "no-such"}
		}), []string{"no-such"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := containerConfig(busybox, []string{"true"}, c.change)
			ctr, err := p.tryCreate(t.Context(), cfg)
			if err == nil {
				defer ctr.remove()
				if err = ctr.tryStart(); err == nil {
					t.Fatal("accepted, and started")
				}
				if !c.late {
					t.Errorf("accepted, and refused only by the start: %v", err)
				}
				wantError(t, err, status.Code(err), c.words...)
				return
			}
			wantOneOf(t, err, []codes.Code{codes.InvalidArgument, codes.NotFound, codes.FailedPrecondition}, c.words...)
		})
	}
	check()
}

// No request makes the daemon panic or hang, whichever of its messages are
// there but empty.
func TestHollowMessages(t *testing.T) {
	n := shared(t)
	p := runPod(t, n)
	cfg := containerConfig(busybox, []string{"true"})
	hollow(cfg.ProtoReflect(), 0)
	if c, err := p.tryCreate(t.Context(), cfg); err == nil {
		c.remove()
	} else if st := status.Code(err); st == codes.Internal || st == codes.Unknown {
		t.Errorf("create container: %v", err)
	}
	pc := podConfig(n, t)
	keep := proto.CloneOf(pc)
	hollow(pc.ProtoReflect(), 0)
	pc.Metadata = keep.Metadata
	r, err := n.Runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: pc})
	if err == nil {
		(&pod{t, n, r.PodSandboxId, pc}).remove()
	} else if st := status.Code(err); st == codes.Internal || st == codes.Unknown {
		t.Errorf("run pod: %v", err)
	}
}

// hollow sets every unset message field to an empty message, and puts an empty
// message into every empty list.
func hollow(m protoreflect.Message, depth int) {
	if depth > 6 {
		return
	}
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		switch {
		case f.IsMap() || f.Message() == nil:
		case f.IsList():
			if l := m.Mutable(f).List(); l.Len() == 0 {
				e := l.AppendMutable()
				hollow(e.Message(), depth+1)
			}
		default:
			hollow(m.Mutable(f).Message(), depth+1)
		}
	}
}
