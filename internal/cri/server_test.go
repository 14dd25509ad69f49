package cri

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/image"
	"cloister.dev/internal/pod"
	"cloister.dev/internal/stream"
)

func TestStopAndRemoveOfAbsentThingsSucceed(t *testing.T) {
	pods := &fakePods{fail: fmt.Errorf("nothing there: %w", errdefs.ErrNotFound)}
	c := serve(t, pods, &fakeImages{}, nil)
	ctx := within(t)
	for name, call := range map[string]func() error{
		"StopPodSandbox": func() error {
			_, err := c.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: "x"})
			return err
		},
		"RemovePodSandbox": func() error {
			_, err := c.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: "x"})
			return err
		},
		"StopContainer": func() error {
			_, err := c.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: "x"})
			return err
		},
		"RemoveContainer": func() error {
			_, err := c.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: "x"})
			return err
		},
		"RemoveImage": func() error {
			_, err := c.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: "x"}})
			return err
		},
	} {
		if err := call(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, call := range map[string]func() error{
		"PodSandboxStatus": func() error {
			_, err := c.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: "x"})
			return err
		},
		"ContainerStatus": func() error {
			_, err := c.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: "x"})
			return err
		},
		"StartContainer": func() error {
			_, err := c.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: "x"})
			return err
		},
		"ContainerStats": func() error {
			_, err := c.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: "x"})
			return err
		},
		"Exec": func() error {
			_, err := c.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: "x", Cmd: []string{"x"}, Stdout: true})
			return err
		},
	} {
		if err := call(); status.Code(err) != codes.NotFound {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWhatIsNotBuiltIsUnimplemented(t *testing.T) {
	c := serve(t, &fakePods{}, &fakeImages{}, nil)
	ctx := within(t)
	_, err1 := c.CheckpointContainer(ctx, &runtimeapi.CheckpointContainerRequest{ContainerId: "x"})
	_, err2 := c.CheckpointPod(ctx, &runtimeapi.CheckpointPodRequest{PodSandboxId: "x"})
	_, err3 := c.RestorePod(ctx, &runtimeapi.RestorePodRequest{})
	for _, err := range []error{err1, err2, err3} {
		if status.Code(err) != codes.Unimplemented {
			t.Errorf("got %v", err)
		}
	}
}

func TestPanicIsOneFailedCall(t *testing.T) {
	c := serve(t, &fakePods{}, &fakeImages{}, nil) // Status and Metrics of the fake are nil
	_, err := c.RuntimeServiceClient.Status(within(t), &runtimeapi.StatusRequest{})
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "goroutine") {
		t.Errorf("unary: %v", err)
	}
	in, err := c.StreamPodSandboxMetrics(within(t), &runtimeapi.StreamPodSandboxMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := in.Recv(); status.Code(err) != codes.Internal {
		t.Errorf("stream: %v", err)
	}
	if !strings.Contains(c.log.String(), "fakePods") && !strings.Contains(c.log.String(), "stack=") {
		t.Errorf("the log has no stack: %s", c.log)
	}
	v, err := c.Version(within(t), &runtimeapi.VersionRequest{})
	if err != nil || v.RuntimeName != "cloister" || v.RuntimeApiVersion != "v1" || v.RuntimeVersion != "1.2.3" {
		t.Errorf("afterwards: %v, %v", v, err)
	}
}

// fakeEvents gives what is sent to it, then its error.
type fakeEvents struct {
	queue  chan *runtimeapi.ContainerEventResponse
	err    error
	closed chan struct{}
}

func (f *fakeEvents) Next(ctx context.Context) (*runtimeapi.ContainerEventResponse, error) {
	select {
	case e, ok := <-f.queue:
		if !ok {
			return nil, f.err
		}
		return e, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (f *fakeEvents) Close() { close(f.closed) }

func TestEvents(t *testing.T) {
	ev := &fakeEvents{queue: make(chan *runtimeapi.ContainerEventResponse), err: pod.ErrLagged, closed: make(chan struct{})}
	c := serve(t, &fakePods{}, &fakeImages{}, func(s *Server) { s.subscribe = func() events { return ev } })
	in, err := c.GetContainerEvents(within(t), &runtimeapi.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := in.Header(); err != nil { // comes before any event does
		t.Fatal(err)
	}
	for i := range 3 {
		ev.queue <- &runtimeapi.ContainerEventResponse{ContainerId: fmt.Sprint(i)}
		if e, err := in.Recv(); err != nil || e.ContainerId != fmt.Sprint(i) {
			t.Fatalf("event %d: %v, %v", i, e, err)
		}
	}
	close(ev.queue)
	if _, err := in.Recv(); status.Code(err) != codes.OutOfRange {
		t.Errorf("a lagging reader got %v", err)
	}
	<-ev.closed
}

func TestEventsEndWithTheClient(t *testing.T) {
	ev := &fakeEvents{queue: make(chan *runtimeapi.ContainerEventResponse), closed: make(chan struct{})}
	c := serve(t, &fakePods{}, &fakeImages{}, func(s *Server) { s.subscribe = func() events { return ev } })
	ctx, leave := context.WithCancel(within(t))
	in, err := c.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := in.Header(); err != nil {
		t.Fatal(err)
	}
	leave()
	select {
	case <-ev.closed:
	case <-time.After(10 * time.Second):
		t.Error("the subscription stays")
	}
}

func TestEventsEndWithTheServer(t *testing.T) {
	ev := &fakeEvents{queue: make(chan *runtimeapi.ContainerEventResponse), closed: make(chan struct{})}
	var server *Server
	c := serve(t, &fakePods{}, &fakeImages{}, func(s *Server) { server, s.subscribe = s, func() events { return ev } })
	in, err := c.GetContainerEvents(within(t), &runtimeapi.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := in.Header(); err != nil {
		t.Fatal(err)
	}
	server.Shutdown()
	if _, err := in.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("got %v", err)
	}
	<-ev.closed
}

func TestLogHoldsNoSecrets(t *testing.T) {
	const secret = "hunter2-s3cr3t"
	pods, images := &fakePods{containers: someContainers(), sandboxes: someSandboxes()}, &fakeImages{image: anImage()}
	c := serve(t, pods, images, nil)
	ctx := within(t)
	cfg := goodContainer()
	cfg.Envs = []*runtimeapi.KeyValue{{Key: "PASSWORD", Value: []byte(secret)}}
	cfg.Command = []string{"login", secret}
	calls := func() error {
		_, err1 := c.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "busybox"}, Auth: &runtimeapi.AuthConfig{
			Username: "u", Password: secret, Auth: secret, IdentityToken: secret, RegistryToken: secret}})
		_, err2 := c.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "busybox"}, Auth: &runtimeapi.AuthConfig{Password: secret + "\n"}})
		_, err3 := c.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: "aaaa1", Config: cfg})
		_, err4 := c.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: "r1", Cmd: []string{"login", secret}})
		_, err5 := c.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: "r1", Cmd: []string{"login", secret}, Stdout: true})
		return errors.Join(err1, err2, err3, err4, err5)
	}
	errs := []error{calls()}
	pods.fail, images.fail = errdefs.ErrUnavailable, errdefs.ErrUnauthenticated
	errs = append(errs, calls())
	if text := fmt.Sprint(errs) + c.log.String(); strings.Contains(text, secret) {
		t.Errorf("a secret leaked: %s", text)
	}
	for _, want := range []string{"msg=PullImage", "image=busybox", "msg=CreateContainer", "pod=aaaa1", "container=new-container", "code=Unavailable", "level=WARN"} {
		if !strings.Contains(c.log.String(), want) {
			t.Errorf("the log lacks %q:\n%s", want, c.log)
		}
	}
	if images.pulled[0].Auth.Password != secret {
		t.Error("the credentials did not reach the puller")
	}
}

