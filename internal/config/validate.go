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

	"github.com/containerd/errdefs"
)

const (
	imagesKey  = "plugins.io.containerd.cri.v1.images."
	runtimeKey = "plugins.io.containerd.cri.v1.runtime."
	serverKey  = "plugins.io.containerd.grpc.v1.cri."
)

// fault is an error about a key, at the place where it was set last.
func (l *loader) fault(dotted, msg string) error {
	for at := dotted; at != ""; {
		if p, ok := l.where[at]; ok {
			return p.fault(msg)
		}
		i := strings.LastIndexByte(at, '.')
		at = at[:max(i, 0)]
	}
	return fmt.Errorf("configuration: %s: %w", msg, errdefs.ErrInvalidArgument)
}

// judge gathers the faults of values that have the right type and still make
// no sense.
type judge struct {
	l      *loader
	faults []error
}

func (j *judge) require(ok bool, dotted, format string, args ...any) {
	if !ok {
		name := dotted[strings.LastIndexByte(dotted, '.')+1:]
		j.faults = append(j.faults, j.l.fault(dotted, name+" "+fmt.Sprintf(format, args...)))
	}
}

func (j *judge) oneOf(dotted, value string, allowed ...string) {
	j.require(slices.Contains(allowed, value), dotted, "is %q; allowed are %q", value, allowed)
}

func (j *judge) absolute(dotted, path string) {
	j.require(filepath.IsAbs(path), dotted, "is %q; it has to be an absolute path", path)
}

func (l *loader) validate() error {
	j := &judge{l: l}
	c := &l.config
	j.absolute("root", c.Root)
	j.absolute("state", c.State)
	j.absolute("grpc.address", c.Address)
	cause := "state"
	if l.addressed {
		cause = "grpc.address"
	}
	j.require(len(c.Address) <= maxSocketPath, cause,
		"makes the socket's path %d bytes long, of at most %d; choose a shorter one", len(c.Address), maxSocketPath)
	j.require(c.Root != c.State, "state", "is the same folder as root")
	j.oneOf("debug.format", c.LogFormat, "text", "json")
	c.LogLevel = logLevel(c.LogLevel)
	j.oneOf("debug.level", c.LogLevel, "debug", "info", "warn", "error")
	j.images(&c.Images)
	j.runtime(&c.Runtime)
	j.handlers(&c.Runtime.Containerd)
	j.streaming(&c.Streaming)
	j.cloister(&c.Cloister)
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
	j.require(c.MaxConcurrentDownloads > 0, imagesKey+"max_concurrent_downloads", "has to be above 0")
	j.require(c.ImagePullProgressTimeout.Duration >= 0, imagesKey+"image_pull_progress_timeout", "may not be negative")
	for _, dir := range strings.Split(c.Registry.ConfigPath, ":") {
		j.require(dir == "" || filepath.IsAbs(dir), imagesKey+"registry.config_path", "has the relative folder %q", dir)
	}
}

func (j *judge) runtime(c *Runtime) {
	j.require(c.NetNSMountsUnderStateDir, runtimeKey+"netns_mounts_under_state_dir", "is false, which is not supported yet; namespaces are pinned under the state folder")
	j.require(c.CNI.UseInternalLoopback, runtimeKey+"cni.use_internal_loopback", "is false, which is not supported yet; lo is set up without a plugin")
	j.require(c.DrainExecSyncIOTimeout.Duration >= 0, runtimeKey+"drain_exec_sync_io_timeout", "may not be negative")
	j.require(c.StatsCollectPeriod.Duration > 0, runtimeKey+"stats_collect_period", "has to be above 0")
	p := c.UnsetSeccompProfile
	j.require(p == "" || p == "unconfined" || p == "runtime/default" || strings.HasPrefix(p, "localhost/"),
		runtimeKey+"unset_seccomp_profile", `is %q; allowed are "", "unconfined", "runtime/default" and "localhost/PATH"`, p)
	for _, dir := range c.CDISpecDirs {
		j.absolute(runtimeKey+"cdi_spec_dirs", dir)
	}
	j.require(c.CNI.MaxConfNum >= 0, runtimeKey+"cni.max_conf_num", "may not be negative")
	j.oneOf(runtimeKey+"cni.ip_pref", c.CNI.IPPref, "", "ipv4", "ipv6", "cni")
	j.absolute(runtimeKey+"cni.conf_dir", c.CNI.ConfDir)
	for _, dir := range c.CNI.BinDirs {
		j.absolute(runtimeKey+"cni.bin_dirs", dir)
	}
}

func (j *judge) handlers(c *Containerd) {
	for _, name := range slices.Sorted(maps.Keys(c.Runtimes)) {
		j.handler(runtimeKey+"containerd.runtimes."+name, c.Runtimes[name])
	}
	_, ok := c.Runtimes[c.DefaultRuntimeName]
	j.require(ok || c.DefaultRuntimeName == "" || len(c.Runtimes) == 0, runtimeKey+"containerd.default_runtime_name",
		"is %q, but the runtimes are %q", c.DefaultRuntimeName, slices.Sorted(maps.Keys(c.Runtimes)))
}

