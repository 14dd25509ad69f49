// Package oci makes an OCI runtime specification (config.json) out of a pod, a
// container and an image. It promises that the same input gives the same spec,
// that hostile fields of an image (user, env, volumes, labels) cannot name
// anything outside the container's root file system, and that what the kernel
// or the OCI runtime cannot do is an error, never a weaker container.
//
// It does not create anything on the node (no mounts, no cgroups, no
// directories), knows no CRI server, no store and no shim.
package oci

import (
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Input is everything a spec depends on.
type Input struct {
	ID        string // container id
	SandboxID string
	Sandbox   *runtimeapi.PodSandboxConfig
	Config    *runtimeapi.ContainerConfig
	Image     imagespec.ImageConfig // hostile
	ImageName string                // for annotations
	// Rootfs is where the container's root file system is mounted now; only
	// read, with every path resolved beneath it.
	Rootfs     string
	Namespaces Namespaces
	Files      Files
	// ImageVolumes maps an image mount's container path to the folder on the
	// node where that image is mounted (sub-path already resolved).
	ImageVolumes map[string]string
	// Volumes maps a path of the image's VOLUME list to the folder on the node
	// that backs it. Paths that a mount of Config covers are not in it.
	Volumes map[string]string
	// SandboxLabel is the SELinux process label of the pod; containers that
	// name no label of their own share it.
	SandboxLabel string
	// CgroupParent stands in for the pod's own, when not empty.
	CgroupParent string
	Node         Node
	Handler      Handler
}

// Result is a spec and what its user needs beside it.
type Result struct {
	Spec *specs.Spec
	// User is who the first process runs as, for ContainerStatus.
	User *runtimeapi.ContainerUser
	// StopSignal is the signal's name, such as "SIGTERM"; never empty.
	StopSignal string
	// Relabel are the mount sources that the caller relabels with
	// Spec.Linux.MountLabel before the container starts.
	Relabel []string
	// DefaultAppArmor says that the profile named DefaultAppArmorProfile must
	// be loaded before the container starts.
	DefaultAppArmor bool
	// Warnings are sentences for the log: what was asked for and is tolerated
	// to be absent on this machine.
	Warnings []string
}

// Namespaces are paths of pinned namespaces; empty means the node's own,
// except PID: empty with PrivatePID means a new one for this container.
type Namespaces struct {
	Net, IPC, UTS, PID, User, Cgroup string
	PrivatePID                       bool
	// UIDs and GIDs are the mappings of User.
	UIDs, GIDs []*runtimeapi.IDMapping
}

// Files are the node's files that appear under /etc and /dev of the container;
// empty ones do not appear. With a user namespace they, like the folders of
// Input.Volumes, already belong to its root.
type Files struct {
	ResolvConf, Hostname, Hosts, Shm string
}

// Node is what the machine is.
type Node struct {
	CgroupV2           bool
	Seccomp, AppArmor  bool
	SELinux            bool
	SeccompProfileRoot string // localhost profiles lie beneath it
	RestrictOOMScore   bool   // never go below the daemon's own oom_score_adj
	DaemonOOMScore     int
	HugetlbTolerated   bool // a missing hugetlb controller is not an error
	HugetlbDisabled    bool // hugepage limits are not set at all
	CDISpecDirs        []string
	DefaultSeccomp     string // "runtime/default" or "" (unconfined) when a container names none
	UnprivilegedPorts  bool
	UnprivilegedICMP   bool
	// DeviceOwnership gives devices to the container's user and group instead
	// of the owners they have on the node.
	DeviceOwnership bool
	// TrustCDIAnnotations takes CDI devices from annotations of containers,
	// which older kubelets use, besides the typed field.
	TrustCDIAnnotations bool
	// CgroupDisabled makes no cgroup and sets no limit.
	CgroupDisabled bool
	// DefaultProcMount masks /proc whatever a container asks for.
	DefaultProcMount bool
	Classes          Classes
}

// Handler is what the pod's runtime handler can do.
type Handler struct {
	Name                                 string
	OCIVersion                           string // newest version string the runtime accepts
	SystemdCgroup                        bool   // cgroupsPath is slice:prefix:name
	RecursiveReadOnly                    bool
	IDMappedMounts                       bool
	PrivilegedWithoutHostDevices         bool
	PrivilegedAllDevices                 bool     // the device cgroup allows all devices all the same
	CgroupWritable                       bool     // cgroup v2 only
	PodAnnotations, ContainerAnnotations []string // globs of annotations passed into the spec
	BaseSpec                             string   // path of a JSON spec to start from, or empty
	// ReadOnlyMounts says when plain read-only mounts of volumes become
	// recursively so: ROEnabled, ROIfPossible, or else never.
	ReadOnlyMounts string
	// Rlimits take the place of those of the base spec and of the daemon.
	Rlimits []specs.POSIXRlimit
}

// Values of Handler.ReadOnlyMounts.
const (
	ROEnabled    = "Enabled"
	ROIfPossible = "IfPossible"
)