func TestVerboseInfoHoldsNoSecrets(t *testing.T) {
	const secret = "hunter2-s3cr3t"
	bundle := t.TempDir()
	spec := `{"ociVersion":"1.1.0","process":{"args":["sh"],"env":["PATH=/bin","PASSWORD=` + secret + `"]},"future":{"x":1}}`
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), []byte(spec), 0o600); err != nil {
		t.Fatal(err)
	}
	pods := &fakePods{sandboxes: someSandboxes(), containers: someContainers()}
	pods.containers[0].Bundle, pods.containers[0].Pid = bundle, 77
	pods.containers[0].Config.Envs = []*runtimeapi.KeyValue{{Key: "PASSWORD", Value: []byte(secret)}}
	pods.sandboxes[1].NetNS, pods.sandboxes[1].Network = "/run/cloister/ns", json.RawMessage(`{"ips":[]}`)
	c := serve(t, pods, &fakeImages{image: anImage()}, nil)
	resp, err := c.ContainerStatus(within(t), &runtimeapi.ContainerStatusRequest{ContainerId: "r2", Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var info struct {
		SandboxID   string
		Pid         int
		Config      runtimeapi.ContainerConfig
		RuntimeSpec struct {
			Process struct{ Env []string }
			Future  map[string]int
		}
	}
	if err := json.Unmarshal([]byte(resp.Info["info"]), &info); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(resp.Info["info"], secret) {
		t.Errorf("a secret shows in %s", resp.Info["info"])
	}
	if info.SandboxID != "aaaa1" || info.Pid != 77 || len(info.Config.Envs) != 1 || info.Config.Envs[0].Key != "PASSWORD" ||
		!slices.Equal(info.RuntimeSpec.Process.Env, []string{"PATH=***", "PASSWORD=***"}) || info.RuntimeSpec.Future["x"] != 1 {
		t.Errorf("got %s", resp.Info["info"])
	}
	if string(pods.containers[0].Config.Envs[0].Value) != secret {
		t.Error("hiding changed the container's own configuration")
	}
	sb, err := c.PodSandboxStatus(within(t), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: "aaaa1", Verbose: true})
	if err != nil || len(sb.ContainersStatuses) != 3 || sb.Timestamp == 0 || !strings.Contains(sb.Info["info"], `"path":"/run/cloister/ns"`) {
		t.Errorf("sandbox: %v, %v", sb, err)
	}
	img, err := c.ImageStatus(within(t), &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: anImage().ID}, Verbose: true})
	if err != nil || !json.Valid([]byte(img.Info["info"])) || !strings.Contains(img.Info["info"], "imageSpec") {
		t.Errorf("image: %v, %v", img, err)
	}
}

