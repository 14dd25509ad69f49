package pod

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/image"
	"cloister.dev/internal/network"
	"cloister.dev/internal/shim"
)

// fakeShim answers on a resident shim's socket. Tasks use one core.
type fakeShim struct {
	start time.Time
	asked atomic.Int32
	// probing, when not nil, holds probes up until it is closed.
	probing chan struct{}
	dir     string

	mu   sync.Mutex
	gone map[string]bool          // tasks that it does not know
	sick map[string]bool          // tasks about which it answers nonsense
	ends map[string]chan struct{} // closed when the task has ended
	runs []string                 // tasks that were waited for
	hang map[string]chan struct{} // tasks about which it does not answer
}

type fakeTasks struct {
	taskapi.TTRPCTaskService
	*fakeShim
}

type fakeSandboxes struct {
	sandboxapi.TTRPCSandboxService
	*fakeShim
}

type fakeHost struct {
	hostv1.HostService
	*fakeShim
}

func (f fakeTasks) Stats(ctx context.Context, r *taskapi.StatsRequest) (*taskapi.StatsResponse, error) {
	f.asked.Add(1)
	f.mu.Lock()
	gone, hang := f.gone[r.ID], f.hang[r.ID]
	f.mu.Unlock()
	if gone {
		return nil, errgrpc.ToGRPC(fmt.Errorf("task %s: %w", r.ID, errdefs.ErrNotFound))
	}
	if hang != nil {
		<-hang
	}
	a, err := anypb.New(&cgroup1.Metrics{
		CPU:    &cgroup1.CPUStat{Usage: &cgroup1.CPUUsage{Total: uint64(time.Since(f.start))}},
		Memory: &cgroup1.MemoryStat{Usage: &cgroup1.MemoryEntry{Usage: 1000, Limit: 5000}, TotalInactiveFile: 100},
		Pids:   &cgroup1.PidsStat{Current: 3},
	})
	return &taskapi.StatsResponse{Stats: a}, err
}

func (f fakeHost) Inspect(_ context.Context, r *hostv1.InspectRequest) (*hostv1.InspectResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.gone[r.Id] {
		return nil, errgrpc.ToGRPC(fmt.Errorf("task %s: %w", r.Id, errdefs.ErrNotFound))
	}
	if f.sick[r.Id] {
		return nil, errgrpc.ToGRPC(errdefs.ErrInternal)
	}
	return &hostv1.InspectResponse{Pid: 1}, nil
}

func (f fakeTasks) Wait(ctx context.Context, r *taskapi.WaitRequest) (*taskapi.WaitResponse, error) {
	f.mu.Lock()
	end := f.ends[r.ID]
	f.runs = append(f.runs, r.ID)
	f.mu.Unlock()
	select {
	case <-end:
		return &taskapi.WaitResponse{}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (f fakeTasks) Kill(context.Context, *taskapi.KillRequest) (*emptypb.Empty, error) {
	return nil, errgrpc.ToGRPC(errdefs.ErrNotFound)
}

func (f fakeTasks) Delete(_ context.Context, r *taskapi.DeleteRequest) (*taskapi.DeleteResponse, error) {
	return &taskapi.DeleteResponse{}, os.RemoveAll(filepath.Join(f.dir, "tasks", r.ID))
}

func (f fakeSandboxes) StopSandbox(context.Context, *sandboxapi.StopSandboxRequest) (*sandboxapi.StopSandboxResponse, error) {
	return &sandboxapi.StopSandboxResponse{}, nil
}

func (f fakeSandboxes) WaitSandbox(ctx context.Context, _ *sandboxapi.WaitSandboxRequest) (*sandboxapi.WaitSandboxResponse, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func (f fakeSandboxes) ShutdownSandbox(_ context.Context, r *sandboxapi.ShutdownSandboxRequest) (*sandboxapi.ShutdownSandboxResponse, error) {
	return &sandboxapi.ShutdownSandboxResponse{}, os.RemoveAll(filepath.Join(f.dir, "sandboxes", r.SandboxID))
}

func (f fakeHost) Probe(ctx context.Context, _ *hostv1.ProbeRequest) (*hostv1.ProbeResponse, error) {
	if f.probing != nil {
		select {
		case <-f.probing:
		case <-ctx.Done():
		}
	}
	return &hostv1.ProbeResponse{Works: true}, nil
}

func (f fakeHost) CloseIO(_ context.Context, r *hostv1.CloseIORequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, os.RemoveAll(filepath.Join(f.dir, "pumps", r.Id))
}

func (f *fakeShim) set(m *map[string]bool, id string, v bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if *m == nil {
		*m = map[string]bool{}
	}
	(*m)[id] = v
}

func serveShim(t testing.TB, dir string) *fakeShim {
	t.Helper()
	f := &fakeShim{start: time.Now(), dir: dir, hang: map[string]chan struct{}{}}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "shim.sock"))
	if err != nil {
		t.Fatal(err)
	}
	srv, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	taskapi.RegisterTTRPCTaskService(srv, fakeTasks{fakeShim: f})
	sandboxapi.RegisterTTRPCSandboxService(srv, fakeSandboxes{fakeShim: f})
	hostv1.RegisterHostService(srv, fakeHost{fakeShim: f})
	served := make(chan error, 1)
	go func() { served <- srv.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		srv.Close()
		if err := <-served; !errors.Is(err, ttrpc.ErrServerClosed) {
			t.Errorf("shim server: %v", err)
		}
	})
	return f
}

