package cri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/image"
	"cloister.dev/internal/pod"
	"cloister.dev/internal/stream"
)

// fakePods keeps pods in memory. What it does not define panics when called,
// which the server must survive.
type fakePods struct {
	Pods
	sandboxes  []pod.Sandbox
	containers []pod.Container

	mu    sync.Mutex
	calls []string
	fail  error // what every changing call answers
	cidr  string
}

func (f *fakePods) did(format string, args ...any) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, fmt.Sprintf(format, args...))
	return f.fail
}

func (f *fakePods) RunSandbox(_ context.Context, cfg *runtimeapi.PodSandboxConfig, handler string) (string, error) {
	return "new-sandbox", f.did("run %s on %q", cfg.Metadata.Name, handler)
}

func (f *fakePods) StopSandbox(_ context.Context, id string) error {
	return f.did("stop sandbox %s", id)
}
func (f *fakePods) RemoveSandbox(_ context.Context, id string) error {
	return f.did("remove sandbox %s", id)
}

func (f *fakePods) CreateContainer(_ context.Context, sandboxID string, cfg *runtimeapi.ContainerConfig, _ *runtimeapi.PodSandboxConfig) (string, error) {
	return "new-container", f.did("create %s in %s", cfg.Metadata.Name, sandboxID)
}

func (f *fakePods) StartContainer(_ context.Context, id string) error { return f.did("start %s", id) }

func (f *fakePods) StopContainer(_ context.Context, id string, timeout time.Duration) error {
	return f.did("stop %s in %v", id, timeout)
}

func (f *fakePods) RemoveContainer(_ context.Context, id string) error { return f.did("remove %s", id) }

func (f *fakePods) UpdateResources(_ context.Context, id string, r *runtimeapi.LinuxContainerResources, _ map[string]string) error {
	return f.did("update %s to %d shares", id, r.CpuShares)
}

func (f *fakePods) ExecSync(_ context.Context, id string, cmd []string, timeout time.Duration) (*runtimeapi.ExecSyncResponse, error) {
	return &runtimeapi.ExecSyncResponse{Stdout: []byte(timeout.String()), ExitCode: 3}, f.did("exec %s", id)
}

func (f *fakePods) Exec(_ context.Context, id string, cmd []string, st pod.Streams, tty bool, resize <-chan pod.Size) (int32, error) {
	size := <-resize
	fmt.Fprintf(st.Out, "%s %v %t %dx%d", id, cmd, tty, size.Width, size.Height)
	return 5, nil
}

func (f *fakePods) UpdatePodCIDR(cidr string) error {
	f.cidr = cidr
	return nil
}

func (f *fakePods) Sandbox(id string) (pod.Sandbox, error) {
	for _, sb := range f.sandboxes {
		if strings.HasPrefix(sb.ID, id) {
			return sb, nil
		}
	}
	return pod.Sandbox{}, fmt.Errorf("pod sandbox %.80q: %w", id, errdefs.ErrNotFound)
}

func (f *fakePods) Container(id string) (pod.Container, error) {
	for _, c := range f.containers {
		if strings.HasPrefix(c.ID, id) {
			return c, nil
		}
	}
	return pod.Container{}, fmt.Errorf("container %.80q: %w", id, errdefs.ErrNotFound)
}

func (f *fakePods) Sandboxes() []pod.Sandbox { return append([]pod.Sandbox(nil), f.sandboxes...) }

func (f *fakePods) Containers() []pod.Container { return append([]pod.Container(nil), f.containers...) }

func (f *fakePods) ContainerStats(_ context.Context, ids []string) ([]*runtimeapi.ContainerStats, error) {
	var all []*runtimeapi.ContainerStats
	for _, id := range ids {
		if c, err := f.Container(id); err == nil && c.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
			all = append(all, &runtimeapi.ContainerStats{Attributes: &runtimeapi.ContainerAttributes{Id: id}})
		}
	}
	return all, nil
}

func (f *fakePods) SandboxStats(_ context.Context, ids []string) ([]*runtimeapi.PodSandboxStats, error) {
	var all []*runtimeapi.PodSandboxStats
	for _, id := range ids {
		if sb, err := f.Sandbox(id); err == nil && sb.State == runtimeapi.PodSandboxState_SANDBOX_READY {
			all = append(all, &runtimeapi.PodSandboxStats{Attributes: &runtimeapi.PodSandboxAttributes{Id: id}})
		}
	}
	return all, nil
}

func (f *fakePods) CgroupDriver(context.Context) (runtimeapi.CgroupDriver, error) {
	return runtimeapi.CgroupDriver_CGROUPFS, nil
}

// fakeImages knows one image.
type fakeImages struct {
	image  image.Image
	names  []string
	pulled []image.PullRequest
	fail   error
	usage  image.Usage
}

func (f *fakeImages) Pull(_ context.Context, r image.PullRequest) (image.Image, error) {
	f.pulled = append(f.pulled, r)
	return f.image, f.fail
}

