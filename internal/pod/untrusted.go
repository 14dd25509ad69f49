package pod

import (
	"fmt"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// untrustedAnnotation is how pods asked for isolation before there were
	// runtime classes.
	untrustedAnnotation = "io.kubernetes.cri.untrusted-workload"
	// untrustedHandler runs them.
	untrustedHandler = "untrusted"
)

// handlerName gives the handler that a pod asks for, by name or by annotation.
func (s *Service) handlerName(cfg *runtimeapi.PodSandboxConfig, named string) (string, error) {
	if cfg.GetAnnotations()[untrustedAnnotation] != "true" {
		return named, nil
	}
	if named != "" && named != untrustedHandler {
		return "", fmt.Errorf("the annotation %s asks for the handler %q and runtime_handler for %q: remove one of them: %w",
			untrustedAnnotation, untrustedHandler, named, errdefs.ErrInvalidArgument)
	}
	ns, node := cfg.GetLinux().GetSecurityContext().GetNamespaceOptions(), runtimeapi.NamespaceMode_NODE
	for _, n := range []struct {
		name string
		mode runtimeapi.NamespaceMode
	}{{"network", ns.GetNetwork()}, {"PID", ns.GetPid()}, {"IPC", ns.GetIpc()}} {
		if n.mode == node {
			return "", fmt.Errorf("a pod with the annotation %s may not have the node's %s namespace: %w",
				untrustedAnnotation, n.name, errdefs.ErrInvalidArgument)
		}
	}
	if _, err := s.o.Shims.Lookup(untrustedHandler); err != nil {
		return "", fmt.Errorf("the annotation %s needs a handler %q in [plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes]: %w",
			untrustedAnnotation, untrustedHandler, err)
	}
	return untrustedHandler, nil
}
