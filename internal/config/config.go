// Package config reads Cloister's configuration: containerd's version 3 file
// with a table of our own beside it. It promises that every key is either
// honoured or refused with file, line and remedy, and that a file which is
// absent means the defaults.
//
// It does nothing with what it read: the structs are handed down as they are,
// and only this package and cmd know that TOML was involved.
package config

import (
	"path/filepath"
	"strings"
	"time"
)

// Config is the effective configuration: defaults, then the main file, then
// its drop-ins in order, the later value winning.
type Config struct {
	// Root holds what outlives a reboot: content, snapshots, databases.
	Root string
	// State holds what a reboot may take: sockets, bundles, pinned namespaces.
	State string
	// Address is the path of the CRI socket.
	Address string
	// LogLevel is one of debug, info, warn, error.
	LogLevel string
	// LogFormat is text or json.
	LogFormat string

	Images    Images
	Runtime   Runtime
	Streaming Streaming
	Cloister  Cloister
	// DevicePlugin is [device_plugin].
	DevicePlugin DevicePlugin

	// Files are the files that were read, in order; empty when none was there.
	Files []string
	// Ephemeral comes from the command line: a clean stop also ends the resident
	// shims in which nothing runs.
	Ephemeral bool
}

// SetState moves the state folder, and with it the socket when the socket lay
// at its default place in the old one.
func (c *Config) SetState(dir string) {
	if c.Address == socketIn(c.State) {
		c.Address = socketIn(dir)
	}
	c.State = dir
}

// SetAddress moves the socket; unix:///PATH is taken too.
func (c *Config) SetAddress(address string) { c.Address = strings.TrimPrefix(address, "unix://") }

func socketIn(state string) string { return filepath.Join(state, "cloister.sock") }

// Duration is a time.Duration that is written "5m0s" in the file.
type Duration struct{ time.Duration }

// UnmarshalText reads the form of time.ParseDuration; "" is zero.
func (d *Duration) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		d.Duration = 0
		return nil
	}
	v, err := time.ParseDuration(string(b))
	d.Duration = v
	return err
}

// MarshalText writes the form of time.Duration.String.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// Images is [plugins."io.containerd.cri.v1.images"].
type Images struct {
	// Snapshotter keeps the layers of handlers that name no other.
	Snapshotter string `toml:"snapshotter"`
	// DiscardUnpackedLayers lets garbage collection take a layer's blob once it
	// is unpacked. Saves disk, costs a new download when another handler wants it.
	DiscardUnpackedLayers bool `toml:"discard_unpacked_layers"`
	// PinnedImages are never removed by kubelet's image collection. The key
	// "sandbox" names the image that kubelet calls the pause image; no pod needs it.
	PinnedImages map[string]string `toml:"pinned_images"`
	// RuntimePlatforms chooses platform and snapshotter for a runtime handler.
	RuntimePlatforms map[string]RuntimePlatform `toml:"runtime_platforms"`
	Registry         Registry                   `toml:"registry"`
	// MaxConcurrentDownloads bounds the layers of one image that are fetched at a time.
	MaxConcurrentDownloads int `toml:"max_concurrent_downloads"`
	// ImagePullProgressTimeout ends a pull during which no byte arrived for so long; 0 never does.
	ImagePullProgressTimeout Duration `toml:"image_pull_progress_timeout"`
}

// RuntimePlatform is one table of Images.RuntimePlatforms.
type RuntimePlatform struct {
	// Platform is written os/arch[/variant]; empty is the node's own.
	Platform string `toml:"platform"`
	// Snapshotter keeps the images of this handler; empty is Images.Snapshotter.
	Snapshotter string `toml:"snapshotter"`
}

// Registry says how registries are reached.
type Registry struct {
	// ConfigPath lists folders, separated by ":", that hold HOST/hosts.toml.
	ConfigPath string `toml:"config_path"`
	// Headers are sent with every request to any registry.
	Headers map[string][]string `toml:"headers"`
}

