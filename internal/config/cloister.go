package config

// Cloister is [cloister]: what containerd's file has no word for.
type Cloister struct {
	// Network is "cni", or "builtin" for a bridge that needs no CNI file and no plugin.
	Network        string         `toml:"network"`
	BuiltinNetwork BuiltinNetwork `toml:"builtin_network"`
	// CgroupDriver is "cgroupfs" or "systemd", for all handlers of runc's shim and
	// as what kubelet is told. Empty: as SystemdCgroup of each handler says.
	CgroupDriver string `toml:"cgroup_driver"`
	// DisableCgroup puts no container into a cgroup of its own: nothing is limited.
	DisableCgroup bool `toml:"disable_cgroup"`
	// CDIAnnotations takes CDI devices from annotations of containers too, as old
	// device plugins name them, and not only from the field of the request.
	CDIAnnotations bool `toml:"cdi_annotations"`
	// Handlers are settings of runtime handlers, by name.
	Handlers map[string]HandlerLimits `toml:"handlers"`
	// Credentials are where the daemon finds credentials of its own: for mirrors,
	// and for registries when kubelet sends none.
	Credentials Credentials `toml:"credentials"`
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

// Credentials is the table credentials of Cloister. Secrets stay in the files
// and programs that it names, and are read at each pull.
type Credentials struct {
	// DockerConfigs are files as "docker login" writes them, with their credential
	// helpers, the first that knows the host wins.
	DockerConfigs []string `toml:"docker_configs"`
	// ProviderConfig is kubelet's --image-credential-provider-config: plugins that
	// are asked for mirrors too, which kubelet does not do.
	ProviderConfig string `toml:"provider_config"`
	// ProviderBinDir is kubelet's --image-credential-provider-bin-dir.
	ProviderBinDir string `toml:"provider_bin_dir"`
}
