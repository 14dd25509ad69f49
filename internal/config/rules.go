package config

import (
	"fmt"
	"reflect"
	"sync"
)

// newestVersion is the form that all files are brought into.
const newestVersion = 4

// The tables of CRI: one up to version 2, three since.
const (
	imagesPlugin  = "io.containerd.cri.v1.images"
	runtimePlugin = "io.containerd.cri.v1.runtime"
	criPlugin     = "io.containerd.grpc.v1.cri"
)

func plugin(id string, rest ...string) keyPath { return keyPath{"plugins", id}.and(rest...) }

// rule says what became of a key, and of all below it when it is a table.
type rule struct {
	upto int     // the last version of files with this key
	from keyPath // "*" is any one part
	to   keyPath // nil: nothing is left of it
	// turn makes the new value of the old one.
	turn func(any) any
	// why is for keys that were dropped: what replaces them. Without it the key
	// has moved and nobody needs to know.
	why string
}

func asList(v any) any { return []any{v} }

// inHandlerOptions is what became of the keys of the shims before runc.v2.
const inHandlerOptions = "set BinaryName and Root in the options of a handler of runtime_type io.containerd.runc.v2"

// rules are tried in their order, the first that fits is taken. They never
// change, and are made once.
var rules = sync.OnceValue(allRules)

func allRules() []rule {
	var (
		images  = plugin(imagesPlugin)
		runtime = plugin(runtimePlugin)
		cri     = plugin(criPlugin)
		handler = runtime.and("containerd", "runtimes")
	)
	all := []rule{
		{upto: 2, from: cri.and("sandbox_image"), to: images.and("pinned_images", "sandbox")},
		{upto: 2, from: cri.and("containerd", "snapshotter"), to: images.and("snapshotter")},
		{upto: 2, from: cri.and("containerd", "disable_snapshot_annotations"), to: images.and("disable_snapshot_annotations")},
		{upto: 2, from: cri.and("containerd", "discard_unpacked_layers"), to: images.and("discard_unpacked_layers")},
		{upto: 2, from: cri.and("containerd", "runtimes", "*", "sandbox_mode"), to: handler.and("*", "sandboxer")},
		{upto: 2, from: cri.and("containerd", "default_runtime"), to: handler.and("default"),
			why: "define the handler in runtimes and name it in default_runtime_name"},
		{upto: 2, from: cri.and("containerd", "untrusted_workload_runtime"), to: handler.and("untrusted"),
			why: `define the handler "untrusted" in runtimes, or let pods choose one with a RuntimeClass`},
		{upto: 2, from: cri.and("containerd", "no_pivot"), to: keyPath{noPivotKey},
			why: "set NoPivotRoot in the options of a handler"},
		{upto: 2, from: cri.and("systemd_cgroup"), to: keyPath{systemdKey},
			why: "set SystemdCgroup in the options of each handler, or cgroup_driver in [cloister]"},
		{upto: 2, from: cri.and("disable_cgroup"), to: keyPath{"cloister", "disable_cgroup"},
			why: "set disable_cgroup in [cloister]"},
		{upto: 2, from: cri.and("cni"), to: runtime.and("cni")},
	}
	for _, key := range []string{"registry", "image_decryption", "max_concurrent_downloads",
		"image_pull_progress_timeout", "image_pull_with_sync_fs", "stats_collect_period"} {
		all = append(all, rule{upto: 2, from: cri.and(key), to: images.and(key)})
	}
	for _, f := range fields(reflect.TypeFor[Streaming]()) {
		key := f.Tag.Get("toml")
		all = append(all, rule{upto: 2, from: cri.and(key), to: cri.and(key)})
	}
	all = append(all, rule{upto: 2, from: cri.and("*"), to: runtime.and("*")})
	all = append(all, serverRules()...)
	return append(all, anyVersionRules()...)
}

// Keys that exist only between a file and its migration, see handlers.go.
const (
	noPivotKey = "(no_pivot)"
	systemdKey = "(systemd_cgroup)"
	engineKey  = "(runtime_engine)"
	stateKey   = "(runtime_root)"
)