// Runtime is [plugins."io.containerd.cri.v1.runtime"].
type Runtime struct {
	CNI        CNI        `toml:"cni"`
	Containerd Containerd `toml:"containerd"`
	// EnableSELinux labels containers where the kernel has SELinux on.
	EnableSELinux bool `toml:"enable_selinux"`
	// MaxContainerLogLineSize splits longer log lines into partial entries; <= 0 never does.
	MaxContainerLogLineSize int `toml:"max_container_log_line_size"`
	// DisableAppArmor ignores AppArmor even where the kernel has it.
	DisableAppArmor bool `toml:"disable_apparmor"`
	// RestrictOOMScoreAdj never lowers oom_score_adj of a container below the daemon's own.
	RestrictOOMScoreAdj bool `toml:"restrict_oom_score_adj"`
	// UnsetSeccompProfile is used when a container names no profile:
	// "" or "unconfined", "runtime/default", or "localhost/" and a path.
	UnsetSeccompProfile string `toml:"unset_seccomp_profile"`
	// TolerateMissingHugetlbController ignores huge page limits where the
	// cgroup controller is missing, instead of refusing the container.
	TolerateMissingHugetlbController bool `toml:"tolerate_missing_hugetlb_controller"`
	// DisableHugetlbController ignores huge page limits always.
	DisableHugetlbController bool `toml:"disable_hugetlb_controller"`
	// DeviceOwnershipFromSecurityContext gives devices to the container's user and group.
	DeviceOwnershipFromSecurityContext bool `toml:"device_ownership_from_security_context"`
	// IgnoreImageDefinedVolumes makes nothing of an image's VOLUME lines.
	IgnoreImageDefinedVolumes bool `toml:"ignore_image_defined_volumes"`
	// NetNSMountsUnderStateDir pins network namespaces under the state folder; it
	// can only be true.
	NetNSMountsUnderStateDir bool `toml:"netns_mounts_under_state_dir"`
	// EnableUnprivilegedPorts lets any user of a pod with its own network bind ports below 1024.
	EnableUnprivilegedPorts bool `toml:"enable_unprivileged_ports"`
	// EnableUnprivilegedICMP lets any user of a pod with its own network ping.
	EnableUnprivilegedICMP bool `toml:"enable_unprivileged_icmp"`
	// EnableCDI resolves CDI device names.
	EnableCDI bool `toml:"enable_cdi"`
	// CDISpecDirs are the folders with CDI specifications, the later overriding.
	CDISpecDirs []string `toml:"cdi_spec_dirs"`
	// DrainExecSyncIOTimeout is how long ExecSync waits for the end of output
	// after the command has ended, which a child of it may hold open; 0 waits 10s.
	DrainExecSyncIOTimeout Duration `toml:"drain_exec_sync_io_timeout"`
	// StatsCollectPeriod is the time between two readings of CPU statistics.
	StatsCollectPeriod Duration `toml:"stats_collect_period"`
}

// CNI is the table cni of Runtime. It acts when Cloister.Network is "cni".
type CNI struct {
	// BinDirs are the folders with plugin programs, the first hit wins.
	BinDirs []string `toml:"bin_dirs"`
	// BinDir is the older form with one folder in place of BinDirs.
	BinDir string `toml:"bin_dir"`
	// ConfDir is the folder with *.conflist and *.conf files, watched for changes.
	ConfDir string `toml:"conf_dir"`
	// MaxConfNum is how many of those files make networks of a pod; 0 takes all.
	MaxConfNum int `toml:"max_conf_num"`
	// SetupSerially attaches several networks one after the other.
	SetupSerially bool `toml:"setup_serially"`
	// IPPref chooses the pod's primary address: "" or "ipv4", "ipv6", or "cni" for the plugins' order.
	IPPref string `toml:"ip_pref"`
	// UseInternalLoopback sets lo up without the loopback plugin; it can only be true.
	UseInternalLoopback bool `toml:"use_internal_loopback"`
}

// Containerd is the table containerd of Runtime: the runtime handlers.
type Containerd struct {
	// DefaultRuntimeName is the handler of pods that name none. Empty: the
	// best of "crun" and "runc" that a probe finds working.
	DefaultRuntimeName string `toml:"default_runtime_name"`
	// Runtimes are the handlers by name. Empty means that every OCI runtime
	// found on the machine gets one: runc, crun, and gvisor for runsc.
	Runtimes map[string]Handler `toml:"runtimes"`
}

