package config

// The tables of containerd's other plugins. Those of their keys that mean
// nothing here are listed in idle.go, with the reason.

// Plugins are all plugin tables but those of CRI, which are fields of Config.
type Plugins struct {
	NRI         NRI             `toml:"io.containerd.nri.v1.nri"`
	Transfer    Transfer        `toml:"io.containerd.transfer.v1.local"`
	Tasks       Tasks           `toml:"io.containerd.service.v1.tasks-service"`
	Differs     Differs         `toml:"io.containerd.service.v1.diff-service"`
	ErofsDiffer ErofsDiffer     `toml:"io.containerd.differ.v1.erofs"`
	Overlayfs   Overlayfs       `toml:"io.containerd.snapshotter.v1.overlayfs"`
	Native      SnapshotterRoot `toml:"io.containerd.snapshotter.v1.native"`
	Btrfs       SnapshotterRoot `toml:"io.containerd.snapshotter.v1.btrfs"`
	ZFS         SnapshotterRoot `toml:"io.containerd.snapshotter.v1.zfs"`
	AUFS        SnapshotterRoot `toml:"io.containerd.snapshotter.v1.aufs"`
	Erofs       Erofs           `toml:"io.containerd.snapshotter.v1.erofs"`
	Devmapper   Devmapper       `toml:"io.containerd.snapshotter.v1.devmapper"`
	Blockfile   Blockfile       `toml:"io.containerd.snapshotter.v1.blockfile"`
	Bolt        Bolt            `toml:"io.containerd.metadata.v1.bolt"`
	Collector   Collector       `toml:"io.containerd.gc.v1.scheduler"`
	Verifier    Verifier        `toml:"io.containerd.image-verifier.v1.bindir"`
	ShimManager ShimManager     `toml:"io.containerd.shim.v1.manager"`
	TaskManager TaskManager     `toml:"io.containerd.runtime.v2.task"`
	Linux       LinuxRuntime    `toml:"io.containerd.runtime.v1.linux"`
	TaskMonitor TaskMonitor     `toml:"io.containerd.monitor.task.v1.cgroups"`
	Opt         Opt             `toml:"io.containerd.internal.v1.opt"`
	Restart     Restart         `toml:"io.containerd.monitor.container.v1.restart"`
	Tracing     Tracing         `toml:"io.containerd.internal.v1.tracing"`
	OTLP        OTLP            `toml:"io.containerd.tracing.processor.v1.otlp"`
	GRPC        GRPCServer      `toml:"io.containerd.server.v1.grpc"`
	TCP         TCPServer       `toml:"io.containerd.server.v1.grpc-tcp"`
	TTRPC       SocketServer    `toml:"io.containerd.server.v1.ttrpc"`
	Debug       SocketServer    `toml:"io.containerd.server.v1.debug"`
	Metrics     MetricsServer   `toml:"io.containerd.server.v1.metrics"`
	GRPCMetrics GRPCMetrics     `toml:"io.containerd.metrics.v1.grpc-prometheus"`
	ErofsMounts Empty           `toml:"io.containerd.mount-handler.v1.erofs"`
}

// NRI is [plugins."io.containerd.nri.v1.nri"]: plugins that adjust containers.
type NRI struct {
	// Disable turns NRI off.
	Disable bool `toml:"disable" since:"1.7"`
	// SocketPath is where plugins connect.
	SocketPath string `toml:"socket_path" since:"1.7"`
	// PluginPath is the folder of plugins that are started with the daemon.
	PluginPath string `toml:"plugin_path" since:"1.7"`
	// PluginConfigPath is the folder of their configuration.
	PluginConfigPath string `toml:"plugin_config_path" since:"1.7"`
	// PluginRegistrationTimeout bounds the time that a plugin takes to register.
	PluginRegistrationTimeout Duration `toml:"plugin_registration_timeout" since:"1.7"`
	// PluginRequestTimeout bounds the time that a plugin takes to answer.
	PluginRequestTimeout Duration `toml:"plugin_request_timeout" since:"1.7"`
	// DisableConnections takes no plugins but those of PluginPath.
	DisableConnections bool         `toml:"disable_connections" since:"1.7"`
	DefaultValidator   NRIValidator `toml:"default_validator" since:"2.2"`
}