func (j *judge) handler(at string, h Handler) {
	j.require(h.RuntimeType != "" || h.RuntimePath != "", at, "has no runtime_type; io.containerd.runc.v2 serves runc, crun and runsc")
	j.require(h.RuntimePath == "" || filepath.IsAbs(h.RuntimePath), at+".runtime_path", "has to be absolute")
	j.require(h.BaseRuntimeSpec == "" || filepath.IsAbs(h.BaseRuntimeSpec), at+".base_runtime_spec", "has to be absolute")
	j.require(h.PrivilegedWithoutHostDevices || !h.PrivilegedWithoutHostDevicesAllDevicesAllowed,
		at+".privileged_without_host_devices_all_devices_allowed", "needs privileged_without_host_devices")
	j.oneOf(at+".sandboxer", h.Sandboxer, "", "podsandbox", "shim")
	j.require(h.Sandboxer != "shim" || h.IsRunc() && h.RuntimePath == "", at+".sandboxer", `is "shim", which is not supported yet for this runtime_type`)
	j.require(h.IOType != "streaming", at+".io_type", `is "streaming", which is not supported yet; use "fifo"`)
	j.require(h.IOType == "streaming" || h.IOType == "" || h.IOType == "fifo", at+".io_type", `is %q; allowed is "fifo"`, h.IOType)
	for _, globs := range [][]string{h.PodAnnotations, h.ContainerAnnotations} {
		for _, g := range globs {
			_, err := filepath.Match(g, "")
			j.require(err == nil, at, "has the bad annotation pattern %q", g)
		}
	}
	var err error
	switch {
	case h.IsMachine():
		err = h.checkMachine()
	case h.IsRunc():
		_, err = h.RuncOptions()
	default:
		return // any table may go to another shim as its configuration
	}
	var bad *optionError
	if errors.As(err, &bad) {
		j.faults = append(j.faults, j.l.fault(at+".options."+bad.name, bad.msg))
	}
}

func (j *judge) streaming(c *Streaming) {
	port, err := strconv.Atoi(c.Port)
	j.require(c.Port == "" || err == nil && port >= 0 && port <= 65535, serverKey+"stream_server_port", "is %q; it has to be in 0…65535", c.Port)
	if c.Address != "" {
		_, err = netip.ParseAddr(c.Address)
		j.require(err == nil || c.Address == "localhost", serverKey+"stream_server_address", "is %q; it has to be an IP address", c.Address)
	}
	j.require(c.IdleTimeout.Duration >= 0, serverKey+"stream_idle_timeout", "may not be negative")
	k := c.KeyPair
	j.require((k.CertFile == "") == (k.KeyFile == ""), serverKey+"x509_key_pair_streaming", "needs both tls_cert_file and tls_key_file")
	j.require(k.CertFile == "" || c.EnableTLS, serverKey+"x509_key_pair_streaming", "needs enable_tls_streaming = true")
}

func (j *judge) cloister(c *Cloister) {
	j.oneOf("cloister.network", c.Network, "cni", "builtin")
	j.oneOf("cloister.cgroup_driver", c.CgroupDriver, "", "cgroupfs", "systemd")
	j.require(c.Shim == "" || filepath.IsAbs(c.Shim), "cloister.shim", "is %q; it has to be an absolute path", c.Shim)
	n := c.BuiltinNetwork
	const at = "cloister.builtin_network."
	bridgeOK := n.Bridge != "" && len(n.Bridge) <= 15 && !strings.ContainsAny(n.Bridge, "/ \t\n:") && n.Bridge != "." && n.Bridge != ".."
	j.require(bridgeOK, at+"bridge", "is %q; an interface name has 1…15 bytes without / : and blanks", n.Bridge)
	j.require(n.MTU == 0 || n.MTU >= 68 && n.MTU <= 65535, at+"mtu", "is %d; it has to be 0 or in 68…65535", n.MTU)
	j.require(len(n.Subnets) > 0, at+"subnets", "is empty")
	var families [2]int
	for _, s := range n.Subnets {
		p, err := netip.ParsePrefix(s)
		j.require(err == nil && p == p.Masked(), at+"subnets", "has %q; a subnet is written ADDRESS/BITS without host bits", s)
		if err != nil {
			continue
		}
		j.require(p.Addr().BitLen()-p.Bits() >= 2, at+"subnets", "has %q, which is too small for a pod", s)
		if p.Addr().Is4() {
			families[0]++
		} else {
			families[1]++
		}
	}
	j.require(families[0] <= 1 && families[1] <= 1, at+"subnets", "has two ranges of one address family")
}