func (f *fakeImages) GetFor(_ context.Context, ref, _, _ string) (image.Image, error) {
	if strings.Contains(ref, "!") {
		return image.Image{}, fmt.Errorf("image name %q: %w", ref, errdefs.ErrInvalidArgument)
	}
	for _, n := range append(f.names, f.image.ID) {
		if n == ref {
			return f.image, nil
		}
	}
	return image.Image{}, fmt.Errorf("image %q: %w", ref, errdefs.ErrNotFound)
}

func (f *fakeImages) List() []image.Image { return []image.Image{f.image} }

func (f *fakeImages) RemoveFor(ctx context.Context, ref, _ string) error {
	_, err := f.GetFor(ctx, ref, "", "")
	return err
}

func (f *fakeImages) Usage(context.Context) (image.Usage, error) { return f.usage, nil }

// client is both services of a server under test.
type client struct {
	runtimeapi.RuntimeServiceClient
	runtimeapi.ImageServiceClient
	conn *grpc.ClientConn
	// log is what the server logs, at debug level.
	log *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// serve runs a server in this process; change sees it before it serves.
func serve(t testing.TB, pods *fakePods, images *fakeImages, change func(*Server)) *client {
	t.Helper()
	c := &client{log: &lockedBuffer{}}
	o := Options{
		Pods: pods, Images: images, Version: "1.2.3",
		Log: slog.New(slog.NewTextHandler(c.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	var err error
	if o.Stream, err = stream.New(stream.Options{}, StreamRuntime(pods)); err != nil {
		t.Fatal(err)
	}
	if err := o.Stream.Start(); err != nil {
		t.Fatal(err)
	}
	s := New(o)
	if change != nil {
		change(s)
	}
	g := grpc.NewServer(s.GRPCOptions()...)
	s.Register(g)
	l := bufconn.Listen(1 << 20)
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	c.conn, err = grpc.NewClient("passthrough:///test", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }),
		grpc.WithDefaultCallOptions(grpc.MaxCallSendMsgSize(maxMessage), grpc.MaxCallRecvMsgSize(maxMessage)))
	if err != nil {
		t.Fatal(err)
	}
	c.RuntimeServiceClient = runtimeapi.NewRuntimeServiceClient(c.conn)
	c.ImageServiceClient = runtimeapi.NewImageServiceClient(c.conn)
	t.Cleanup(func() {
		c.conn.Close()
		g.Stop()
		<-served
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := o.Stream.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	return c
}

func within(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// drain reads a streamed list to its end and gives its messages.
func drain[T any](t testing.TB, open func() (grpc.ServerStreamingClient[T], error)) []*T {
	t.Helper()
	in, err := open()
	if err != nil {
		t.Fatal(err)
	}
	var all []*T
	for {
		m, err := in.Recv()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, m)
	}
}

func someSandboxes() []pod.Sandbox {
	at := func(s int64) time.Time { return time.Unix(s, 0) }
	return []pod.Sandbox{
		{ID: "bbbb2", State: runtimeapi.PodSandboxState_SANDBOX_NOTREADY, CreatedAt: at(2), Handler: "vm",
			Config: &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Name: "old"}, Labels: map[string]string{"app": "a"}}},
		{ID: "aaaa1", State: runtimeapi.PodSandboxState_SANDBOX_READY, CreatedAt: at(1),
			Config: &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Name: "web"}, Labels: map[string]string{"app": "a", "tier": "front"}}},
		{ID: "cccc3", State: runtimeapi.PodSandboxState_SANDBOX_READY, CreatedAt: at(3),
			Config: &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Name: "db"}}},
	}
}

func someContainers() []pod.Container {
	container := func(id, sandbox string, state runtimeapi.ContainerState, created int64, labels map[string]string) pod.Container {
		return pod.Container{
			ID: id, SandboxID: sandbox, State: state, CreatedAt: time.Unix(created, 0), ImageID: "sha256:" + strings.Repeat("1", 64),
			Config: &runtimeapi.ContainerConfig{Metadata: &runtimeapi.ContainerMetadata{Name: "c-" + id}, Labels: labels, Image: &runtimeapi.ImageSpec{Image: "busybox"}},
		}
	}
	return []pod.Container{
		container("r2", "aaaa1", runtimeapi.ContainerState_CONTAINER_RUNNING, 2, map[string]string{"app": "a"}),
		container("r1", "aaaa1", runtimeapi.ContainerState_CONTAINER_RUNNING, 1, map[string]string{"app": "b"}),
		container("x3", "aaaa1", runtimeapi.ContainerState_CONTAINER_EXITED, 3, map[string]string{"app": "a"}),
		container("r4", "cccc3", runtimeapi.ContainerState_CONTAINER_RUNNING, 4, nil),
	}
}

func anImage() image.Image {
	uid := int64(1000)
	return image.Image{
		ID: "sha256:" + strings.Repeat("1", 64), RepoTags: []string{"docker.io/library/busybox:latest"}, Size: 42, UID: &uid, Pinned: true,
		ChainID: "sha256:" + strings.Repeat("2", 64), ConfigJSON: []byte(`{"config":{"Env":["A=b"]}}`),
	}
}
