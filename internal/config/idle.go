package config

import (
	"reflect"
	"sync"
)

// idleKeys are keys that files may have and that change nothing here, with the
// reason; "*" is any one part, and a table stands for all in it. A value other
// than the default makes a warning, so that nobody believes in it.
var idleKeys = sync.OnceValue(allIdleKeys)

func allIdleKeys() []idleKey {
	var (
		images  = plugin(imagesPlugin)
		runtime = plugin(runtimePlugin)
		handler = runtime.and("containerd", "runtimes", "*")
		server  = func(rest ...string) keyPath { return plugin("io.containerd.server.v1."+rest[0], rest[1:]...) }
	)
	return []idleKey{
		{keyPath{"temp"}, "temporary files lie under root"},
		{keyPath{"oom_score"}, "set OOMScoreAdjust in the service unit"},
		{keyPath{"required_plugins"}, "there are no plugins to require"},
		{keyPath{"disabled_plugins"}, "there are no plugins to disable"},
		{keyPath{"timeouts"}, "time-outs are fixed"},
		{keyPath{"cgroup"}, "set Slice in the service unit"},
		{keyPath{"debug", "log_trace_id"}, "log lines have no trace ids"},
		{images.and("use_local_image_pull"), "there is one way to pull"},
		{images.and("disable_snapshot_annotations"), "snapshotters get the labels that they need"},
		{runtime.and("stats_retention_period"), "statistics are kept for two minutes"},
		{handler.and("disable_pause_image_pull"), "no pause image is ever pulled"},
		{plugin(criPlugin, "disable_tcp_service"), "CRI is served on the unix socket alone"},
		{server("grpc", "max_recv_message_size"), "messages of 16 MiB are taken"},
		{server("grpc", "max_send_message_size"), "messages of 16 MiB are sent"},
		{server("grpc-tcp"), "the API is served on the unix socket alone"},
		{server("ttrpc"), "there is no containerd ttrpc socket"},
		{server("debug"), "the debug service is on the CRI socket, see `cloister debug`"},
		{plugin("io.containerd.metrics.v1.grpc-prometheus"), "calls are always measured"},
		{plugin("io.containerd.transfer.v1.local", "max_concurrent_uploaded_layers"), "Cloister pushes no images"},
		{plugin("io.containerd.transfer.v1.local", "check_platform_supported"), "the platform is always checked"},
		{plugin("io.containerd.transfer.v1.local", "unpack_config"), "runtime_platforms of cri.v1.images says what is unpacked where"},
		{plugin("io.containerd.service.v1.diff-service", "default"), "the snapshotter says how layers are unpacked"},
		{plugin("io.containerd.snapshotter.v1.overlayfs"), "layers lie under root and are removed in the background"},
		{plugin("io.containerd.snapshotter.v1.native"), "layers lie under root"},
		{plugin("io.containerd.snapshotter.v1.btrfs"), "layers lie under root"},
		{plugin("io.containerd.snapshotter.v1.erofs"), "layers are plain files under root, and what containers write lies in folders"},
		{plugin("io.containerd.differ.v1.erofs"), "layers are made by mkfs.erofs without options"},
		{plugin("io.containerd.snapshotter.v1.zfs"), "there is no such snapshotter here"},
		{plugin("io.containerd.snapshotter.v1.aufs"), "there is no such snapshotter here"},
		{plugin("io.containerd.snapshotter.v1.devmapper"), "there is no such snapshotter here"},
		{plugin("io.containerd.snapshotter.v1.blockfile"), "there is no such snapshotter here"},
		{plugin("io.containerd.metadata.v1.bolt"), "there is one namespace, and its database is always written through"},
		{plugin("io.containerd.gc.v1.scheduler"), "collection runs when there is something to collect"},
		{plugin("io.containerd.image-verifier.v1.bindir"), "no verifiers are called"},
		{plugin("io.containerd.runtime.v2.task"), "containers have the platform of their image"},
		{plugin("io.containerd.runtime.v1.linux"), "its shim is gone; handlers of runtime_type " + RuncType + " have options"},
		{plugin("io.containerd.monitor.task.v1.cgroups"), "metrics cover all containers"},
		{plugin("io.containerd.internal.v1.opt"), "nothing is installed out of images"},
		{plugin("io.containerd.monitor.container.v1.restart"), "kubelet restarts containers"},
	}
}

type idleKey struct {
	path   keyPath
	reason string
}

// idle tells why a key acts on nothing, if so.
func idle(path keyPath) (reason string, ok bool) {
	for _, k := range idleKeys() {
		if _, fits := (rule{upto: newestVersion, from: k.path}).fit(path, newestVersion); fits {
			return k.reason, true
		}
	}
	return "", false
}

// warnIdle warns of settings that change nothing and would if they could.
func (l *loader) warnIdle() {
	plain := Default()
	here, there := documentOf(&l.config), documentOf(&plain)
	seen := map[string]bool{}
	for _, s := range l.settings {
		reason, ok := idle(s.path)
		_, isBool := s.value.(bool)
		if !ok || s.table || isZero(s) && !isBool || seen[s.path.String()] {
			continue
		}
		seen[s.path.String()] = true
		if reflect.DeepEqual(valueAt(reflect.ValueOf(here), s.path), valueAt(reflect.ValueOf(there), s.path)) {
			continue
		}
		o := l.origins[s.path.String()]
		l.warnings = append(l.warnings, Warning{Where: o.place.String(), Key: o.wrote.String(), Message: "has no effect: " + reason})
	}
}

// valueAt gives what is at a path, the zero value where nothing is.
func valueAt(v reflect.Value, path keyPath) any {
	for len(path) > 0 || v.Kind() == reflect.Pointer {
		switch {
		case v.Kind() == reflect.Pointer || v.Kind() == reflect.Interface && !v.IsNil():
			v = v.Elem()
			continue
		case v.Kind() == reflect.Map:
			elem := v.MapIndex(reflect.ValueOf(path[0]))
			if !elem.IsValid() {
				elem = reflect.Zero(v.Type().Elem())
			}
			v = elem
		case v.Kind() == reflect.Struct && !isLeaf(v.Type()):
			f, ok := fieldOf(v.Type(), path[0])
			if !ok {
				return nil
			}
			v = v.FieldByIndex(f.Index)
		default:
			return nil
		}
		path = path[1:]
	}
	if v.Kind() == reflect.Slice && v.Len() == 0 {
		return nil // a list that is empty is as one that is absent
	}
	return v.Interface()
}
