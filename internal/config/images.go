package config

// Images is [plugins."io.containerd.cri.v1.images"].
type Images struct {
	// Snapshotter keeps the layers of handlers that name no other: overlayfs,
	// native, btrfs, erofs, or the name of a proxy plugin.
	Snapshotter string `toml:"snapshotter" since:"1.1"`
	// DisableSnapshotAnnotations keeps the labels away from snapshotters by which
	// those that fetch layers themselves know the image.
	DisableSnapshotAnnotations bool `toml:"disable_snapshot_annotations" since:"1.4"`
	// DiscardUnpackedLayers lets garbage collection take a layer's blob once it
	// is unpacked. Saves disk, costs a new download when another handler wants it.
	DiscardUnpackedLayers bool `toml:"discard_unpacked_layers" since:"1.5"`
	// PinnedImages are never removed by kubelet's image collection. The key
	// "sandbox" names the image that kubelet calls the pause image; no pod needs it.
	PinnedImages map[string]string `toml:"pinned_images" since:"2.0"`
	// RuntimePlatforms chooses platform and snapshotter for a runtime handler.
	RuntimePlatforms map[string]RuntimePlatform `toml:"runtime_platforms" since:"2.0"`
	Registry         Registry                   `toml:"registry" since:"1.1"`
	ImageDecryption  ImageDecryption            `toml:"image_decryption" since:"1.4"`
	// MaxConcurrentDownloads bounds the layers of one image that are fetched at a time.
	MaxConcurrentDownloads int `toml:"max_concurrent_downloads" since:"1.3"`
	// ConcurrentLayerFetchBuffer is the bytes of one layer that are asked for at a
	// time when a layer is fetched with several requests at once; 0 fetches it with one.
	ConcurrentLayerFetchBuffer int `toml:"concurrent_layer_fetch_buffer" since:"2.1"`
	// ImagePullProgressTimeout ends a pull during which no byte arrived for so long; 0 never does.
	ImagePullProgressTimeout Duration `toml:"image_pull_progress_timeout" since:"1.7"`
	// ImagePullWithSyncFS writes the file system through to the disk after each
	// layer, so that a power cut cannot leave empty files.
	ImagePullWithSyncFS bool `toml:"image_pull_with_sync_fs" since:"1.7"`
	// StatsCollectPeriod is the seconds between two measurements of the disk space of snapshots.
	StatsCollectPeriod int `toml:"stats_collect_period" since:"1.1"`
	// UseLocalImagePull chooses between two ways to pull that containerd has; here is one.
	UseLocalImagePull bool `toml:"use_local_image_pull" since:"2.1"`
}

// RuntimePlatform is one table of Images.RuntimePlatforms.
type RuntimePlatform struct {
	// Platform is written os/arch[/variant]; empty is the node's own.
	Platform string `toml:"platform" since:"2.0"`
	// Snapshotter keeps the images of this handler; empty is Images.Snapshotter.
	Snapshotter string `toml:"snapshotter" since:"2.0"`
}

// Registry says how registries are reached.
type Registry struct {
	// ConfigPath lists folders, separated by ":", that hold HOST/hosts.toml.
	ConfigPath string `toml:"config_path" since:"1.5"`
	// Mirrors are the endpoints that are asked in place of a registry, by its
	// host; "*" is for all others. Cannot be set beside ConfigPath. Deprecated:
	// write HOST/hosts.toml.
	Mirrors map[string]Mirror `toml:"mirrors" since:"1.1"`
	// Configs are the credentials and certificates of registries, by host.
	// Deprecated: credentials come from kubelet, certificates from hosts.toml.
	Configs map[string]RegistryConfig `toml:"configs" since:"1.3"`
	// Auths are the credentials of registries, by URL. Deprecated: credentials
	// come from kubelet.
	Auths map[string]RegistryAuth `toml:"auths" since:"1.1"`
	// Headers are sent with every request to any registry.
	Headers map[string][]string `toml:"headers" since:"1.5"`
}

// Mirror is one table of Registry.Mirrors.
type Mirror struct {
	// Endpoints are URLs, asked in their order.
	Endpoints []string `toml:"endpoint" since:"1.1"`
}

// RegistryConfig is one table of Registry.Configs.
type RegistryConfig struct {
	Auth RegistryAuth `toml:"auth" since:"1.3"`
	TLS  RegistryTLS  `toml:"tls" since:"1.3"`
}

// RegistryAuth is what Docker's config.json knows of a registry.
type RegistryAuth struct {
	// Username is the user's name.
	Username string `toml:"username" since:"1.1"`
	// Password is the password.
	Password Secret `toml:"password" since:"1.1"`
	// Auth is name and password in one: "name:password" in base64.
	Auth Secret `toml:"auth" since:"1.1"`
	// IdentityToken is exchanged for a token of the registry.
	IdentityToken Secret `toml:"identitytoken" since:"1.1"`
}

// RegistryTLS is the table tls of a RegistryConfig.
type RegistryTLS struct {
	// InsecureSkipVerify takes any certificate.
	InsecureSkipVerify bool `toml:"insecure_skip_verify" since:"1.3"`
	// CAFile is the certificate of the registry's authority, as PEM.
	CAFile string `toml:"ca_file" since:"1.3"`
	// CertFile is the client's certificate, as PEM.
	CertFile string `toml:"cert_file" since:"1.3"`
	// KeyFile is the client's private key, as PEM.
	KeyFile string `toml:"key_file" since:"1.3"`
}

// ImageDecryption says how encrypted images are decrypted.
type ImageDecryption struct {
	// KeyModel says where keys are: "node" is on this machine, as the stream
	// processors say; "" decrypts nothing.
	KeyModel string `toml:"key_model" since:"1.4"`
}

// StreamProcessor is one table of [stream_processors]: where containerd calls a
// program to decrypt layers, Cloister takes the program's keys and decrypts itself.
type StreamProcessor struct {
	// Accepts are media types of encrypted layers.
	Accepts []string `toml:"accepts" since:"1.3"`
	// Returns is the media type of the decrypted layer.
	Returns string `toml:"returns" since:"1.3"`
	// Path is the program; for ctd-decoder, in any folder, none is started.
	Path string `toml:"path" since:"1.3"`
	// Args are the program's; --decryption-keys-path names the folder of keys.
	Args []string `toml:"args" since:"1.3"`
	// Env are the program's variables; OCICRYPT_KEYPROVIDER_CONFIG names the
	// file with key providers.
	Env []string `toml:"env" since:"1.4"`
}

// ProxyPlugin is one table of [proxy_plugins].
type ProxyPlugin struct {
	// Type is "snapshot" for a snapshotter; the others of containerd's have no use here.
	Type string `toml:"type" since:"1.1"`
	// Address is the plugin's socket.
	Address string `toml:"address" since:"1.1"`
	// Platform is written os/arch[/variant]; empty is the node's own.
	Platform string `toml:"platform" since:"1.6"`
	// Exports are facts for whoever uses the plugin, such as root and
	// enable_remote_snapshot_annotations.
	Exports map[string]string `toml:"exports" since:"1.6"`
	// Capabilities are what the plugin can do, such as "remap-ids".
	Capabilities []string `toml:"capabilities" since:"1.7"`
}
