package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	debugv1 "cloister.dev/api/debug/v1"
)

// fakeDaemon serves what a test gives it; everything else is Unimplemented.
type fakeDaemon struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	runtimeapi.UnimplementedImageServiceServer
	debugv1.UnimplementedDebugServer

	mu         sync.Mutex
	containers []*runtimeapi.Container
	status     map[string]*runtimeapi.ContainerStatus
	events     chan *runtimeapi.ContainerEventResponse
	pull       func(ctx context.Context, ref string) (string, error)
	layers     chan []*debugv1.Layer
	calls      []string
	failCreate bool
}

func (d *fakeDaemon) called(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls = append(d.calls, name)
}

func serveFake(t *testing.T, d *fakeDaemon) *Conn {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "cl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	runtimeapi.RegisterRuntimeServiceServer(g, d)
	runtimeapi.RegisterImageServiceServer(g, d)
	debugv1.RegisterDebugServer(g, d)
	served := make(chan struct{})
	go func() { defer close(served); _ = g.Serve(l) }()
	t.Cleanup(func() { g.Stop(); <-served })
	c, err := Dial(t.Context(), "unix://"+path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func (d *fakeDaemon) ListContainers(context.Context, *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	return &runtimeapi.ListContainersResponse{Containers: d.containers}, nil
}

func (d *fakeDaemon) ContainerStatus(_ context.Context, r *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	st, ok := d.status[r.GetContainerId()]
	if !ok {
		return nil, status.Errorf(codes.NotFound, "container %q is not known", r.GetContainerId())
	}
	return &runtimeapi.ContainerStatusResponse{Status: st}, nil
}

func (d *fakeDaemon) GetContainerEvents(_ *runtimeapi.GetEventsRequest, s runtimeapi.RuntimeService_GetContainerEventsServer) error {
	if d.events == nil {
		return status.Error(codes.Unimplemented, "no events")
	}
	for {
		select {
		case e := <-d.events:
			if err := s.Send(e); err != nil {
				return err
			}
		case <-s.Context().Done():
			return nil
		}
	}
}

func (d *fakeDaemon) PullImage(ctx context.Context, r *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	ref, err := d.pull(ctx, r.GetImage().GetImage())
	return &runtimeapi.PullImageResponse{ImageRef: ref}, err
}

func (d *fakeDaemon) PullProgress(_ *debugv1.PullProgressRequest, s debugv1.Debug_PullProgressServer) error {
	for {
		select {
		case l := <-d.layers:
			if err := s.Send(&debugv1.PullProgressResponse{Layers: l}); err != nil {
				return err
			}
		case <-s.Context().Done():
			return nil
		}
	}
}

func (d *fakeDaemon) RunPodSandbox(context.Context, *runtimeapi.RunPodSandboxRequest) (*runtimeapi.RunPodSandboxResponse, error) {
	d.called("run")
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: "pod1"}, nil
}

func (d *fakeDaemon) CreateContainer(_ context.Context, r *runtimeapi.CreateContainerRequest) (*runtimeapi.CreateContainerResponse, error) {
	d.called("create " + r.GetConfig().GetImage().GetImage())
	if d.failCreate {
		return nil, status.Error(codes.InvalidArgument, "no such user")
	}
	return &runtimeapi.CreateContainerResponse{ContainerId: "c1"}, nil
}

func (d *fakeDaemon) PodSandboxStatus(context.Context, *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	return &runtimeapi.PodSandboxStatusResponse{Status: &runtimeapi.PodSandboxStatus{Id: "pod1"}}, nil
}

func (d *fakeDaemon) StopPodSandbox(context.Context, *runtimeapi.StopPodSandboxRequest) (*runtimeapi.StopPodSandboxResponse, error) {
	d.called("stop")
	return &runtimeapi.StopPodSandboxResponse{}, nil
}

func (d *fakeDaemon) RemovePodSandbox(context.Context, *runtimeapi.RemovePodSandboxRequest) (*runtimeapi.RemovePodSandboxResponse, error) {
	d.called("remove")
	return &runtimeapi.RemovePodSandboxResponse{}, nil
}

func TestDialWithoutDaemon(t *testing.T) {
	_, err := Dial(t.Context(), "/tmp/no-daemon-here.sock")
	if !errors.Is(err, ErrNoDaemon) || !strings.Contains(err.Error(), "cloister daemon") {
		t.Errorf("got %v", err)
	}
	// A socket that nobody serves any more says the same.
	dir := t.TempDir()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if _, err := Dial(t.Context(), filepath.Join(dir, "s")); !errors.Is(err, ErrNoDaemon) {
		t.Errorf("got %v", err)
	}
	if _, err := Dial(t.Context(), "tcp://1.2.3.4:5"); err == nil {
		t.Error("an address that is no path was taken")
	}
}

func TestContainerIsFound(t *testing.T) {
	c := serveFake(t, &fakeDaemon{containers: []*runtimeapi.Container{
		{Id: "abc111", Metadata: &runtimeapi.ContainerMetadata{Name: "web"}},
		{Id: "abc222", Metadata: &runtimeapi.ContainerMetadata{Name: "db"}},
		{Id: "def333", Metadata: &runtimeapi.ContainerMetadata{Name: "abc"}},
		{Id: "fff444", Metadata: &runtimeapi.ContainerMetadata{Name: "twin"}},
		{Id: "fff555", Metadata: &runtimeapi.ContainerMetadata{Name: "twin"}},
	}})
	tests := []struct {
		ref, id string
		err     error
	}{
		{"abc222", "abc222", nil}, {"web", "abc111", nil}, {"abc2", "abc222", nil},
		{"abc", "def333", nil}, // a name goes before a part of an id
		{"ab", "", errdefs.ErrInvalidArgument}, {"twin", "", errdefs.ErrInvalidArgument},
		{"zzz", "", errdefs.ErrNotFound}, {"", "", errdefs.ErrInvalidArgument},
	}
	for _, tt := range tests {
		x, err := c.Container(t.Context(), tt.ref)
		if x.GetId() != tt.id || !errors.Is(err, tt.err) {
			t.Errorf("%q: got %q, %v; want %q, %v", tt.ref, x.GetId(), err, tt.id, tt.err)
		}
	}
}

func TestWaitExit(t *testing.T) {
	running := &runtimeapi.ContainerStatus{Id: "c", State: runtimeapi.ContainerState_CONTAINER_RUNNING}
	exited := &runtimeapi.ContainerStatus{Id: "c", State: runtimeapi.ContainerState_CONTAINER_EXITED, ExitCode: 7}
	for _, withEvents := range []bool{true, false} {
		d := &fakeDaemon{status: map[string]*runtimeapi.ContainerStatus{"c": running}}
		if withEvents {
			d.events = make(chan *runtimeapi.ContainerEventResponse)
		}
		c := serveFake(t, d)
		go func() {
			if withEvents {
				// Of another container: must not end the wait.
				d.events <- &runtimeapi.ContainerEventResponse{ContainerId: "x", ContainerEventType: runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT}
			}
			d.mu.Lock()
			d.status["c"] = exited
			d.mu.Unlock()
			if withEvents {
				d.events <- &runtimeapi.ContainerEventResponse{ContainerId: "c", ContainerEventType: runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT}
			}
		}()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		st, err := c.WaitExit(ctx, "c")
		cancel()
		if err != nil || st.GetExitCode() != 7 {
			t.Errorf("events %v: got %v, %v", withEvents, st, err)
		}
	}
}

func TestWaitExitOfNobody(t *testing.T) {
	c := serveFake(t, &fakeDaemon{})
	_, err := c.WaitExit(t.Context(), "gone")
	if status.Code(err) != codes.NotFound {
		t.Errorf("got %v", err)
	}
	if s := Sentence(err); strings.Contains(s, "rpc error") || !strings.Contains(s, `container "gone" is not known`) {
		t.Errorf("said %q", s)
	}
}

func TestPullShowsProgress(t *testing.T) {
	d := &fakeDaemon{layers: make(chan []*debugv1.Layer)}
	shown := make(chan int64, 1)
	d.pull = func(ctx context.Context, ref string) (string, error) {
		d.layers <- []*debugv1.Layer{{Digest: "a", Offset: 5, Total: 10}}
		select {
		case n := <-shown:
			return fmt.Sprintf("sha256:%s-%d", ref, n), nil
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
	c := serveFake(t, d)
	ref, err := c.Pull(deadline(t), "img", "", func(l []*debugv1.Layer) { shown <- l[0].GetOffset() })
	if err != nil || ref != "sha256:img-5" {
		t.Errorf("got %q, %v", ref, err)
	}
}

func TestPullWithoutProgress(t *testing.T) {
	d := &fakeDaemon{pull: func(context.Context, string) (string, error) {
		return "", status.Error(codes.NotFound, "no such image")
	}}
	if _, err := serveFake(t, d).Pull(deadline(t), "img", "", nil); status.Code(err) != codes.NotFound {
		t.Errorf("got %v", err)
	}
}

func TestCreateRun(t *testing.T) {
	d := &fakeDaemon{}
	c := serveFake(t, d)
	logs := t.TempDir()
	r, err := c.CreateRun(t.Context(), RunSpec{Image: "img", LogRoot: logs})
	if err != nil {
		t.Fatal(err)
	}
	if r.PodID != "pod1" || r.ContainerID != "c1" || !strings.HasPrefix(r.LogPath, logs+"/default_run-") {
		t.Errorf("got %+v", r)
	}
	if err := r.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if want := "run, create img, stop, remove"; strings.Join(d.calls, ", ") != want {
		t.Errorf("called %v, want %s", d.calls, want)
	}
	isEmpty(t, logs)
}

func TestCreateRunLeavesNothing(t *testing.T) {
	d := &fakeDaemon{failCreate: true}
	c := serveFake(t, d)
	logs := t.TempDir()
	_, err := c.CreateRun(t.Context(), RunSpec{Image: "img", LogRoot: logs})
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("got %v", err)
	}
	if want := "run, create img, stop, remove"; strings.Join(d.calls, ", ") != want {
		t.Errorf("called %v, want %s", d.calls, want)
	}
	isEmpty(t, logs)
}

func isEmpty(t *testing.T, dir string) {
	t.Helper()
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}
