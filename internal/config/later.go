package config

import "strings"

// laterKeys are keys that containerd's version 3 has and that Cloister does
// not honour yet. They are refused, because ignoring a setting in silence
// would be worse than not having it.
func laterKeys() map[string]string {
	return map[string]string{
		"temp":                       "temporary files lie under root",
		"oom_score":                  "set OOMScoreAdjust in the service unit",
		"required_plugins":           "there are no plugins to require",
		"disabled_plugins":           "there are no plugins to disable",
		"timeouts":                   "time-outs are fixed",
		"cgroup":                     "set Slice in the service unit",
		"ttrpc":                      "there is no containerd ttrpc socket",
		"metrics":                    "the metrics server comes later",
		"grpc.uid":                   "the socket belongs to root",
		"grpc.gid":                   "the socket belongs to root",
		"grpc.tcp_address":           "the API is served on the unix socket alone",
		"grpc.tcp_tls_ca":            "the API is served on the unix socket alone",
		"grpc.tcp_tls_cert":          "the API is served on the unix socket alone",
		"grpc.tcp_tls_key":           "the API is served on the unix socket alone",
		"grpc.tcp_tls_common_name":   "the API is served on the unix socket alone",
		"grpc.max_recv_message_size": "messages of 16 MiB are taken",
		"grpc.max_send_message_size": "messages of 16 MiB are sent",
		"debug.address":              "the debug service is on the main socket",
		"debug.uid":                  "the socket belongs to root",
		"debug.gid":                  "the socket belongs to root",
		"debug.log_trace_id":         "traces come later",
	}
}

// laterOptions are options of runc's shim that do not act yet.
func laterOptions() map[string]string {
	return map[string]string{}
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
