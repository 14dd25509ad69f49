// Package network attaches a pod's network namespace to the node's network and
// detaches it again. It promises that Detach may be repeated until it succeeds,
// with or without the namespace, and that an Attach that failed left nothing.
//
// It knows nothing of pods beyond the names that plugins are told, and nothing
// of CRI. Two implementations: cni (the node's conflists) and builtin (a
// bridge of our own); both run the suite in networktest.
package network

import (
	"context"
	"encoding/json"
	"net/netip"
)

// Attacher connects network namespaces. It is safe for concurrent use; calls
// for one sandbox id are serialised by the caller.
type Attacher interface {
	// Attach connects the namespace pinned at r.NetNS. On error everything it
	// did was undone, or is undone by a later Detach of the same request.
	Attach(ctx context.Context, r Request) (*Result, error)
	// Detach releases addresses, ports and interfaces. The namespace may be
	// gone already (r.NetNS empty or absent): then only what lives outside of
	// it is released. Nothing to do is success.
	Detach(ctx context.Context, r Request) error
	// Ready returns nil when Attach can work, otherwise an error whose text is
	// the reason in CRI's NetworkReady condition.
	Ready() error
	// Allocations lists the sandbox ids that hold addresses or ports on the
	// node, for finding orphans.
	Allocations(ctx context.Context) ([]string, error)
	// Close ends watchers. Attached namespaces stay attached.
	Close() error
}

// Request names one sandbox and what it wants.
type Request struct {
	ID          string // sandbox id; the CNI container id
	Handler     string // runtime handler, which may have networks of its own
	Namespace   string // Kubernetes names, passed to plugins as K8S_POD_*
	Name        string
	UID         string
	NetNS       string // path of the pinned namespace
	Ports       []PortMapping
	Bandwidth   *Bandwidth
	DNS         *DNS
	CgroupPath  string            // pod cgroup parent, capability cgroupPath
	Labels      map[string]string // capability io.kubernetes.cri.pod-annotations is fed from Annotations
	Annotations map[string]string
	// Cached is Result.Raw of the Attach, when known, as CNI's prevResult.
	Cached json.RawMessage
}

// PortMapping publishes a port of the pod on the node.
type PortMapping struct {
	Protocol      string // "tcp", "udp" or "sctp"
	ContainerPort uint16
	HostPort      uint16     // never 0 here
	HostIP        netip.Addr // zero: all addresses of the node
}

// Bandwidth limits traffic of the pod; rates in bits per second, 0 = no limit.
type Bandwidth struct {
	IngressRate, EgressRate uint64
}

// DNS is what the pod wants of name resolution.
type DNS struct {
	Servers, Searches, Options []string
}

// Result is what Attach did.
type Result struct {
	IPs []netip.Addr // of the pod's main interface, primary family first
	// Interface is the name of the main interface inside the namespace.
	Interface string
	DNS       DNS // what the plugins say of DNS, may be empty
	// Raw is the CNI result (version 1.0.0 or newer), kept by the caller for
	// Detach and for the verbose status.
	Raw json.RawMessage
}
