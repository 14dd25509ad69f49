package config

import (
	"runtime"
	"time"
)

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
			DisableTCPService: true,
			Address:           "127.0.0.1",
			Port:              "0",
			IdleTimeout:       Duration{4 * time.Hour},
		},
		Plugins:  defaultPlugins(),
		Timeouts: containerdTimeouts(),
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
		Snapshotter:                "overlayfs",
		DisableSnapshotAnnotations: true,
		ImageDecryption:            ImageDecryption{KeyModel: "node"},
		StatsCollectPeriod:         10,
		PinnedImages:               map[string]string{"sandbox": "registry.k8s.io/pause:3.10.2"},
		Registry:                   Registry{ConfigPath: "/etc/containerd/certs.d:/etc/docker/certs.d"},
		MaxConcurrentDownloads:     3,
		ImagePullProgressTimeout:   Duration{5 * time.Minute},
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
		SELinuxCategoryRange:             1024,
		MaxContainerLogLineSize:          16 * 1024,
		EnableCRIU:                       true,
		StatsRetentionPeriod:             Duration{2 * time.Minute},
		TolerateMissingHugetlbController: true,
		DisableHugetlbController:         true,
		EnableUnprivilegedPorts:          true,
		EnableUnprivilegedICMP:           true,
		NetNSMountsUnderStateDir:         true,
		EnableCDI:                        true,
		CDISpecDirs:                      []string{"/etc/cdi", "/var/run/cdi"},
		DrainExecSyncIOTimeout:           Duration{10 * time.Second},
		StatsCollectPeriod:               Duration{time.Second},
	}
}

func defaultPlugins() Plugins {
	return Plugins{
		NRI: NRI{
			SocketPath: "/var/run/nri/nri.sock", PluginPath: "/opt/nri/plugins", PluginConfigPath: "/etc/nri/conf.d",
			PluginRegistrationTimeout: Duration{5 * time.Second}, PluginRequestTimeout: Duration{2 * time.Second},
		},
		Transfer:    Transfer{MaxConcurrentDownloads: 3, MaxConcurrentUploadedLayers: 3, MaxConcurrentUnpacks: 1},
		Differs:     Differs{Order: []string{"walking"}},
		Bolt:        Bolt{ContentSharingPolicy: "shared"},
		Collector:   Collector{PauseThreshold: 0.02, MutationThreshold: 100, StartupDelay: Duration{100 * time.Millisecond}},
		Verifier:    Verifier{BinDir: "/opt/containerd/image-verifier/bin", MaxVerifiers: 10, PerVerifierTimeout: Duration{10 * time.Second}},
		TaskManager: TaskManager{Platforms: []string{"linux/" + runtime.GOARCH}},
		Linux:       LinuxRuntime{Shim: "containerd-shim", Runtime: "runc"},
		Opt:         Opt{Path: "/opt/containerd"},
		Restart:     Restart{Interval: Duration{10 * time.Second}},
		Tracing:     Tracing{SamplingRatio: 1, ServiceName: "cloister"},
		GRPC:        GRPCServer{MaxRecvMessageSize: maxMessage, MaxSendMessageSize: maxMessage},
		TTRPC:       SocketServer{Address: "/run/containerd/containerd.sock.ttrpc"},
		TCP:         TCPServer{MaxRecvMessageSize: maxMessage, MaxSendMessageSize: maxMessage},
	}
}

// maxMessage is what kubelet and containerd agree on.
const maxMessage = 16 << 20

// containerdTimeouts are what containerd writes into a file of defaults.
func containerdTimeouts() map[string]Duration {
	const prefix = "io.containerd.timeout."
	return map[string]Duration{
		prefix + "bolt.open":         {},
		prefix + "cri.defercleanup":  {time.Minute},
		prefix + "metrics.shimstats": {2 * time.Second},
		prefix + "shim.cleanup":      {5 * time.Second},
		prefix + "shim.load":         {5 * time.Second},
		prefix + "shim.shutdown":     {3 * time.Second},
		prefix + "task.state":        {2 * time.Second},
	}
}
