package pod

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// phase is where a sandbox or container stands on its way. Creating, stopping
// and removing are intents: a crash may have left their work half done.
type phase string

const (
	creating phase = "creating"
	ready    phase = "ready"
	stopping phase = "stopping"
	stopped  phase = "stopped"
	running  phase = "running"
	exited   phase = "exited"
	removing phase = "removing"
)

func (p phase) sandboxState() runtimeapi.PodSandboxState {
	if p == ready {
		return runtimeapi.PodSandboxState_SANDBOX_READY
	}
	return runtimeapi.PodSandboxState_SANDBOX_NOTREADY
}

func (p phase) containerState() runtimeapi.ContainerState {
	switch p {
	case ready, creating:
		return runtimeapi.ContainerState_CONTAINER_CREATED
	case running:
		return runtimeapi.ContainerState_CONTAINER_RUNNING
	case exited, removing:
		return runtimeapi.ContainerState_CONTAINER_EXITED
	default:
		return runtimeapi.ContainerState_CONTAINER_UNKNOWN
	}
}

// idLength is the length of sandbox and container ids: 32 random bytes in hex.
const idLength = 64

func newID() string {
	var b [idLength / 2]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// hashOf tells requests apart: equal messages have equal hashes.
func hashOf(parts ...proto.Message) (string, error) {
	h := sha256.New()
	for _, p := range parts {
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(p)
		if err != nil {
			return "", fmt.Errorf("encode the request: %w", err)
		}
		fmt.Fprintf(h, "%d:", len(b))
		h.Write(b)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// sandboxName is what reserves a sandbox: the pod and the attempt.
func sandboxName(m *runtimeapi.PodSandboxMetadata) string {
	return fmt.Sprintf("%s/%s/%s/%d", m.GetNamespace(), m.GetName(), m.GetUid(), m.GetAttempt())
}

// containerName is what reserves a container: its sandbox, name and attempt.
func containerName(sandboxID string, m *runtimeapi.ContainerMetadata) string {
	return fmt.Sprintf("%s/%s/%d", sandboxID, m.GetName(), m.GetAttempt())
}