// NRIValidator is the table default_validator of NRI: what plugins may not adjust.
type NRIValidator struct {
	// Enable turns the checks on.
	Enable bool `toml:"enable" since:"2.2"`
	// RejectOCIHookAdjustment refuses OCI hooks.
	RejectOCIHookAdjustment bool `toml:"reject_oci_hook_adjustment" since:"2.2"`
	// RejectRuntimeDefaultSeccompAdjustment refuses changes of the default seccomp profile.
	RejectRuntimeDefaultSeccompAdjustment bool `toml:"reject_runtime_default_seccomp_adjustment" since:"2.2"`
	// RejectUnconfinedSeccompAdjustment refuses a profile for containers that have none.
	RejectUnconfinedSeccompAdjustment bool `toml:"reject_unconfined_seccomp_adjustment" since:"2.2"`
	// RejectCustomSeccompAdjustment refuses changes of a profile of the node's.
	RejectCustomSeccompAdjustment bool `toml:"reject_custom_seccomp_adjustment" since:"2.2"`
	// RejectNamespaceAdjustment refuses changes of namespaces.
	RejectNamespaceAdjustment bool `toml:"reject_namespace_adjustment" since:"2.2"`
	// RejectSysctlAdjustment refuses changes of sysctls.
	RejectSysctlAdjustment bool `toml:"reject_sysctl_adjustment" since:"2.2"`
	// RequiredPlugins are the plugins without which no container is made.
	RequiredPlugins []string `toml:"required_plugins" since:"2.2"`
	// TolerateMissingPluginsAnnotation is the annotation of pods that may do without them.
	TolerateMissingPluginsAnnotation string `toml:"tolerate_missing_plugins_annotation" since:"2.2"`
}

// Transfer is [plugins."io.containerd.transfer.v1.local"]: how images are
// pulled. A key that Images has too overrides it there when it is set.
type Transfer struct {
	// MaxConcurrentDownloads is Images.MaxConcurrentDownloads.
	MaxConcurrentDownloads int `toml:"max_concurrent_downloads" since:"1.7"`
	// ConcurrentLayerFetchBuffer is Images.ConcurrentLayerFetchBuffer.
	ConcurrentLayerFetchBuffer int `toml:"concurrent_layer_fetch_buffer" since:"2.1"`
	// MaxConcurrentUploadedLayers bounds the layers of one image that are pushed at a time.
	MaxConcurrentUploadedLayers int `toml:"max_concurrent_uploaded_layers" since:"1.7"`
	// MaxConcurrentUnpacks bounds the layers of one image that are unpacked at a
	// time, where the snapshotter can do more than one.
	MaxConcurrentUnpacks int `toml:"max_concurrent_unpacks" since:"2.2"`
	// CheckPlatformSupported refuses platforms that no snapshotter is configured for.
	CheckPlatformSupported bool `toml:"check_platform_supported" since:"2.1"`
	// ConfigPath is Registry.ConfigPath.
	ConfigPath string `toml:"config_path" since:"1.7"`
	// UnpackConfig are the platforms that are unpacked.
	UnpackConfig []UnpackConfig `toml:"unpack_config" since:"1.7"`
}

// UnpackConfig is one of Transfer.UnpackConfig.
type UnpackConfig struct {
	// Platform is written os/arch[/variant].
	Platform string `toml:"platform" since:"1.7"`
	// Snapshotter is where it is unpacked.
	Snapshotter string `toml:"snapshotter" since:"1.7"`
	// Differ is how it is unpacked.
	Differ string `toml:"differ" since:"1.7"`
	// ConfigType is the media type of the images' configurations.
	ConfigType string `toml:"config_type" since:"2.1"`
	// LayerTypes are media types of layers.
	LayerTypes []string `toml:"layer_types" since:"2.1"`
	// Optional makes nothing of a snapshotter that is not there.
	Optional bool `toml:"optional" since:"2.3"`
}