func TestImages(t *testing.T) {
	images := &fakeImages{image: anImage(), names: []string{"busybox"}, usage: image.Usage{
		At: time.Unix(9, 0), Snapshots: []image.FilesystemUsage{{Dir: "/s", Bytes: 100, Inodes: 5}, {Dir: "/t", Bytes: 1}},
		Content: image.FilesystemUsage{Dir: "/c", Bytes: 50, Inodes: 2},
	}}
	c := serve(t, &fakePods{}, images, func(s *Server) {
		s.snapshotter = func(handler string) (string, error) {
			if handler == "none" {
				return "", fmt.Errorf("no such handler: %w", errdefs.ErrNotFound)
			}
			return "for-" + handler, nil
		}
	})
	ctx := within(t)
	pull := func(spec *runtimeapi.ImageSpec) (*runtimeapi.PullImageResponse, error) {
		return c.PullImage(ctx, &runtimeapi.PullImageRequest{Image: spec})
	}
	if r, err := pull(&runtimeapi.ImageSpec{Image: "busybox", RuntimeHandler: "vm"}); err != nil || r.ImageRef != images.image.ID {
		t.Errorf("pull: %v, %v", r, err)
	}
	if _, err := pull(&runtimeapi.ImageSpec{Image: "busybox", Annotations: map[string]string{handlerAnnotation: "kata"}}); err != nil {
		t.Error(err)
	}
	if _, err := pull(&runtimeapi.ImageSpec{Image: "busybox", RuntimeHandler: "none"}); status.Code(err) != codes.NotFound {
		t.Errorf("pull for an unknown handler: %v", err)
	}
	if got := []string{images.pulled[0].Snapshotter, images.pulled[1].Snapshotter}; !slices.Equal(got, []string{"for-vm", "for-kata"}) {
		t.Errorf("snapshotters %v", got)
	}
	st := func(name string) (*runtimeapi.ImageStatusResponse, error) {
		return c.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: name}})
	}
	if r, err := st("busybox"); err != nil || r.Image.Id != images.image.ID || r.Image.Uid.GetValue() != 1000 || !r.Image.Pinned {
		t.Errorf("status: %v, %v", r, err)
	}
	if r, err := st("absent"); err != nil || r.Image != nil {
		t.Errorf("status of an absent image: %v, %v", r, err)
	}
	if _, err := st("bad!name"); status.Code(err) != codes.InvalidArgument {
		t.Errorf("status of a bad name: %v", err)
	}
	for name, want := range map[string]int{"": 1, "busybox": 1, "absent": 0} {
		r, err := c.ListImages(ctx, &runtimeapi.ListImagesRequest{Filter: &runtimeapi.ImageFilter{Image: &runtimeapi.ImageSpec{Image: name}}})
		if err != nil || len(r.Images) != want {
			t.Errorf("list %q: %v, %v", name, r, err)
		}
	}
	fs, err := c.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
	if err != nil || len(fs.ImageFilesystems) != 2 || fs.ImageFilesystems[0].UsedBytes.Value != 150 || fs.ImageFilesystems[0].InodesUsed.Value != 7 ||
		fs.ImageFilesystems[0].FsId.Mountpoint != "/s" || len(fs.ContainerFilesystems) != 2 {
		t.Errorf("file systems: %v, %v", fs, err)
	}
}

