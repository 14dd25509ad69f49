package cri

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// emptyIsFine are the calls for which a request without any field makes sense.
var emptyIsFine = map[string]bool{
	"Version": true, "Status": true, "RuntimeConfig": true, "UpdateRuntimeConfig": true,
	"ListPodSandbox": true, "ListContainers": true, "ListImages": true, "ListContainerStats": true, "ListPodSandboxStats": true,
	"ListPodSandboxMetrics": true, "ListMetricDescriptors": true, "ImageFsInfo": true,
	"CheckpointPod": true, "RestorePod": true, // not built: Unimplemented whatever is asked
}

// Every call, also one that a later CRI adds, has to have its request checked.
func TestEmptyRequestsOfEveryCall(t *testing.T) {
	c := serve(t, &fakePods{}, &fakeImages{}, nil)
	checked := 0
	for _, service := range []grpc.ServiceDesc{runtimeapi.RuntimeService_ServiceDesc, runtimeapi.ImageService_ServiceDesc} {
		d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(service.ServiceName))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range service.Methods {
			method := d.(protoreflect.ServiceDescriptor).Methods().ByName(protoreflect.Name(m.MethodName))
			req, err := protoregistry.GlobalTypes.FindMessageByName(method.Input().FullName())
			if err != nil {
				t.Fatal(err)
			}
			resp, err := protoregistry.GlobalTypes.FindMessageByName(method.Output().FullName())
			if err != nil {
				t.Fatal(err)
			}
			if emptyIsFine[m.MethodName] {
				continue
			}
			checked++
			err = c.conn.Invoke(within(t), "/"+service.ServiceName+"/"+m.MethodName, req.New().Interface(), resp.New().Interface())
			if got := status.Code(err); got != codes.InvalidArgument {
				t.Errorf("%s: %v", m.MethodName, err)
			}
		}
	}
	if checked < 20 {
		t.Errorf("only %d calls were tried", checked)
	}
}

// badIDs cannot be ids, whatever a client means by them.
var badIDs = map[string]string{
	"slash": "a/b", "path": "../../etc/passwd", "dots": "..", "dot": ".", "dots inside": "a..b", "newline": "a\nb", "NUL": "a\x00b",
	"space": "a b", "long": strings.Repeat("a", 10000), "not UTF-8": "\xff\xfe", "escape": "\x1b[31m", "absolute": "/run", "unicode": "é",
}

func TestBadIDs(t *testing.T) {
	for name, value := range badIDs {
		for what, req := range map[string]proto.Message{
			"stop sandbox":      &runtimeapi.StopPodSandboxRequest{PodSandboxId: value},
			"remove sandbox":    &runtimeapi.RemovePodSandboxRequest{PodSandboxId: value},
			"sandbox status":    &runtimeapi.PodSandboxStatusRequest{PodSandboxId: value},
			"sandbox stats":     &runtimeapi.PodSandboxStatsRequest{PodSandboxId: value},
			"sandbox resources": &runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: value},
			"port-forward":      &runtimeapi.PortForwardRequest{PodSandboxId: value},
			"create":            &runtimeapi.CreateContainerRequest{PodSandboxId: value, Config: goodContainer()},
			"start":             &runtimeapi.StartContainerRequest{ContainerId: value},
			"stop":              &runtimeapi.StopContainerRequest{ContainerId: value},
			"remove":            &runtimeapi.RemoveContainerRequest{ContainerId: value},
			"status":            &runtimeapi.ContainerStatusRequest{ContainerId: value},
			"stats":             &runtimeapi.ContainerStatsRequest{ContainerId: value},
			"reopen":            &runtimeapi.ReopenContainerLogRequest{ContainerId: value},
			"resources":         &runtimeapi.UpdateContainerResourcesRequest{ContainerId: value, Linux: &runtimeapi.LinuxContainerResources{}},
			"exec sync":         &runtimeapi.ExecSyncRequest{ContainerId: value, Cmd: []string{"x"}},
			"exec":              &runtimeapi.ExecRequest{ContainerId: value, Cmd: []string{"x"}, Stdout: true},
			"attach":            &runtimeapi.AttachRequest{ContainerId: value, Stdout: true},
			"handler":           &runtimeapi.RunPodSandboxRequest{Config: goodSandbox(), RuntimeHandler: value},
			"image handler":     &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "busybox", RuntimeHandler: value}},
			"sandbox filter":    &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{Id: value}},
			"container filter":  &runtimeapi.StreamContainersRequest{Filter: &runtimeapi.ContainerFilter{Id: value}},
			"filter by sandbox": &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: value}},
			"stats filter":      &runtimeapi.ListContainerStatsRequest{Filter: &runtimeapi.ContainerStatsFilter{PodSandboxId: value}},
			"pod stats filter":  &runtimeapi.StreamPodSandboxStatsRequest{Filter: &runtimeapi.PodSandboxStatsFilter{Id: value}},
			"checkpoint":        &runtimeapi.CheckpointContainerRequest{ContainerId: value},
		} {
			err := check(req)
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("%s with %s: %v", what, name, err)
			} else if text := errorText(err); len(text) > 600 || strings.ContainsAny(text, "\n\x00\x1b") {
				t.Errorf("%s with %s: unfit for a log: %q", what, name, text)
			}
		}
	}
}