// Tasks is [plugins."io.containerd.service.v1.tasks-service"].
type Tasks struct {
	// BlockIOConfigFile is the YAML file that defines blockio classes.
	BlockIOConfigFile string `toml:"blockio_config_file" since:"1.7"`
	// RDTConfigFile is the YAML file that defines RDT classes.
	RDTConfigFile string `toml:"rdt_config_file" since:"1.6"`
}

// Differs is [plugins."io.containerd.service.v1.diff-service"]: how layers are unpacked.
type Differs struct {
	// Order are the ways to unpack a layer, the first that can wins.
	Order []string `toml:"default" since:"1.1"`
	// SyncFS writes the file system through to the disk after each layer.
	SyncFS bool `toml:"sync_fs" since:"1.7"`
}

// ErofsDiffer is [plugins."io.containerd.differ.v1.erofs"].
type ErofsDiffer struct {
	// MkfsOptions are further arguments of mkfs.erofs.
	MkfsOptions []string `toml:"mkfs_options" since:"2.1"`
	// EnableTarIndex keeps layers as they are, with an index.
	EnableTarIndex bool `toml:"enable_tar_index" since:"2.2"`
	// EnableDmverity makes hash trees of layers.
	EnableDmverity bool `toml:"enable_dmverity" since:"2.3"`
}

// Overlayfs is [plugins."io.containerd.snapshotter.v1.overlayfs"].
type Overlayfs struct {
	// RootPath is the snapshotter's folder; empty is one below root.
	RootPath string `toml:"root_path" since:"1.1"`
	// UpperdirLabel notes the upper folder in a label of the snapshot.
	UpperdirLabel bool `toml:"upperdir_label" since:"1.6"`
	// SyncRemove removes the folders of a snapshot at once instead of later.
	SyncRemove bool `toml:"sync_remove" since:"1.6"`
	// SlowChown changes owners file by file where the kernel cannot map ids.
	SlowChown bool `toml:"slow_chown" since:"2.0"`
	// MountOptions are further options of overlay mounts.
	MountOptions []string `toml:"mount_options" since:"1.6"`
}

// SnapshotterRoot is the table of a snapshotter that has a folder and nothing
// else: native, btrfs, zfs, aufs.
type SnapshotterRoot struct {
	// RootPath is the snapshotter's folder; empty is one below root.
	RootPath string `toml:"root_path" since:"1.1"`
}

// Erofs is [plugins."io.containerd.snapshotter.v1.erofs"].
type Erofs struct {
	// RootPath is the snapshotter's folder; empty is one below root.
	RootPath string `toml:"root_path" since:"2.1"`
	// OvlMountOptions are further options of the overlay mounts above it.
	OvlMountOptions []string `toml:"ovl_mount_options" since:"2.1"`
	// EnableFsverity protects layer files by fs-verity.
	EnableFsverity bool `toml:"enable_fsverity" since:"2.1"`
	// SetImmutable marks layer files immutable.
	SetImmutable bool `toml:"set_immutable" since:"2.1"`
	// DefaultSize is the size of a container's writable disk, such as "10GiB";
	// empty or "0" is a folder.
	DefaultSize string `toml:"default_size" since:"2.2"`
	// DmverityMode says whether layers need hash trees: "auto", "on", "off".
	DmverityMode string `toml:"dmverity_mode" since:"2.3"`
	// LayerContentCaches are folders with layers that were made elsewhere.
	LayerContentCaches []string `toml:"layer_content_caches" since:"2.4"`
}

// Devmapper is [plugins."io.containerd.snapshotter.v1.devmapper"].
type Devmapper struct {
	// RootPath is the snapshotter's folder.
	RootPath string `toml:"root_path" since:"1.3"`
	// PoolName is the thin pool.
	PoolName string `toml:"pool_name" since:"1.3"`
	// BaseImageSize is the size of a container's disk.
	BaseImageSize string `toml:"base_image_size" since:"1.3"`
	// AsyncRemove removes devices later.
	AsyncRemove bool `toml:"async_remove" since:"1.3"`
	// DiscardBlocks gives the blocks of a removed device back.
	DiscardBlocks bool `toml:"discard_blocks" since:"1.6"`
	// FSType is the file system of disks.
	FSType string `toml:"fs_type" since:"1.6"`
	// FSOptions are arguments of mkfs.
	FSOptions string `toml:"fs_options" since:"1.6"`
}