func TestStreamingCalls(t *testing.T) {
	c := serve(t, &fakePods{sandboxes: someSandboxes(), containers: someContainers()}, &fakeImages{}, nil)
	ctx := within(t)
	exec, err := c.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: "r1", Cmd: []string{"x"}, Stdout: true})
	if err != nil || !strings.HasPrefix(exec.Url, "http://127.0.0.1:") {
		t.Errorf("exec: %v, %v", exec, err)
	}
	for name, tc := range map[string]struct {
		call func() error
		want codes.Code
	}{
		"exec in an exited container": {func() error {
			_, err := c.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: "x3", Cmd: []string{"x"}, Stdout: true})
			return err
		}, codes.FailedPrecondition},
		"exec without streams": {func() error {
			_, err := c.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: "r1", Cmd: []string{"x"}})
			return err
		}, codes.InvalidArgument},
		"exec with tty and stderr": {func() error {
			_, err := c.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: "r1", Cmd: []string{"x"}, Tty: true, Stderr: true})
			return err
		}, codes.InvalidArgument},
		"attach to an exited one": {func() error {
			_, err := c.Attach(ctx, &runtimeapi.AttachRequest{ContainerId: "x3", Stdout: true})
			return err
		}, codes.FailedPrecondition},
		"attach": {func() error {
			_, err := c.Attach(ctx, &runtimeapi.AttachRequest{ContainerId: "r1", Stdout: true})
			return err
		}, codes.OK},
		"port-forward to stopped pod": {func() error {
			_, err := c.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: "bbbb2"})
			return err
		}, codes.FailedPrecondition},
		"port-forward to port -1": {func() error {
			_, err := c.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: "aaaa1", Port: []int32{-1}})
			return err
		}, codes.InvalidArgument},
		"port-forward to an unknown": {func() error {
			_, err := c.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: "zzz"})
			return err
		}, codes.NotFound},
		"port-forward with a short id": {func() error {
			_, err := c.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: "aa", Port: []int32{80}})
			return err
		}, codes.OK},
	} {
		if err := tc.call(); status.Code(err) != tc.want {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
}

func TestStreamRuntimePassesSizes(t *testing.T) {
	resize := make(chan stream.Size, 1)
	resize <- stream.Size{Width: 80, Height: 25}
	var out bytes.Buffer
	code, err := StreamRuntime(&fakePods{}).Exec(within(t), "c1", []string{"top"}, stream.Streams{Out: nopCloser{&out}}, true, resize)
	if err != nil || code != 5 || out.String() != "c1 [top] true 80x25" {
		t.Errorf("got %q, %d, %v", out.String(), code, err)
	}
}

type nopCloser struct{ *bytes.Buffer }

func (nopCloser) Close() error { return nil }

func TestTimeoutsReachThePods(t *testing.T) {
	pods := &fakePods{}
	c := serve(t, pods, &fakeImages{}, nil)
	if _, err := c.StopContainer(within(t), &runtimeapi.StopContainerRequest{ContainerId: "c1", Timeout: 30}); err != nil {
		t.Fatal(err)
	}
	resp, err := c.ExecSync(within(t), &runtimeapi.ExecSyncRequest{ContainerId: "c1", Cmd: []string{"x"}, Timeout: 1 << 60})
	if err != nil || resp.ExitCode != 3 {
		t.Fatal(resp, err)
	}
	if d, err := time.ParseDuration(string(resp.Stdout)); err != nil || d < 100*365*24*time.Hour {
		t.Errorf("a huge timeout arrived as %s", resp.Stdout)
	}
	if !slices.Equal(pods.calls, []string{"stop c1 in 30s", "exec c1"}) {
		t.Errorf("calls: %v", pods.calls)
	}
}

func TestRuntimeConfig(t *testing.T) {
	pods := &fakePods{}
	c := serve(t, pods, &fakeImages{}, nil)
	if r, err := c.RuntimeConfig(within(t), &runtimeapi.RuntimeConfigRequest{}); err != nil || r.Linux.CgroupDriver != runtimeapi.CgroupDriver_CGROUPFS {
		t.Errorf("got %v, %v", r, err)
	}
	for _, cidr := range []string{"10.1.0.0/16", ""} { // an empty one changes nothing
		_, err := c.UpdateRuntimeConfig(within(t), &runtimeapi.UpdateRuntimeConfigRequest{RuntimeConfig: &runtimeapi.RuntimeConfig{NetworkConfig: &runtimeapi.NetworkConfig{PodCidr: cidr}}})
		if err != nil || pods.cidr != "10.1.0.0/16" {
			t.Errorf("%q: %q, %v", cidr, pods.cidr, err)
		}
	}
}
