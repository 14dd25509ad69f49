package pod

import (
	"encoding/json"
	"io"
	"net/netip"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Sandbox is a snapshot of one pod sandbox. It does not change; its pointers
// are shared and only read.
type Sandbox struct {
	ID        string
	Config    *runtimeapi.PodSandboxConfig
	Handler   string // as the client named it, "" for the default
	State     runtimeapi.PodSandboxState
	CreatedAt time.Time
	IPs       []netip.Addr // primary first
	NetNS     string       // path of the pinned namespace, empty on the node's network
	Pid       uint32       // of the holder process, 0 when there is none
	Bundle    string
	Network   json.RawMessage // CNI result
	Overhead  *runtimeapi.LinuxContainerResources
	Resources *runtimeapi.LinuxContainerResources
	Resized   bool // Overhead or Resources are not those of Config any more
}

// Container is a snapshot of one container. It does not change; its pointers
// are shared and only read.
type Container struct {
	ID         string
	SandboxID  string
	Config     *runtimeapi.ContainerConfig
	ImageID    string // config digest
	State      runtimeapi.ContainerState
	CreatedAt  time.Time
	StartedAt  time.Time
	FinishedAt time.Time
	ExitCode   int32
	Reason     string // Completed, Error, OOMKilled, StartError, Unknown
	Message    string
	LogPath    string // absolute, empty when the container has no log
	Pid        uint32
	User       *runtimeapi.ContainerUser
	Mounts     []*runtimeapi.Mount
	Resources  *runtimeapi.ContainerResources
	StopSignal runtimeapi.Signal
	Handler    string
	Bundle     string
}

// Streams are the client's ends of an exec or attach; nil ones are not wanted.
type Streams struct {
	In  io.Reader
	Out io.WriteCloser
	Err io.WriteCloser
}

// Size is a terminal's size in characters.
type Size struct {
	Width, Height uint16
}
