package client

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// RunLabel marks pods that "cloister run" made. Removing their container
// removes the pod as well.
const RunLabel = "cloister.dev/run"

// RunSpec describes a pod with one container.
type RunSpec struct {
	Image   string
	Handler string // runtime handler; empty is the daemon's default
	Name    string // empty makes one up
	Command []string
	Env     []*runtimeapi.KeyValue
	Mounts  []*runtimeapi.Mount
	Ports   []*runtimeapi.PortMapping
	TTY     bool
	Stdin   bool
	// LogRoot is where the pod's log folder is made.
	LogRoot string
}

// Run is a pod with one container.
type Run struct {
	PodID, ContainerID string
	// LogPath is the container's log file.
	LogPath string

	conn   *Conn
	logDir string
}

// CreateRun makes the pod and the container without starting it. On error
// nothing is left.
func (c *Conn) CreateRun(ctx context.Context, s RunSpec) (_ *Run, err error) {
	uid := randomHex(16)
	if s.Name == "" {
		s.Name = "run-" + uid[:8]
	}
	r := &Run{conn: c, logDir: filepath.Join(s.LogRoot, "default_"+s.Name+"_"+uid)}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Remove(context.WithoutCancel(ctx)))
		}
	}()
	if err := os.MkdirAll(r.logDir, 0o755); err != nil {
		return nil, fmt.Errorf("make the log folder: %w", err)
	}
	pod := s.podConfig(uid, r.logDir)
	sandbox, err := c.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: pod, RuntimeHandler: s.Handler})
	if err != nil {
		return nil, fmt.Errorf("start pod %s: %w", s.Name, err)
	}
	r.PodID = sandbox.GetPodSandboxId()
	config := s.containerConfig()
	container, err := c.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId: r.PodID, Config: config, SandboxConfig: pod,
	})
	if err != nil {
		return nil, fmt.Errorf("create container %s: %w", s.Name, err)
	}
	r.ContainerID = container.GetContainerId()
	r.LogPath = filepath.Join(r.logDir, config.GetLogPath())
	return r, nil
}

func (s RunSpec) podConfig(uid, logDir string) *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: s.Name, Uid: uid, Namespace: "default"},
		Hostname:     s.Name,
		LogDirectory: logDir,
		PortMappings: s.Ports,
		Labels:       map[string]string{RunLabel: "true"},
		Linux:        &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{}},
	}
}

func (s RunSpec) containerConfig() *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata:  &runtimeapi.ContainerMetadata{Name: s.Name},
		Image:     &runtimeapi.ImageSpec{Image: s.Image, UserSpecifiedImage: s.Image, RuntimeHandler: s.Handler},
		Args:      s.Command,
		Envs:      s.Env,
		Mounts:    s.Mounts,
		Labels:    map[string]string{RunLabel: "true"},
		LogPath:   "0.log",
		Stdin:     s.Stdin,
		StdinOnce: s.Stdin,
		Tty:       s.TTY,
		Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			// A pod of kubelet that names no profile runs unconfined; a person's
			// command should not.
			Seccomp: &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault},
			NamespaceOptions: &runtimeapi.NamespaceOption{
				Pid: runtimeapi.NamespaceMode_CONTAINER,
			},
		}},
	}
}

// ErrCommandNotFound and ErrCommandNotRunnable are in the chain of Start's
// error when it is the command that is wrong, not the daemon.
var (
	ErrCommandNotFound    = errors.New("the command was not found in the image")
	ErrCommandNotRunnable = errors.New("the command cannot be run")
)

// Start starts the container.
func (r *Run) Start(ctx context.Context) error {
	_, err := r.conn.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: r.ContainerID})
	switch {
	case hasCode(err, codes.NotFound):
		return fmt.Errorf("start container: %w: %w", err, ErrCommandNotFound)
	case hasCode(err, codes.PermissionDenied):
		return fmt.Errorf("start container: %w: %w", err, ErrCommandNotRunnable)
	case err != nil:
		return fmt.Errorf("start container: %w", err)
	}
	return nil
}

// Stop asks the container to end and kills it when the grace time is over.
func (r *Run) Stop(ctx context.Context, grace time.Duration) error {
	return r.conn.StopContainer(ctx, r.ContainerID, grace)
}

// AttachURL is where the container's streams are served.
func (r *Run) AttachURL(ctx context.Context, stdin, output, tty bool) (string, error) {
	a, err := r.conn.Runtime.Attach(ctx, &runtimeapi.AttachRequest{
		ContainerId: r.ContainerID, Stdin: stdin, Stdout: output, Stderr: output && !tty, Tty: tty,
	})
	if err != nil {
		return "", fmt.Errorf("attach to container: %w", err)
	}
	return a.GetUrl(), nil
}

// Remove takes the pod with all that belongs to it down.
func (r *Run) Remove(ctx context.Context) error {
	if r.PodID != "" {
		if err := r.conn.RemovePod(ctx, r.PodID, true); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(r.logDir); err != nil {
		return fmt.Errorf("remove the log folder: %w", err)
	}
	return nil
}

func randomHex(bytes int) string {
	b := make([]byte, bytes)
	rand.Read(b) // never fails: the standard library ends the program instead
	return hex.EncodeToString(b)
}