// Blockfile is [plugins."io.containerd.snapshotter.v1.blockfile"].
type Blockfile struct {
	// RootPath is the snapshotter's folder.
	RootPath string `toml:"root_path" since:"1.7"`
	// ScratchFile is the empty disk that new ones are copied from.
	ScratchFile string `toml:"scratch_file" since:"1.7"`
	// FSType is its file system.
	FSType string `toml:"fs_type" since:"1.7"`
	// MountOptions are options of its mounts.
	MountOptions []string `toml:"mount_options" since:"1.7"`
	// RecreateScratch copies the scratch file anew at each start.
	RecreateScratch bool `toml:"recreate_scratch" since:"2.0"`
}

// Bolt is [plugins."io.containerd.metadata.v1.bolt"].
type Bolt struct {
	// ContentSharingPolicy is "shared" or "isolated" between containerd's namespaces.
	ContentSharingPolicy string `toml:"content_sharing_policy" since:"1.3"`
	// NoSync leaves it to the kernel when the database is written to the disk.
	NoSync bool `toml:"no_sync" since:"2.1"`
}

// Collector is [plugins."io.containerd.gc.v1.scheduler"]: garbage collection of images.
type Collector struct {
	// PauseThreshold is the share of time that collection may take.
	PauseThreshold float64 `toml:"pause_threshold" since:"1.1"`
	// DeletionThreshold starts a collection after so many deletions.
	DeletionThreshold int `toml:"deletion_threshold" since:"1.1"`
	// MutationThreshold starts a collection after so many changes.
	MutationThreshold int `toml:"mutation_threshold" since:"1.1"`
	// ScheduleDelay is waited for before a collection.
	ScheduleDelay Duration `toml:"schedule_delay" since:"1.1"`
	// StartupDelay is waited for before the first one.
	StartupDelay Duration `toml:"startup_delay" since:"1.1"`
}

// Verifier is [plugins."io.containerd.image-verifier.v1.bindir"]: programs that
// judge images before they are pulled.
type Verifier struct {
	// BinDir is the folder of the programs.
	BinDir string `toml:"bin_dir" since:"2.0"`
	// MaxVerifiers bounds their number; -1 takes all.
	MaxVerifiers int `toml:"max_verifiers" since:"2.0"`
	// PerVerifierTimeout bounds the time of each.
	PerVerifierTimeout Duration `toml:"per_verifier_timeout" since:"2.0"`
}

// ShimManager is [plugins."io.containerd.shim.v1.manager"].
type ShimManager struct {
	// Env are further variables of external shims, NAME=VALUE.
	Env []string `toml:"env" since:"2.0"`
	// SocketDir is where external shims make their sockets; empty is below state.
	SocketDir string `toml:"socket_dir" since:"2.3"`
}

// TaskManager is [plugins."io.containerd.runtime.v2.task"].
type TaskManager struct {
	// Platforms are those that containers may have.
	Platforms []string `toml:"platforms" since:"1.1"`
	// SchedCore gives each shim a core-scheduling domain.
	SchedCore bool `toml:"sched_core" since:"1.6"`
}

// LinuxRuntime is [plugins."io.containerd.runtime.v1.linux"]: the shim of
// containerd 1.0, which is gone.
type LinuxRuntime struct {
	// Shim is the shim's program.
	Shim string `toml:"shim" since:"1.0"`
	// Runtime is the OCI runtime.
	Runtime string `toml:"runtime" since:"1.0"`
	// RuntimeRoot is its state folder.
	RuntimeRoot string `toml:"runtime_root" since:"1.1"`
	// NoShim runs containers without a shim.
	NoShim bool `toml:"no_shim" since:"1.0"`
	// ShimDebug lets the shim log.
	ShimDebug bool `toml:"shim_debug" since:"1.0"`
}