// fakeNetwork only remembers who holds addresses.
type fakeNetwork struct {
	mu    sync.Mutex
	holds map[string]bool
}

func (n *fakeNetwork) Attach(context.Context, network.Request) (*network.Result, error) {
	return nil, errdefs.ErrNotImplemented
}

func (n *fakeNetwork) Detach(_ context.Context, r network.Request) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.holds, r.ID)
	return nil
}

func (n *fakeNetwork) Ready() error { return nil }
func (n *fakeNetwork) Close() error { return nil }

func (n *fakeNetwork) Allocations(context.Context) ([]string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var ids []string
	for id := range n.holds {
		ids = append(ids, id)
	}
	return ids, nil
}

// machine is a Service on a fake shim, with a real store of images.
type machine struct {
	*Service
	shim *fakeShim
	net  *fakeNetwork
}

func newMachine(t testing.TB, o Options) *machine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts, namespaces and snapshots")
	}
	dir, err := os.MkdirTemp("/tmp", "cl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	log := slog.New(slog.NewTextHandler(testLog{t}, &slog.HandlerOptions{Level: slog.LevelWarn}))
	o.Root, o.State, o.Log = filepath.Join(dir, "root"), filepath.Join(dir, "state"), log
	m := &machine{net: &fakeNetwork{holds: map[string]bool{}}}
	m.shim = serveShim(t, filepath.Join(o.State, "shim", "container"))
	if o.Images, err = image.Open(t.Context(), image.Options{Root: filepath.Join(o.Root, "images"), Log: log}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Images.Close() })
	o.Shims = newShims(t, o)
	o.Network = m.net
	if m.Service, err = Open(o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func newShims(t testing.TB, o Options) *shim.Client {
	t.Helper()
	c, err := shim.New(shim.Options{State: filepath.Join(o.State, "shim"), Log: o.Log,
		Runtimes: map[string]shim.Runtime{"runc": {Type: "io.containerd.runc.v2"}}, Default: "runc"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

type testLog struct{ t testing.TB }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// sandbox puts a ready sandbox with a pinned network namespace on the machine.
func (m *machine) sandbox(t testing.TB, cgroup string) *sandbox {
	t.Helper()
	h, err := m.o.Shims.Handler(t.Context(), "runc")
	if err != nil {
		t.Fatal(err)
	}
	cfg := &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Name: "p", Namespace: "ns", Uid: "u"},
		Labels: map[string]string{"l": "1"}, Linux: &runtimeapi.LinuxPodSandboxConfig{CgroupParent: cgroup,
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{Ipc: runtimeapi.NamespaceMode_NODE}}}}
	sb := m.newSandbox(newID(), "h", cfg, "", h)
	if err := m.makeFolder(sb); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := removeTree(m.podDir(sb.rec.ID)); err != nil {
			t.Error(err)
		}
	})
	m.index.addSandbox(sb)
	if err := m.changeSandbox(sb, func(r *sandboxRecord) { r.Phase = ready }); err != nil {
		t.Fatal(err)
	}
	return sb
}

// container puts a running container into the store. Nothing runs.
func (m *machine) container(t testing.TB, sb *sandbox) *container {
	t.Helper()
	cfg := &runtimeapi.ContainerConfig{Metadata: &runtimeapi.ContainerMetadata{Name: "c"}, Labels: map[string]string{"a": "b"},
		Image: &runtimeapi.ImageSpec{Image: "i"}}
	c := m.newContainer(sb, newID(), "h", cfg, image.Image{})
	m.index.addContainer(c)
	if err := m.changeContainer(c, func(r *containerRecord) { r.Phase, r.StartedAt = running, time.Now() }); err != nil {
		t.Fatal(err)
	}
	return c
}

func (m *machine) rootfs(t testing.TB, id string) {
	t.Helper()
	if _, err := m.o.Images.PrepareRootfs(t.Context(), id, image.Image{}, image.RootfsOptions{}); err != nil {
		t.Fatal(err)
	}
}