func goodSandbox() *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Name: "web", Namespace: "default", Uid: "2f6c"}}
}

func goodContainer() *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{Metadata: &runtimeapi.ContainerMetadata{Name: "c"}, Image: &runtimeapi.ImageSpec{Image: "busybox"}}
}

func TestBadInput(t *testing.T) {
	sandbox := func(change func(*runtimeapi.PodSandboxConfig)) proto.Message {
		cfg := goodSandbox()
		change(cfg)
		return &runtimeapi.RunPodSandboxRequest{Config: cfg}
	}
	container := func(change func(*runtimeapi.ContainerConfig)) proto.Message {
		cfg := goodContainer()
		change(cfg)
		return &runtimeapi.CreateContainerRequest{PodSandboxId: "p", Config: cfg}
	}
	tests := map[string]struct {
		req  proto.Message
		says string
	}{
		"no pod metadata":         {sandbox(func(c *runtimeapi.PodSandboxConfig) { c.Metadata = nil }), "config.metadata"},
		"no pod name":             {sandbox(func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Name = "" }), "config.metadata.name"},
		"pod name as path":        {sandbox(func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Name = "../x" }), "config.metadata.name"},
		"pod name ..":             {sandbox(func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Name = ".." }), "config.metadata.name"},
		"namespace with newline":  {sandbox(func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Namespace = "a\nb" }), "config.metadata.namespace"},
		"uid of 10000 characters": {sandbox(func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Uid = strings.Repeat("u", 10000) }), "config.metadata.uid"},
		"no container config":     {&runtimeapi.CreateContainerRequest{PodSandboxId: "p"}, "config"},
		"no container metadata":   {container(func(c *runtimeapi.ContainerConfig) { c.Metadata = nil }), "config.metadata"},
		"container name as path":  {container(func(c *runtimeapi.ContainerConfig) { c.Metadata.Name = "a/b" }), "config.metadata.name"},
		"no image":                {container(func(c *runtimeapi.ContainerConfig) { c.Image = nil }), "image"},
		"image with newline":      {container(func(c *runtimeapi.ContainerConfig) { c.Image.Image = "a\nb" }), "image"},
		"pull nothing":            {&runtimeapi.PullImageRequest{}, "image"},
		"pull an endless name":    {&runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: strings.Repeat("a", 10000)}}, "image"},
		"credentials with header": {&runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "a"}, Auth: &runtimeapi.AuthConfig{RegistryToken: "a\r\nX: y"}}, "auth"},
		"negative stop timeout":   {&runtimeapi.StopContainerRequest{ContainerId: "c", Timeout: -1}, "timeout"},
		"negative exec timeout":   {&runtimeapi.ExecSyncRequest{ContainerId: "c", Cmd: []string{"x"}, Timeout: -5}, "timeout"},
		"exec of nothing":         {&runtimeapi.ExecSyncRequest{ContainerId: "c"}, "cmd"},
		"exec with NUL":           {&runtimeapi.ExecRequest{ContainerId: "c", Cmd: []string{"a\x00"}, Stdout: true}, "cmd[0]"},
		"too many ports":          {&runtimeapi.PortForwardRequest{PodSandboxId: "p", Port: make([]int32, 20000)}, "port"},
		"no resources":            {&runtimeapi.UpdateContainerResourcesRequest{ContainerId: "c"}, "linux"},
		"unknown sandbox state":   {&runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{State: &runtimeapi.PodSandboxStateValue{State: 9}}}, "state"},
		"unknown container state": {&runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{State: &runtimeapi.ContainerStateValue{State: -1}}}, "state"},
		"bad range":               {&runtimeapi.UpdateRuntimeConfigRequest{RuntimeConfig: &runtimeapi.RuntimeConfig{NetworkConfig: &runtimeapi.NetworkConfig{PodCidr: "10.0.0.0/99"}}}, "pod_cidr"},
	}
	for name, tc := range tests {
		err := check(tc.req)
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: want invalid argument, got %v", name, err)
		} else if !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%s: %q does not name %s", name, err, tc.says)
		}
	}
}