// TaskMonitor is [plugins."io.containerd.monitor.task.v1.cgroups"].
type TaskMonitor struct {
	// NoPrometheus leaves containers out of the metrics.
	NoPrometheus bool `toml:"no_prometheus" since:"1.0"`
}

// Opt is [plugins."io.containerd.internal.v1.opt"].
type Opt struct {
	// Path is where containerd installs programs out of images.
	Path string `toml:"path" since:"1.1"`
}

// Restart is [plugins."io.containerd.monitor.container.v1.restart"].
type Restart struct {
	// Interval is how often containers with a restart label are looked at.
	Interval Duration `toml:"interval" since:"1.0"`
}

// Tracing is [plugins."io.containerd.internal.v1.tracing"].
type Tracing struct {
	// SamplingRatio is the share of requests that are traced.
	SamplingRatio float64 `toml:"sampling_ratio" since:"1.6"`
	// ServiceName is the daemon's name in traces.
	ServiceName string `toml:"service_name" since:"1.6"`
}

// OTLP is [plugins."io.containerd.tracing.processor.v1.otlp"].
type OTLP struct {
	// Endpoint is the URL that traces are sent to.
	Endpoint string `toml:"endpoint" since:"1.6"`
	// Protocol is "grpc" or "http/protobuf".
	Protocol string `toml:"protocol" since:"1.6"`
	// Insecure sends them without TLS.
	Insecure bool `toml:"insecure" since:"1.6"`
}

// GRPCServer is [plugins."io.containerd.server.v1.grpc"]: the CRI socket.
type GRPCServer struct {
	// Address is the path of the CRI socket. It is in the state folder unless it is set.
	Address string `toml:"address" since:"1.0"`
	// UID owns the socket. Whoever can use it has all rights on the machine.
	UID int `toml:"uid" since:"1.0"`
	// GID is the group that may use the socket; 0 is none but root's.
	GID int `toml:"gid" since:"1.0"`
	// MaxRecvMessageSize bounds requests, in bytes.
	MaxRecvMessageSize int `toml:"max_recv_message_size" since:"1.1"`
	// MaxSendMessageSize bounds answers, in bytes.
	MaxSendMessageSize int `toml:"max_send_message_size" since:"1.1"`
}

// TCPServer is [plugins."io.containerd.server.v1.grpc-tcp"].
type TCPServer struct {
	// Address is listened on.
	Address string `toml:"address" since:"1.3"`
	// TLSCA is the authority of clients' certificates.
	TLSCA string `toml:"tls_ca" since:"1.5"`
	// TLSCert is the server's certificate.
	TLSCert string `toml:"tls_cert" since:"1.3"`
	// TLSKey is its key.
	TLSKey string `toml:"tls_key" since:"1.3"`
	// TLSCommonName is what clients' certificates have to name.
	TLSCommonName string `toml:"tls_common_name" since:"2.0"`
	// MaxRecvMessageSize bounds requests, in bytes.
	MaxRecvMessageSize int `toml:"max_recv_message_size" since:"1.3"`
	// MaxSendMessageSize bounds answers, in bytes.
	MaxSendMessageSize int `toml:"max_send_message_size" since:"1.3"`
}

// SocketServer is the table of a further socket: ttrpc and debug.
type SocketServer struct {
	// Address is the path of the socket.
	Address string `toml:"address" since:"1.0"`
	// UID owns the socket.
	UID int `toml:"uid" since:"1.0"`
	// GID owns the socket.
	GID int `toml:"gid" since:"1.0"`
}

// MetricsServer is [plugins."io.containerd.server.v1.metrics"].
type MetricsServer struct {
	// Address is where Prometheus' metrics are served, HOST:PORT; empty serves none.
	Address string `toml:"address" since:"1.0"`
}

// GRPCMetrics is [plugins."io.containerd.metrics.v1.grpc-prometheus"].
type GRPCMetrics struct {
	// GRPCHistogram measures the time of every call.
	GRPCHistogram bool `toml:"grpc_histogram" since:"1.2"`
}

// Empty is the table of a plugin that has no keys.
type Empty struct{}
