package config

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// judge gathers the faults of values that have the right type and still make
// no sense.
type judge struct {
	l      *loader
	faults []error
}

func (j *judge) require(ok bool, path keyPath, format string, args ...any) {
	if !ok {
		j.faults = append(j.faults, j.l.fault(path, "%s %s", path.last(), fmt.Sprintf(format, args...)))
	}
}

func (j *judge) oneOf(path keyPath, value string, allowed ...string) {
	j.require(slices.Contains(allowed, value), path, "is %q; allowed are %q", value, allowed)
}

func (j *judge) absolute(path keyPath, dir string) {
	j.require(filepath.IsAbs(dir), path, "is %q; it has to be an absolute path", dir)
}

func (l *loader) validate() error {
	j := &judge{l: l}
	c := &l.config
	j.absolute(keyPath{"root"}, c.Root)
	j.absolute(keyPath{"state"}, c.State)
	address := plugin("io.containerd.server.v1.grpc", "address")
	j.absolute(address, c.Address)
	cause := keyPath{"state"}
	if c.Plugins.GRPC.Address != "" {
		cause = address
	}
	j.require(len(c.Address) <= maxSocketPath, cause,
		"makes the socket's path %d bytes long, of at most %d; choose a shorter one", len(c.Address), maxSocketPath)
	j.require(c.Root != c.State, keyPath{"state"}, "is the same folder as root")
	j.oneOf(keyPath{"debug", "format"}, c.LogFormat, "text", "json")
	c.LogLevel = logLevel(c.LogLevel)
	j.oneOf(keyPath{"debug", "level"}, c.LogLevel, "debug", "info", "warn", "error")
	j.images(&c.Images)
	j.runtime(&c.Runtime)
	j.handlers(&c.Runtime.Containerd)
	j.streaming(&c.Streaming)
	j.cloister(&c.Cloister)
	j.devicePlugin(&c.DevicePlugin)
	return errors.Join(j.faults...)
}

// maxSocketPath is the kernel's limit for sun_path without its final zero.
const maxSocketPath = 107

// logLevel gives containerd's other level names their nearest meaning.
func logLevel(name string) string {
	switch name {
	case "":
		return "info"
	case "trace":
		return "debug"
	case "warning":
		return "warn"
	case "fatal", "panic":
		return "error"
	}
	return name
}

func (j *judge) images(c *Images) {
	r := c.Registry
	j.require(r.ConfigPath == "" || len(r.Mirrors) == 0, plugin(imagesPlugin, "registry", "mirrors"),
		"cannot stand beside config_path, which is the newer form; write the mirrors into HOST/hosts.toml below it")
	j.oneOf(plugin(imagesPlugin, "image_decryption", "key_model"), c.ImageDecryption.KeyModel, "", "node")
	j.require(c.ConcurrentLayerFetchBuffer >= 0, plugin(imagesPlugin, "concurrent_layer_fetch_buffer"), "may not be negative")
	j.require(c.StatsCollectPeriod >= 0, plugin(imagesPlugin, "stats_collect_period"), "may not be negative")
	j.require(c.MaxConcurrentDownloads > 0, plugin(imagesPlugin, "max_concurrent_downloads"), "has to be above 0")
	j.require(c.ImagePullProgressTimeout.Duration >= 0, plugin(imagesPlugin, "image_pull_progress_timeout"), "may not be negative")
	for _, dir := range strings.Split(c.Registry.ConfigPath, ":") {
		j.require(dir == "" || filepath.IsAbs(dir), plugin(imagesPlugin, "registry", "config_path"), "has the relative folder %q", dir)
	}
}

func (j *judge) runtime(c *Runtime) {
	j.require(c.DrainExecSyncIOTimeout.Duration >= 0, plugin(runtimePlugin, "drain_exec_sync_io_timeout"), "may not be negative")
	j.require(c.StatsCollectPeriod.Duration > 0, plugin(runtimePlugin, "stats_collect_period"), "has to be above 0")
	p := c.UnsetSeccompProfile
	j.require(p == "" || p == "unconfined" || p == "runtime/default" || strings.HasPrefix(p, "localhost/"),
		plugin(runtimePlugin, "unset_seccomp_profile"), `is %q; allowed are "", "unconfined", "runtime/default" and "localhost/PATH"`, p)
	for _, dir := range c.CDISpecDirs {
		j.absolute(plugin(runtimePlugin, "cdi_spec_dirs"), dir)
	}
	j.require(c.CNI.MaxConfNum >= 0, plugin(runtimePlugin, "cni", "max_conf_num"), "may not be negative")
	j.oneOf(plugin(runtimePlugin, "cni", "ip_pref"), c.CNI.IPPref, "", "ipv4", "ipv6", "cni")
	j.absolute(plugin(runtimePlugin, "cni", "conf_dir"), c.CNI.ConfDir)
	for _, dir := range c.CNI.BinDirs {
		j.absolute(plugin(runtimePlugin, "cni", "bin_dirs"), dir)
	}
}

// shimType is the form of a runtime_type out of which a shim's name is made.
var shimType = form(`^io\.containerd\.[a-z0-9-]+\.v[0-9]+$`)

func (j *judge) handlers(c *Containerd) {
	for _, name := range slices.Sorted(maps.Keys(c.Runtimes)) {
		j.handler(plugin(runtimePlugin, "containerd", "runtimes", name), c.Runtimes[name])
	}
	_, ok := c.Runtimes[c.DefaultRuntimeName]
	found := slices.Contains([]string{"", "runc", "crun", "gvisor"}, c.DefaultRuntimeName) // the daemon looks for it
	j.require(ok || found || len(c.Runtimes) == 0, plugin(runtimePlugin, "containerd", "default_runtime_name"),
		"is %q, but the runtimes are %q", c.DefaultRuntimeName, slices.Sorted(maps.Keys(c.Runtimes)))
}

