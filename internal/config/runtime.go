package config

// Runtime is [plugins."io.containerd.cri.v1.runtime"].
type Runtime struct {
	CNI        CNI        `toml:"cni" since:"1.1"`
	Containerd Containerd `toml:"containerd" since:"1.1"`
	// EnableSELinux labels containers where the kernel has SELinux on.
	EnableSELinux bool `toml:"enable_selinux" since:"1.1"`
	// SELinuxCategoryRange is the number of categories that pods' labels are made
	// of; 0 means 1024.
	SELinuxCategoryRange int `toml:"selinux_category_range" since:"1.4"`
	// MaxContainerLogLineSize splits longer log lines into partial entries; <= 0 never does.
	MaxContainerLogLineSize int `toml:"max_container_log_line_size" since:"1.1"`
	// DisableAppArmor ignores AppArmor even where the kernel has it.
	DisableAppArmor bool `toml:"disable_apparmor" since:"1.2"`
	// RestrictOOMScoreAdj never lowers oom_score_adj of a container below the daemon's own.
	RestrictOOMScoreAdj bool `toml:"restrict_oom_score_adj" since:"1.2"`
	// DisableProcMount treats every container as if it had asked for the default
	// procMount.
	DisableProcMount bool `toml:"disable_proc_mount" since:"1.2"`
	// UnsetSeccompProfile is used when a container names no profile:
	// "" or "unconfined", "runtime/default", or "localhost/" and a path.
	UnsetSeccompProfile string `toml:"unset_seccomp_profile" since:"1.5"`
	// TolerateMissingHugetlbController ignores huge page limits where the
	// cgroup controller is missing, instead of refusing the container.
	TolerateMissingHugetlbController bool `toml:"tolerate_missing_hugetlb_controller" since:"1.4"`
	// DisableHugetlbController ignores huge page limits always.
	DisableHugetlbController bool `toml:"disable_hugetlb_controller" since:"1.5"`
	// DeviceOwnershipFromSecurityContext gives devices to the container's user and group.
	DeviceOwnershipFromSecurityContext bool `toml:"device_ownership_from_security_context" since:"1.6"`
	// IgnoreImageDefinedVolumes makes nothing of an image's VOLUME lines.
	IgnoreImageDefinedVolumes bool `toml:"ignore_image_defined_volumes" since:"1.5"`
	// NetNSMountsUnderStateDir pins network namespaces under the state folder
	// instead of /var/run/netns.
	NetNSMountsUnderStateDir bool `toml:"netns_mounts_under_state_dir" since:"1.5"`
	// EnableUnprivilegedPorts lets any user of a pod with its own network bind ports below 1024.
	EnableUnprivilegedPorts bool `toml:"enable_unprivileged_ports" since:"1.6"`
	// EnableUnprivilegedICMP lets any user of a pod with its own network ping.
	EnableUnprivilegedICMP bool `toml:"enable_unprivileged_icmp" since:"1.6"`
	// EnableCDI resolves CDI device names.
	EnableCDI bool `toml:"enable_cdi" since:"1.7"`
	// CDISpecDirs are the folders with CDI specifications, the later overriding.
	CDISpecDirs []string `toml:"cdi_spec_dirs" since:"1.7"`
	// DrainExecSyncIOTimeout is how long ExecSync waits for the end of output
	// after the command has ended, which a child of it may hold open; 0 waits for as
	// long as the caller does, as containerd does unless told otherwise.
	DrainExecSyncIOTimeout Duration `toml:"drain_exec_sync_io_timeout" since:"1.6"`
	// IgnoreDeprecationWarnings are the keys whose deprecation Status does not
	// tell of, as `cloister config validate` writes them; "*" is all.
	IgnoreDeprecationWarnings []string `toml:"ignore_deprecation_warnings" since:"1.6"`
	// StatsCollectPeriod is the time between two readings of CPU statistics.
	StatsCollectPeriod Duration `toml:"stats_collect_period" since:"2.3"`
	// StatsRetentionPeriod is how long readings of CPU statistics are kept.
	StatsRetentionPeriod Duration `toml:"stats_retention_period" since:"2.3"`
	// EnableCRIU lets kubelet checkpoint containers.
	EnableCRIU bool `toml:"enable_criu" since:"2.4"`
}

// CNI is the table cni of Runtime. It acts when Cloister.Network is "cni".
type CNI struct {
	// BinDirs are the folders with plugin programs, the first hit wins.
	BinDirs []string `toml:"bin_dirs" since:"2.1"`
	// ConfDir is the folder with *.conflist and *.conf files, watched for changes.
	ConfDir string `toml:"conf_dir" since:"1.1"`
	// MaxConfNum is how many of those files make networks of a pod; 0 takes all.
	MaxConfNum int `toml:"max_conf_num" since:"1.3"`
	// SetupSerially attaches several networks one after the other.
	SetupSerially bool `toml:"setup_serially" since:"1.7"`
	// ConfTemplate is a Go template of which a file is made in ConfDir, once
	// kubelet tells the node's pod ranges: .PodCIDR, .PodCIDRRanges, .Routes.
	ConfTemplate string `toml:"conf_template" since:"1.1"`
	// IPPref chooses the pod's primary address: "" or "ipv4", "ipv6", or "cni" for the plugins' order.
	IPPref string `toml:"ip_pref" since:"1.6"`
	// UseInternalLoopback sets lo up without the loopback plugin. It is done so
	// in either case: pods cannot tell.
	UseInternalLoopback bool `toml:"use_internal_loopback" since:"2.0"`
}