// Handler is one table of Containerd.Runtimes.
type Handler struct {
	// RuntimeType names the shim, such as io.containerd.runc.v2.
	RuntimeType string `toml:"runtime_type"`
	// RuntimePath is the shim's program; it overrides the search by RuntimeType.
	RuntimePath string `toml:"runtime_path"`
	// Snapshotter keeps the containers of this handler; empty is Images.Snapshotter.
	Snapshotter string `toml:"snapshotter"`
	// PodAnnotations are globs of pod annotations that are passed into OCI specs.
	PodAnnotations []string `toml:"pod_annotations"`
	// ContainerAnnotations are globs of container annotations that are passed into OCI specs.
	ContainerAnnotations []string `toml:"container_annotations"`
	// PrivilegedWithoutHostDevices keeps the node's devices away from privileged containers.
	PrivilegedWithoutHostDevices bool `toml:"privileged_without_host_devices"`
	// PrivilegedWithoutHostDevicesAllDevicesAllowed still lets them open any
	// device that they make; needs PrivilegedWithoutHostDevices.
	PrivilegedWithoutHostDevicesAllDevicesAllowed bool `toml:"privileged_without_host_devices_all_devices_allowed"`
	// CgroupWritable mounts the container's own cgroup v2 writable.
	CgroupWritable bool `toml:"cgroup_writable"`
	// BaseRuntimeSpec is a JSON file with the OCI spec to start from.
	BaseRuntimeSpec string `toml:"base_runtime_spec"`
	// Sandboxer says who makes the sandbox: "podsandbox" (also "") is the daemon.
	// With "shim" it is the shim through the Sandbox API, as Cloister's own do always.
	Sandboxer string `toml:"sandboxer"`
	// IOType is how an external shim's streams travel; only "fifo" (also "") is there.
	IOType string `toml:"io_type"`
	// Options are the shim's own, as they were written. For runc's shim: BinaryName,
	// Root, SystemdCgroup, NoNewKeyring. For any other: TypeUrl, ConfigPath, ConfigBody.
	Options map[string]any `toml:"options"`
}

// Streaming is [plugins."io.containerd.grpc.v1.cri"]: the server that exec,
// attach and port-forward are redirected to.
type Streaming struct {
	// Address is what is listened on; empty finds the node's own address.
	Address string `toml:"stream_server_address"`
	// Port is what is listened on; "0" takes a free one.
	Port string `toml:"stream_server_port"`
	// IdleTimeout closes a connection on which nothing moved for so long.
	IdleTimeout Duration `toml:"stream_idle_timeout"`
	// EnableTLS serves HTTPS, with KeyPair or a certificate made at start.
	EnableTLS bool    `toml:"enable_tls_streaming"`
	KeyPair   KeyPair `toml:"x509_key_pair_streaming"`
}

// KeyPair names the files of a TLS certificate.
type KeyPair struct {
	// CertFile is the certificate, with its chain, as PEM.
	CertFile string `toml:"tls_cert_file"`
	// KeyFile is the private key as PEM.
	KeyFile string `toml:"tls_key_file"`
}

// Cloister is [cloister]: what containerd's file has no word for.
type Cloister struct {
	// Network is "cni", or "builtin" for a bridge that needs no CNI file and no plugin.
	Network        string         `toml:"network"`
	BuiltinNetwork BuiltinNetwork `toml:"builtin_network"`
	// CgroupDriver is "cgroupfs" or "systemd", for all handlers of runc's shim and
	// as what kubelet is told. Empty: as SystemdCgroup of each handler says.
	CgroupDriver string `toml:"cgroup_driver"`
	// Shim is the path of cloister-shim. Empty: beside the daemon's own program, then PATH.
	Shim string `toml:"shim"`
}

// BuiltinNetwork is the table builtin_network of Cloister.
type BuiltinNetwork struct {
	// Bridge is the name of the interface on the node.
	Bridge string `toml:"bridge"`
	// Subnets are the pods' ranges, at most one of each address family, the
	// first being primary.
	Subnets []string `toml:"subnets"`
	// MTU of the pods' interfaces; 0 takes that of the node's default route.
	MTU int `toml:"mtu"`
}
