// Package cri is the CRI server: it checks the shape of requests, translates
// them for the pod and image services, and answers in CRI's terms. It keeps no
// state of its own.
//
// It promises that
//   - no request, however malformed, reaches the services below without its
//     ids, names and numbers being of a sane shape (check.go), and none ends
//     the process: a panic is one failed call;
//   - every error carries a gRPC code that says what to do next (errors.go);
//   - secrets (registry credentials, values of environment variables) reach
//     neither the log nor an error nor verbose information;
//   - what is not built answers Unimplemented.
//
// It must not know how pods are isolated, where their state lies, or how
// images are fetched.
package cri

import (
	"context"
	"io"
	"log/slog"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/image"
	"cloister.dev/internal/pod"
	"cloister.dev/internal/stream"
)

// Pods is what the server needs of the pod service. Errors are typed with
// errdefs; ids may be shortened as long as they are unambiguous.
type Pods interface {
	RunSandbox(ctx context.Context, cfg *runtimeapi.PodSandboxConfig, handler string) (string, error)
	StopSandbox(ctx context.Context, id string) error
	RemoveSandbox(ctx context.Context, id string) error
	Sandbox(id string) (pod.Sandbox, error)
	Sandboxes() []pod.Sandbox
	UpdateSandboxResources(ctx context.Context, r *runtimeapi.UpdatePodSandboxResourcesRequest) error

	CreateContainer(ctx context.Context, sandboxID string, cfg *runtimeapi.ContainerConfig, sandboxCfg *runtimeapi.PodSandboxConfig) (string, error)
	StartContainer(ctx context.Context, id string) error
	StopContainer(ctx context.Context, id string, timeout time.Duration) error
	RemoveContainer(ctx context.Context, id string) error
	Container(id string) (pod.Container, error)
	Containers() []pod.Container
	UpdateResources(ctx context.Context, id string, r *runtimeapi.LinuxContainerResources, annotations map[string]string) error
	ReopenLog(ctx context.Context, id string) error

	ExecSync(ctx context.Context, id string, cmd []string, timeout time.Duration) (*runtimeapi.ExecSyncResponse, error)
	Exec(ctx context.Context, id string, cmd []string, st pod.Streams, tty bool, resize <-chan pod.Size) (int32, error)
	Attach(ctx context.Context, id string, st pod.Streams, tty bool, resize <-chan pod.Size) error
	PortForward(ctx context.Context, sandboxID string, port int32, conn io.ReadWriteCloser) error

	// ContainerStats and SandboxStats measure those of ids that run; the
	// others are left out.
	ContainerStats(ctx context.Context, ids []string) ([]*runtimeapi.ContainerStats, error)
	SandboxStats(ctx context.Context, ids []string) ([]*runtimeapi.PodSandboxStats, error)
	Metrics(ctx context.Context) ([]*runtimeapi.PodSandboxMetrics, error)
	MetricDescriptors() []*runtimeapi.MetricDescriptor
	Subscribe() *pod.Subscription

	Status(ctx context.Context, verbose bool) (*runtimeapi.StatusResponse, error)
	CgroupDriver(ctx context.Context) (runtimeapi.CgroupDriver, error)
	UpdatePodCIDR(cidr string) error
}

// Images is what the server needs of the image service. References may be
// names in any form, IDs, or unambiguous beginnings of IDs.
type Images interface {
	Pull(ctx context.Context, req image.PullRequest) (image.Image, error)
	GetFor(ctx context.Context, ref, snapshotter, platform string) (image.Image, error)
	List() []image.Image
	RemoveFor(ctx context.Context, ref, platform string) error
	Usage(ctx context.Context) (image.Usage, error)
}

// Options configure a Server.
type Options struct {
	Pods    Pods
	Images  Images
	Stream  *stream.Server // made with StreamRuntime
	Version string         // of the daemon, semantic
	// Snapshotter tells where images for a runtime handler are unpacked; nil
	// means the default for all.
	Snapshotter func(handler string) (string, error)
	// Platform tells for which platform images for a runtime handler are pulled,
	// "" for the node's own; nil means that for all.
	Platform func(handler string) string
	Log      *slog.Logger
	// ObserveCall and ObservePull are told of calls and pulls; nil ones are not.
	ObserveCall func(call, code string, took time.Duration)
	ObservePull func(took time.Duration, bytes int64, err error)
}

// Server implements CRI's RuntimeService and ImageService.
type Server struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	runtimeapi.UnimplementedImageServiceServer

	pods        Pods
	images      Images
	stream      *stream.Server
	version     string
	snapshotter func(handler string) (string, error)
	platform    func(handler string) string
	log         *slog.Logger
	subscribe   func() events
	observeCall func(call, code string, took time.Duration)
	observePull func(took time.Duration, bytes int64, err error)

	stopping context.Context // over once event streams are to end
	stop     context.CancelFunc
}

// events is a running subscription.
type events interface {
	Next(ctx context.Context) (*runtimeapi.ContainerEventResponse, error)
	Close()
}

// New makes a server of the given services.
func New(o Options) *Server {
	s := &Server{
		pods: o.Pods, images: o.Images, stream: o.Stream, version: o.Version, snapshotter: o.Snapshotter, platform: o.Platform, log: o.Log,
		observeCall: o.ObserveCall, observePull: o.ObservePull,
		subscribe: func() events { return o.Pods.Subscribe() },
	}
	s.stopping, s.stop = context.WithCancel(context.Background())
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.snapshotter == nil {
		s.snapshotter = func(string) (string, error) { return "", nil }
	}
	if s.platform == nil {
		s.platform = func(string) string { return "" }
	}
	return s
}

// Shutdown ends the calls that would go on for ever (event streams), so that a
// graceful stop of the gRPC server can end. Their clients connect again.
func (s *Server) Shutdown() { s.stop() }

// Register adds both services to g, which must have been made with GRPCOptions.
func (s *Server) Register(g *grpc.Server) {
	runtimeapi.RegisterRuntimeServiceServer(g, s)
	runtimeapi.RegisterImageServiceServer(g, s)
}

const (
	// maxMessage is what kubelet and containerd agree on.
	maxMessage = 16 << 20
	// maxStreams bounds concurrent calls of one client.
	maxStreams = 10000
)

// GRPCOptions are what the gRPC server of the CRI socket needs: the checks, the
// error codes and the log around every call, and limits.
func (s *Server) GRPCOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(s.unary),
		grpc.ChainStreamInterceptor(s.streaming),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxSendMsgSize(maxMessage),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 2 * time.Minute, Timeout: 20 * time.Second}),
	}
}
