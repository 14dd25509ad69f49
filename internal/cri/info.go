package cri

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/image"
	"cloister.dev/internal/pod"
)

// hidden stands where verbose information would show a secret. Kubernetes
// passes secrets in environment variables.
const hidden = "***"

// maxSpec bounds the specification that is read back for verbose information.
const maxSpec = 8 << 20

// encode puts v under the one key that crictl shows as an object.
func encode(v any) (map[string]string, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode verbose information: %w", err)
	}
	return map[string]string{"info": string(b)}, nil
}

// The keys below are those of containerd, for the tools that read them.

func sandboxInfo(sb pod.Sandbox) (map[string]string, error) {
	info := struct {
		Pid            uint32                         `json:"pid"`
		ProcessStatus  string                         `json:"processStatus"`
		NetNSClosed    bool                           `json:"netNamespaceClosed"`
		RuntimeHandler string                         `json:"runtimeHandler"`
		Bundle         string                         `json:"bundle"`
		RuntimeSpec    *specs.Spec                    `json:"runtimeSpec,omitempty"`
		CNIResult      json.RawMessage                `json:"cniResult,omitempty"`
		Overhead       *runtimeapi.ContainerResources `json:"overhead,omitempty"`
		Resources      *runtimeapi.ContainerResources `json:"resources,omitempty"`
		Config         *runtimeapi.PodSandboxConfig   `json:"config"`
	}{
		Pid: sb.Pid, ProcessStatus: "running", RuntimeHandler: sb.Handler, Bundle: sb.Bundle, Config: sb.Config,
	}
	if sb.State != runtimeapi.PodSandboxState_SANDBOX_READY {
		info.ProcessStatus, info.NetNSClosed = "deleted", sb.NetNS != ""
	}
	if sb.Resized {
		info.Overhead, info.Resources = &runtimeapi.ContainerResources{Linux: sb.Overhead}, &runtimeapi.ContainerResources{Linux: sb.Resources}
	}
	if json.Valid(sb.Network) {
		info.CNIResult = sb.Network
	}
	if sb.NetNS != "" {
		// There is no sandbox container and so no specification; network tools
		// look up the namespace here.
		info.RuntimeSpec = &specs.Spec{Version: specs.Version, Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{
			{Type: specs.NetworkNamespace, Path: sb.NetNS},
		}}}
	}
	return encode(info)
}

func containerInfo(c pod.Container) (map[string]string, error) {
	spec, err := runtimeSpec(c.Bundle)
	if err != nil {
		return nil, err
	}
	return encode(struct {
		SandboxID      string                      `json:"sandboxID"`
		Pid            uint32                      `json:"pid"`
		RuntimeHandler string                      `json:"runtimeHandler"`
		Bundle         string                      `json:"bundle"`
		Config         *runtimeapi.ContainerConfig `json:"config"`
		RuntimeSpec    json.RawMessage             `json:"runtimeSpec,omitempty"`
	}{c.SandboxID, c.Pid, c.Handler, c.Bundle, withoutSecrets(c.Config), spec})
}

// withoutSecrets is a copy of the configuration that shows which environment
// variables are set, not to what.
func withoutSecrets(c *runtimeapi.ContainerConfig) *runtimeapi.ContainerConfig {
	if len(c.GetEnvs()) == 0 {
		return c
	}
	c = proto.CloneOf(c)
	for _, e := range c.Envs {
		e.Value = []byte(hidden)
	}
	return c
}

// runtimeSpec is the container's OCI specification with the values of its
// environment hidden; nil when there is none any more.
func runtimeSpec(bundle string) (json.RawMessage, error) {
	if bundle == "" {
		return nil, nil
	}
	path := filepath.Join(bundle, "config.json")
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("read the container's specification: %w", err)
	case st.Size() > maxSpec:
		return nil, nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the container's specification: %w", err)
	}
	// Not specs.Spec: a newer runtime's fields must be shown too.
	var spec map[string]any
	if err := json.Unmarshal(b, &spec); err != nil {
		return nil, fmt.Errorf("read the container's specification: %w", err)
	}
	if process, ok := spec["process"].(map[string]any); ok {
		env, _ := process["env"].([]any)
		for i, e := range env {
			if s, ok := e.(string); ok {
				name, _, _ := strings.Cut(s, "=")
				env[i] = name + "=" + hidden
			}
		}
	}
	return json.Marshal(spec)
}

func imageInfo(img image.Image) (map[string]string, error) {
	info := struct {
		ChainID   string          `json:"chainID"`
		ImageSpec json.RawMessage `json:"imageSpec,omitempty"`
	}{ChainID: img.ChainID}
	if json.Valid(img.ConfigJSON) {
		info.ImageSpec = img.ConfigJSON
	}
	return encode(info)
}