func (j *judge) handler(at keyPath, h Handler) {
	j.require(h.RuntimeType != "" || h.RuntimePath != "", at, "has no runtime_type; io.containerd.runc.v2 serves runc, crun and runsc")
	j.require(h.RuntimeType == "" || h.RuntimePath != "" || shimType().MatchString(h.RuntimeType), at.and("runtime_type"),
		"is %q; it has the form io.containerd.NAME.VERSION, or runtime_path names the shim", h.RuntimeType)
	j.require(h.RuntimePath == "" || filepath.IsAbs(h.RuntimePath), at.and("runtime_path"), "has to be absolute")
	j.require(h.BaseRuntimeSpec == "" || filepath.IsAbs(h.BaseRuntimeSpec), at.and("base_runtime_spec"), "has to be absolute")
	j.require(h.PrivilegedWithoutHostDevices || !h.PrivilegedWithoutHostDevicesAllDevicesAllowed,
		at.and("privileged_without_host_devices_all_devices_allowed"), "needs privileged_without_host_devices")
	j.oneOf(at.and("sandboxer"), h.Sandboxer, "", "podsandbox", "shim")
	j.require(h.Sandboxer != "shim" || h.IsRunc() && h.RuntimePath == "", at.and("sandboxer"), `is "shim", which is not supported yet for this runtime_type`)
	j.oneOf(at.and("treat_ro_mounts_as_rro"), h.TreatROMountsAsRRO, "", "Enabled", "IfPossible", "Disabled")
	j.require(h.CNIConfDir == "" || filepath.IsAbs(h.CNIConfDir), at.and("cni_conf_dir"), "has to be absolute")
	j.require(h.CNIMaxConfNum >= 0, at.and("cni_max_conf_num"), "may not be negative")
	j.require(h.IOType != "streaming", at.and("io_type"), `is "streaming", which is not supported yet; use "fifo"`)
	j.require(h.IOType == "streaming" || h.IOType == "" || h.IOType == "fifo", at.and("io_type"), `is %q; allowed is "fifo"`, h.IOType)
	for _, globs := range [][]string{h.PodAnnotations, h.ContainerAnnotations} {
		for _, g := range globs {
			_, err := filepath.Match(g, "")
			j.require(err == nil, at, "has the bad annotation pattern %q", g)
		}
	}
	err := h.checkOptions()
	var bad *optionError
	if errors.As(err, &bad) {
		j.faults = append(j.faults, j.l.fault(at.and("options", bad.name), "%s", bad.msg))
	}
}

func (j *judge) streaming(c *Streaming) {
	port, err := strconv.Atoi(c.Port)
	j.require(c.Port == "" || err == nil && port >= 0 && port <= 65535, plugin(criPlugin, "stream_server_port"), "is %q; it has to be in 0…65535", c.Port)
	if c.Address != "" {
		_, err = netip.ParseAddr(c.Address)
		j.require(err == nil || c.Address == "localhost", plugin(criPlugin, "stream_server_address"), "is %q; it has to be an IP address", c.Address)
	}
	j.require(c.IdleTimeout.Duration >= 0, plugin(criPlugin, "stream_idle_timeout"), "may not be negative")
	k := c.KeyPair
	j.require((k.CertFile == "") == (k.KeyFile == ""), plugin(criPlugin, "x509_key_pair_streaming"), "needs both tls_cert_file and tls_key_file")
	j.require(k.CertFile == "" || c.EnableTLS, plugin(criPlugin, "x509_key_pair_streaming"), "needs enable_tls_streaming = true")
}

func (j *judge) cloister(c *Cloister) {
	j.oneOf(keyPath{"cloister", "network"}, c.Network, "cni", "builtin")
	j.oneOf(keyPath{"cloister", "cgroup_driver"}, c.CgroupDriver, "", "cgroupfs", "systemd")
	j.require(c.Shim == "" || filepath.IsAbs(c.Shim), keyPath{"cloister", "shim"}, "is %q; it has to be an absolute path", c.Shim)
	for name, h := range c.Handlers {
		_, err := h.Rlimits()
		j.require(err == nil, keyPath{"cloister", "handlers", name, "ulimits"}, "%v", err)
	}
	n := c.BuiltinNetwork
	at := keyPath{"cloister", "builtin_network"}
	bridgeOK := n.Bridge != "" && len(n.Bridge) <= 15 && !strings.ContainsAny(n.Bridge, "/ \t\n:") && n.Bridge != "." && n.Bridge != ".."
	j.require(bridgeOK, at.and("bridge"), "is %q; an interface name has 1…15 bytes without / : and blanks", n.Bridge)
	j.require(n.MTU == 0 || n.MTU >= 68 && n.MTU <= 65535, at.and("mtu"), "is %d; it has to be 0 or in 68…65535", n.MTU)
	j.require(len(n.Subnets) > 0, at.and("subnets"), "is empty")
	var families [2]int
	for _, s := range n.Subnets {
		p, err := netip.ParsePrefix(s)
		j.require(err == nil && p == p.Masked(), at.and("subnets"), "has %q; a subnet is written ADDRESS/BITS without host bits", s)
		if err != nil {
			continue
		}
		j.require(p.Addr().BitLen()-p.Bits() >= 2, at.and("subnets"), "has %q, which is too small for a pod", s)
		if p.Addr().Is4() {
			families[0]++
		} else {
			families[1]++
		}
	}
	j.require(families[0] <= 1 && families[1] <= 1, at.and("subnets"), "has two ranges of one address family")
}