func TestGoodInput(t *testing.T) {
	for name, req := range map[string]proto.Message{
		"pod":             &runtimeapi.RunPodSandboxRequest{Config: goodSandbox(), RuntimeHandler: "runc"},
		"container":       &runtimeapi.CreateContainerRequest{PodSandboxId: strings.Repeat("ab", 32), Config: goodContainer()},
		"uuid":            &runtimeapi.StopPodSandboxRequest{PodSandboxId: "5c8f2b0e-6d3f-4b51-8a0e-2f6b1a6e7c11"},
		"long timeout":    &runtimeapi.StopContainerRequest{ContainerId: "c", Timeout: 1 << 62},
		"image by ID":     &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: "sha256:" + strings.Repeat("a", 64)}},
		"image by digest": &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "registry.k8s.io:443/a/b:v1@sha256:" + strings.Repeat("a", 64)}},
		"two ranges":      &runtimeapi.UpdateRuntimeConfigRequest{RuntimeConfig: &runtimeapi.RuntimeConfig{NetworkConfig: &runtimeapi.NetworkConfig{PodCidr: "10.0.0.0/16,fd00::/64"}}},
		"filter":          &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{Id: "ab12", LabelSelector: map[string]string{"a": "b"}}},
		"image filter":    &runtimeapi.ListImagesRequest{Filter: &runtimeapi.ImageFilter{Image: &runtimeapi.ImageSpec{}}},
	} {
		if err := check(req); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if d := seconds(1 << 62); d <= 0 {
		t.Errorf("a long timeout became %v", d)
	}
}

// FuzzCheck feeds arbitrary bytes as each request of CRI.
func FuzzCheck(f *testing.F) {
	var kinds []protoreflect.MessageType
	protoregistry.GlobalTypes.RangeMessages(func(m protoreflect.MessageType) bool {
		if m.Descriptor().ParentFile().Package() == "runtime.v1" && strings.HasSuffix(string(m.Descriptor().Name()), "Request") {
			kinds = append(kinds, m)
		}
		return true
	})
	if len(kinds) < 40 {
		f.Fatalf("found only %d requests", len(kinds))
	}
	for _, req := range []proto.Message{
		&runtimeapi.RunPodSandboxRequest{Config: goodSandbox()}, &runtimeapi.CreateContainerRequest{PodSandboxId: "p", Config: goodContainer()},
		&runtimeapi.StopContainerRequest{ContainerId: "..", Timeout: -1}, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "a\nb"}},
	} {
		b, err := proto.Marshal(req)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, kind := range kinds {
			req := kind.New().Interface()
			if proto.Unmarshal(b, req) != nil {
				continue
			}
			err := check(req)
			if err != nil && !errdefs.IsInvalidArgument(err) {
				t.Errorf("%T: %v is not an invalid argument", req, err)
			}
			if err == nil {
				sane(t, req)
			}
			if text := errorText(grpcError(t.Context(), invalid("%.80q", b))); len(text) > maxErrorText+3 || strings.Contains(text, "\n") {
				t.Errorf("unbounded error text %q", text)
			}
			subject(req)
		}
	})
}

// sane says what everything below relies on.
func sane(t *testing.T, req any) {
	t.Helper()
	for field, value := range map[string]string{"sandbox": sandboxIDOf(req), "container": containerIDOf(req)} {
		if value != "" && (strings.Contains(value, "..") || strings.ContainsAny(value, "/\n\x00 ") || len(value) > maxID) {
			t.Errorf("%T: %s id %q passed", req, field, value)
		}
	}
	if r, ok := req.(interface{ GetTimeout() int64 }); ok {
		if _, built := req.(*runtimeapi.CheckpointContainerRequest); !built && seconds(r.GetTimeout()) < 0 {
			t.Errorf("%T: timeout %d passed", req, r.GetTimeout())
		}
	}
}

func sandboxIDOf(req any) string {
	if r, ok := req.(interface{ GetPodSandboxId() string }); ok {
		if _, unbuilt := req.(*runtimeapi.CheckpointPodRequest); !unbuilt {
			return r.GetPodSandboxId()
		}
	}
	return ""
}

func containerIDOf(req any) string {
	if r, ok := req.(interface{ GetContainerId() string }); ok {
		return r.GetContainerId()
	}
	return ""
}