// serverRules are for what version 4 made plugins of.
func serverRules() []rule {
	move := func(table, key, id, to string) rule {
		return rule{upto: 3, from: keyPath{table, key}, to: plugin("io.containerd."+id, to)}
	}
	var all []rule
	for _, key := range []string{"address", "uid", "gid", "max_recv_message_size", "max_send_message_size"} {
		all = append(all, move("grpc", key, "server.v1.grpc", key))
	}
	for _, key := range []string{"tls_ca", "tls_cert", "tls_key", "tls_common_name", "address"} {
		all = append(all, move("grpc", "tcp_"+key, "server.v1.grpc-tcp", key))
	}
	for _, key := range []string{"address", "uid", "gid"} {
		all = append(all, move("ttrpc", key, "server.v1.ttrpc", key), move("debug", key, "server.v1.debug", key))
	}
	return append(all,
		move("metrics", "address", "server.v1.metrics", "address"),
		move("metrics", "grpc_histogram", "metrics.v1.grpc-prometheus", "grpc_histogram"),
		rule{upto: 3, from: keyPath{"grpc"}, to: plugin("io.containerd.server.v1.grpc")},
		rule{upto: 3, from: keyPath{"ttrpc"}, to: plugin("io.containerd.server.v1.ttrpc")},
		rule{upto: 3, from: keyPath{"metrics"}, to: plugin("io.containerd.server.v1.metrics")},
		rule{upto: 2, from: plugin("io.containerd.runtime.v2.shim"), to: plugin("io.containerd.shim.v1.manager")},
		rule{upto: 2, from: plugin("io.containerd.monitor.v1.cgroups"), to: plugin("io.containerd.monitor.task.v1.cgroups")},
		rule{upto: 2, from: plugin("io.containerd.internal.v1.restart"), to: plugin("io.containerd.monitor.container.v1.restart")},
		rule{upto: 2, from: keyPath{"plugin_dir"}, why: "Cloister loads no plugins into itself"},
	)
}

// anyVersionRules are for keys that were dropped and that users still have in
// files of any version.
func anyVersionRules() []rule {
	var (
		handler  = plugin(runtimePlugin, "containerd", "runtimes", "*")
		registry = plugin(imagesPlugin, "registry")
	)
	why := func(key, text string) rule {
		return rule{upto: newestVersion, from: registry.and(key), to: registry.and(key), why: text}
	}
	return []rule{
		{upto: 2, from: plugin(runtimePlugin, "cni", "bin_dir"), to: plugin(runtimePlugin, "cni", "bin_dirs"), turn: asList},
		{upto: newestVersion, from: plugin(runtimePlugin, "cni", "bin_dir"), to: plugin(runtimePlugin, "cni", "bin_dirs"), turn: asList,
			why: "set bin_dirs, a list"},
		{upto: newestVersion, from: handler.and("runtime_engine"), to: handler.and(engineKey), why: inHandlerOptions},
		{upto: newestVersion, from: handler.and("runtime_root"), to: handler.and(stateKey), why: inHandlerOptions},
		{upto: newestVersion, from: handler.and("options", "CriuPath"), why: "put criu into PATH, where the OCI runtime finds it"},
		why("mirrors", "write HOST/hosts.toml below config_path"),
		why("configs", "write certificates into HOST/hosts.toml below config_path, and let kubelet give the credentials"),
		why("auths", "let kubelet give the credentials (imagePullSecrets, or a credential provider)"),
	}
}

// shortPlugins are the names that version 1 had for plugins.
func shortPlugins() map[string]string {
	return map[string]string{
		"cri":          criPlugin,
		"cgroups":      "io.containerd.monitor.task.v1.cgroups",
		"linux":        "io.containerd.runtime.v1.linux",
		"scheduler":    "io.containerd.gc.v1.scheduler",
		"bolt":         "io.containerd.metadata.v1.bolt",
		"task":         "io.containerd.runtime.v2.task",
		"opt":          "io.containerd.internal.v1.opt",
		"restart":      "io.containerd.monitor.container.v1.restart",
		"tracing":      "io.containerd.internal.v1.tracing",
		"otlp":         "io.containerd.tracing.processor.v1.otlp",
		"diff-service": "io.containerd.service.v1.diff-service",
		"aufs":         "io.containerd.snapshotter.v1.aufs",
		"btrfs":        "io.containerd.snapshotter.v1.btrfs",
		"devmapper":    "io.containerd.snapshotter.v1.devmapper",
		"native":       "io.containerd.snapshotter.v1.native",
		"overlayfs":    "io.containerd.snapshotter.v1.overlayfs",
		"zfs":          "io.containerd.snapshotter.v1.zfs",
	}
}

// fit tells whether the rule is for a key, and where the key goes.
func (r rule) fit(path keyPath, version int) (to keyPath, ok bool) {
	if version > r.upto || len(path) < len(r.from) {
		return nil, false
	}
	var wild string
	for i, part := range r.from {
		if part == "*" {
			wild = path[i]
		} else if part != path[i] {
			return nil, false
		}
	}
	if r.to == nil {
		return nil, true
	}
	for _, part := range r.to {
		if part == "*" {
			part = wild
		}
		to = append(to, part)
	}
	return to.and(path[len(r.from):]...), true
}

// Warning is something in a file that works, or is harmless, and is not as it
// should be.
type Warning struct {
	// Where is FILE:LINE.
	Where string `json:"where"`
	// Key is as it stands in the file.
	Key string `json:"key"`
	// Message says what to do.
	Message string `json:"message"`
	// Deprecated keys act; the others do not.
	Deprecated bool `json:"deprecated"`
}

func (w Warning) String() string { return fmt.Sprintf("%s: %s %s", w.Where, w.Key, w.Message) }
