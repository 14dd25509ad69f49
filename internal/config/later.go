package config

import "strings"

// laterKeys are keys that containerd's version 3 has and that Cloister does
// not honour yet. They are refused, because ignoring a setting in silence
// would be worse than not having it.
func laterKeys() map[string]string {
	const (
		images  = "plugins.io.containerd.cri.v1.images."
		runtime = "plugins.io.containerd.cri.v1.runtime."
		server  = "plugins.io.containerd.grpc.v1.cri."
	)
	return map[string]string{
		"temp":                                   "temporary files lie under root",
		"oom_score":                              "set OOMScoreAdjust in the service unit",
		"required_plugins":                       "there are no plugins to require",
		"disabled_plugins":                       "there are no plugins to disable",
		"timeouts":                               "time-outs are fixed",
		"cgroup":                                 "set Slice in the service unit",
		"proxy_plugins":                          "remote snapshotters come later",
		"stream_processors":                      "image decryption comes later",
		"ttrpc":                                  "there is no containerd ttrpc socket",
		"metrics":                                "the metrics server comes later",
		"grpc.uid":                               "the socket belongs to root",
		"grpc.gid":                               "the socket belongs to root",
		"grpc.tcp_address":                       "the API is served on the unix socket alone",
		"grpc.tcp_tls_ca":                        "the API is served on the unix socket alone",
		"grpc.tcp_tls_cert":                      "the API is served on the unix socket alone",
		"grpc.tcp_tls_key":                       "the API is served on the unix socket alone",
		"grpc.tcp_tls_common_name":               "the API is served on the unix socket alone",
		"grpc.max_recv_message_size":             "messages of 16 MiB are taken",
		"grpc.max_send_message_size":             "messages of 16 MiB are sent",
		"debug.address":                          "the debug service is on the main socket",
		"debug.uid":                              "the socket belongs to root",
		"debug.gid":                              "the socket belongs to root",
		"debug.log_trace_id":                     "traces come later",
		images + "disable_snapshot_annotations":  "remote snapshotters come later",
		images + "image_decryption":              "image decryption comes later",
		images + "concurrent_layer_fetch_buffer": "a layer is fetched with one request",
		images + "use_local_image_pull":          "there is one way to pull",
		images + "registry.mirrors":              "use hosts.toml under config_path",
		images + "registry.configs":              "use hosts.toml under config_path; credentials come from kubelet",
		images + "registry.auths":                "credentials come from kubelet",
		runtime + "cni.conf_template":            "use the network \"builtin\" of [cloister] where no CNI provider writes a file",
		runtime + "containerd.ignore_blockio_not_enabled_errors":   "blockio classes come later",
		runtime + "containerd.ignore_rdt_not_enabled_errors":       "RDT classes come later",
		runtime + "ignore_deprecation_warnings":                    "there are no deprecation warnings yet",
		runtime + "stats_retention_period":                         "statistics are kept for two minutes",
		runtime + "enable_criu":                                    "checkpoints come later",
		images + "stats_collect_period":                            "sizes of snapshots are measured when they are asked for",
		runtime + "selinux_category_range":                         "pods get categories below 1024",
		runtime + "disable_proc_mount":                             "procMount is always honoured",
		runtime + "containerd.runtimes.*.cni_conf_dir":             "all handlers share one set of networks",
		runtime + "containerd.runtimes.*.cni_max_conf_num":         "all handlers share one set of networks",
		server + "disable_tcp_service":                             "the API is served on the unix socket alone",
		runtime + "containerd.runtimes.*.disable_pause_image_pull": "no pause image is pulled",
	}
}

// laterOptions are options of runc's shim that do not act yet.
func laterOptions() map[string]string {
	return map[string]string{
		"CriuImagePath": "checkpoints come later",
		"CriuWorkPath":  "checkpoints come later",
		"CriuPath":      "checkpoints come later",
		"IoUid":         "pipes belong to the root user of the pod",
		"IoGid":         "pipes belong to the root user of the pod",
		"ShimCgroup":    "shims stay in the daemon's cgroup",
	}
}

// later tells whether containerd knows a path that we refuse, and why.
func later(path []string) (string, bool) {
	match := append([]string(nil), path...)
	if len(match) == 6 && match[0] == "plugins" && match[3] == "runtimes" {
		match[4] = "*"
	}
	if reason, ok := laterKeys()[strings.Join(match, ".")]; ok {
		return reason, true
	}
	if len(path) == 2 && path[0] == "plugins" && strings.HasPrefix(path[1], "io.containerd.") {
		return "that plugin's settings come later", true
	}
	return "", false
}
