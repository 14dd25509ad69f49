package config

import "time"

// DefaultPath is the file that Load("") reads when it is there; *.toml of
// conf.d beside it are its drop-ins.
const DefaultPath = "/etc/cloister/config.toml"

// RuncType is the runtime_type that Cloister's resident shim serves with the
// container backend.
const RuncType = "io.containerd.runc.v2"

// Default is the configuration without any file.
func Default() Config {
	const state = "/run/cloister"
	return Config{
		Root:      "/var/lib/cloister",
		State:     state,
		Address:   socketIn(state),
		LogLevel:  "info",
		LogFormat: "text",
		Images:    defaultImages(),
		Runtime:   defaultRuntime(),
		Streaming: Streaming{
			Address:     "127.0.0.1",
			Port:        "0",
			IdleTimeout: Duration{4 * time.Hour},
		},
		Cloister: Cloister{
			Network: "cni",
			BuiltinNetwork: BuiltinNetwork{
				Bridge:  "cloister0",
				Subnets: []string{"10.87.0.0/16", "fd4c:6c73:7472::/64"},
			},
		},
		DevicePlugin: defaultDevicePlugin(),
	}
}

func defaultImages() Images {
	return Images{
		Snapshotter:              "overlayfs",
		PinnedImages:             map[string]string{"sandbox": "registry.k8s.io/pause:3.10.2"},
		Registry:                 Registry{ConfigPath: "/etc/containerd/certs.d:/etc/docker/certs.d"},
		MaxConcurrentDownloads:   3,
		ImagePullProgressTimeout: Duration{5 * time.Minute},
	}
}

func defaultRuntime() Runtime {
	return Runtime{
		CNI: CNI{
			BinDirs:             []string{"/opt/cni/bin"},
			ConfDir:             "/etc/cni/net.d",
			MaxConfNum:          1,
			UseInternalLoopback: true,
		},
		MaxContainerLogLineSize:          16 * 1024,
		TolerateMissingHugetlbController: true,
		DisableHugetlbController:         true,
		EnableUnprivilegedPorts:          true,
		EnableUnprivilegedICMP:           true,
		NetNSMountsUnderStateDir:         true,
		EnableCDI:                        true,
		CDISpecDirs:                      []string{"/etc/cdi", "/var/run/cdi"},
		StatsCollectPeriod:               Duration{time.Second},
	}
}