// Containerd is the table containerd of Runtime: the runtime handlers.
type Containerd struct {
	// DefaultRuntimeName is the handler of pods that name none. Empty: the first
	// that a probe finds working of "crun", "runc" and the others of Runtimes, and
	// then of those that were found on the machine.
	DefaultRuntimeName string `toml:"default_runtime_name" since:"1.3"`
	// Runtimes are the handlers by name. The OCI runtimes that are found on the
	// machine have handlers besides: runc, crun, and gvisor for runsc.
	Runtimes map[string]Handler `toml:"runtimes" since:"1.2"`
	// IgnoreBlockIONotEnabledErrors runs a container without its blockio class
	// where none are configured, instead of refusing it.
	IgnoreBlockIONotEnabledErrors bool `toml:"ignore_blockio_not_enabled_errors" since:"1.7"`
	// IgnoreRDTNotEnabledErrors runs a container without its RDT class where the
	// machine has none, instead of refusing it.
	IgnoreRDTNotEnabledErrors bool `toml:"ignore_rdt_not_enabled_errors" since:"1.6"`
}

// Handler is one table of Containerd.Runtimes.
type Handler struct {
	// RuntimeType names the shim, such as io.containerd.runc.v2.
	RuntimeType string `toml:"runtime_type" since:"1.1"`
	// RuntimePath is the shim's program; it overrides the search by RuntimeType.
	RuntimePath string `toml:"runtime_path" since:"1.6"`
	// Snapshotter keeps the containers of this handler; empty is Images.Snapshotter.
	Snapshotter string `toml:"snapshotter" since:"1.7"`
	// PodAnnotations are globs of pod annotations that are passed into OCI specs.
	PodAnnotations []string `toml:"pod_annotations" since:"1.3"`
	// ContainerAnnotations are globs of container annotations that are passed into OCI specs.
	ContainerAnnotations []string `toml:"container_annotations" since:"1.3"`
	// PrivilegedWithoutHostDevices keeps the node's devices away from privileged containers.
	PrivilegedWithoutHostDevices bool `toml:"privileged_without_host_devices" since:"1.3"`
	// PrivilegedWithoutHostDevicesAllDevicesAllowed still lets them open any
	// device that they make; needs PrivilegedWithoutHostDevices.
	PrivilegedWithoutHostDevicesAllDevicesAllowed bool `toml:"privileged_without_host_devices_all_devices_allowed" since:"1.7"`
	// CgroupWritable mounts the container's own cgroup v2 writable.
	CgroupWritable bool `toml:"cgroup_writable" since:"2.1"`
	// BaseRuntimeSpec is a JSON file with the OCI spec to start from.
	BaseRuntimeSpec string `toml:"base_runtime_spec" since:"1.5"`
	// CNIConfDir is the folder with the networks of this handler; empty is CNI.ConfDir.
	CNIConfDir string `toml:"cni_conf_dir" since:"1.6"`
	// CNIMaxConfNum is how many of its files make networks; 0 takes all. Acts with CNIConfDir.
	CNIMaxConfNum int `toml:"cni_max_conf_num" since:"1.6"`
	// Sandboxer says who makes the sandbox: "podsandbox" (also "") is the daemon.
	// With "shim" it is the shim through the Sandbox API, as Cloister's own do always.
	Sandboxer string `toml:"sandboxer" since:"2.0"`
	// DisablePauseImagePull keeps the pause image from being fetched; no pod needs it.
	DisablePauseImagePull bool `toml:"disable_pause_image_pull" since:"2.4"`
	// IOType is how an external shim's streams travel; only "fifo" (also "") is there.
	IOType string `toml:"io_type" since:"2.0"`
	// TreatROMountsAsRRO makes read-only mounts of volumes recursively read-only:
	// "Enabled", "IfPossible", "Disabled"; "" is "Disabled".
	TreatROMountsAsRRO string `toml:"treat_ro_mounts_as_rro" since:"2.0"`
	// Options are the shim's own; see the options below.
	Options map[string]any `toml:"options" since:"1.2"`
}

// Streaming is [plugins."io.containerd.grpc.v1.cri"]: the server that exec,
// attach and port-forward are redirected to.
type Streaming struct {
	// DisableTCPService keeps CRI off containerd's TCP socket.
	DisableTCPService bool `toml:"disable_tcp_service" since:"1.3"`
	// Address is what is listened on; empty finds the node's own address.
	Address string `toml:"stream_server_address" since:"1.1"`
	// Port is what is listened on; "0" takes a free one.
	Port string `toml:"stream_server_port" since:"1.1"`
	// IdleTimeout closes a connection on which nothing moved for so long.
	IdleTimeout Duration `toml:"stream_idle_timeout" since:"1.3"`
	// EnableTLS serves HTTPS, with KeyPair or a certificate made at start.
	EnableTLS bool    `toml:"enable_tls_streaming" since:"1.1"`
	KeyPair   KeyPair `toml:"x509_key_pair_streaming" since:"1.3"`
}

// KeyPair names the files of a TLS certificate.
type KeyPair struct {
	// CertFile is the certificate, with its chain, as PEM.
	CertFile string `toml:"tls_cert_file" since:"1.3"`
	// KeyFile is the private key as PEM.
	KeyFile string `toml:"tls_key_file" since:"1.3"`
}
