package oci

import (
	"math"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"unicode"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// maxName is above every name that Kubernetes makes (253) and below what
	// a file name takes.
	maxName = 255
	// maxRepeated bounds lists that are searched or become kernel objects.
	maxRepeated = 4096
	// maxMapBytes bounds labels and annotations; Kubernetes admits 256 KiB.
	maxMapBytes = 512 << 10
	// maxHostname is the kernel's HOST_NAME_MAX.
	maxHostname = 64
)

var hostName = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$`)

// ValidateSandbox checks the shape of a pod's configuration. What passes can
// be made into files, names and settings without looking twice.
func ValidateSandbox(cfg *runtimeapi.PodSandboxConfig, node Node) error {
	if cfg == nil {
		return missing("config of the pod sandbox")
	}
	if cfg.GetMetadata() == nil {
		return missing("metadata of the pod sandbox")
	}
	m := cfg.GetMetadata()
	if m.GetName() == "" {
		return missing("name in metadata of the pod sandbox")
	}
	for _, f := range []named[string]{{"name", m.GetName()}, {"namespace", m.GetNamespace()}, {"uid", m.GetUid()}} {
		if err := checkName(f.field+" of the pod sandbox", f.value); err != nil {
			return err
		}
	}
	if err := checkHostname(cfg.GetHostname()); err != nil {
		return err
	}
	if dir := cfg.GetLogDirectory(); dir != "" {
		if err := checkLogDirectory(dir); err != nil {
			return err
		}
	}
	for _, check := range []func(*runtimeapi.PodSandboxConfig) error{
		checkDNS, checkPorts, checkSandboxMaps, checkSandboxLinux, checkSysctls,
	} {
		if err := check(cfg); err != nil {
			return err
		}
	}
	return nil
}

// checkName refuses what would make a path, a line or a terminal out of a name.
func checkName(field, name string) error {
	switch {
	case len(name) > maxName:
		return invalid(field, name, "names have at most 255 bytes")
	case !printable(name) || strings.Contains(name, "/") || name == "." || name == "..":
		return invalid(field, name, `"/", ".", ".." and control characters are not allowed`)
	}
	return nil
}

func checkHostname(name string) error {
	if name == "" {
		return nil
	}
	if len(name) > maxHostname || !hostName.MatchString(name) {
		return invalid("hostname", name, "give at most 64 letters, digits, dots and dashes")
	}
	return nil
}

// checkDNS keeps each entry one word of one line of resolv.conf.
func checkDNS(cfg *runtimeapi.PodSandboxConfig) error {
	dns := cfg.GetDnsConfig()
	for _, server := range dns.GetServers() {
		if _, err := netip.ParseAddr(server); err != nil {
			return invalid("servers of dns_config", server, "give an IP address")
		}
	}
	for _, f := range []named[[]string]{{"servers", dns.GetServers()}, {"searches", dns.GetSearches()}, {"options", dns.GetOptions()}} {
		if len(f.value) > maxRepeated {
			return invalid("number of "+f.field+" of dns_config", len(f.value), "too many")
		}
		for _, w := range f.value {
			if w == "" || len(w) > maxName || !printable(w) || strings.ContainsFunc(w, unicode.IsSpace) {
				return invalid(f.field+" of dns_config", w, "give one word of at most 255 bytes")
			}
		}
	}
	return nil
}

func checkPorts(cfg *runtimeapi.PodSandboxConfig) error {
	if n := len(cfg.GetPortMappings()); n > math.MaxUint16 {
		return invalid("number of port_mappings", n, "too many")
	}
	type key struct {
		protocol runtimeapi.Protocol
		ip       string
		port     int32
	}
	seen := map[key]bool{}
	for _, p := range cfg.GetPortMappings() {
		if p == nil {
			return missing("an entry of port_mappings")
		}
		if _, ok := runtimeapi.Protocol_name[int32(p.GetProtocol())]; !ok {
			return invalid("protocol of port_mappings", int32(p.GetProtocol()), "give TCP, UDP or SCTP")
		}
		if p.GetHostPort() < 0 || p.GetHostPort() > math.MaxUint16 {
			return invalid("host_port", p.GetHostPort(), "give 1 to 65535, or 0 for none")
		}
		if p.GetContainerPort() < 0 || p.GetContainerPort() > math.MaxUint16 || (p.GetHostPort() > 0 && p.GetContainerPort() == 0) {
			return invalid("container_port", p.GetContainerPort(), "give 1 to 65535")
		}
		if ip := p.GetHostIp(); ip != "" {
			if _, err := netip.ParseAddr(ip); err != nil {
				return invalid("host_ip", ip, "give an IP address")
			}
		}
		k := key{p.GetProtocol(), p.GetHostIp(), p.GetHostPort()}
		if k.port != 0 && seen[k] {
			return invalid("host_port", p.GetHostPort(), "it is mapped twice; remove one")
		}
		seen[k] = true
	}
	return nil
}

func checkSandboxMaps(cfg *runtimeapi.PodSandboxConfig) error {
	if err := checkMap("labels of the pod sandbox", cfg.GetLabels()); err != nil {
		return err
	}
	return checkMap("annotations of the pod sandbox", cfg.GetAnnotations())
}

func checkMap(field string, m map[string]string) error {
	total := 0
	for k, v := range m {
		total += len(k) + len(v)
	}
	if total > maxMapBytes {
		return invalid("bytes of "+field, total, "at most 524288 are supported")
	}
	return nil
}

func checkSandboxLinux(cfg *runtimeapi.PodSandboxConfig) error {
	linux := cfg.GetLinux()
	if parent := linux.GetCgroupParent(); parent != "" {
		if err := checkPath("cgroup_parent", parent); err != nil {
			return err
		}
		if strings.ContainsAny(parent, ": ") {
			return invalid("cgroup_parent", parent, "spaces and colons are not allowed")
		}
	}
	sc := linux.GetSecurityContext()
	if sc.GetRunAsGroup() != nil && sc.GetRunAsUser() == nil {
		return invalid("run_as_group of the pod sandbox", sc.GetRunAsGroup().GetValue(), "it needs run_as_user beside it")
	}
	if err := checkIDs(sc.GetRunAsUser(), sc.GetRunAsGroup(), sc.GetSupplementalGroups()); err != nil {
		return err
	}
	if err := checkSELinux(sc.GetSelinuxOptions()); err != nil {
		return err
	}
	for _, p := range []*runtimeapi.SecurityProfile{sc.GetSeccomp(), sc.GetApparmor()} {
		if p == nil {
			continue
		}
		if err := checkProfile("security profile of the pod sandbox", p); err != nil {
			return err
		}
	}
	if err := checkNamespaces(sc.GetNamespaceOptions(), true); err != nil {
		return err
	}
	for _, f := range []named[*runtimeapi.LinuxContainerResources]{{"overhead", linux.GetOverhead()}, {"resources", linux.GetResources()}} {
		if err := checkTotals(f.field, f.value); err != nil {
			return err
		}
	}
	return nil
}

// checkTotals is milder than checkResources: a pod's sums are told, not set,
// and may exceed what one cgroup takes.
func checkTotals(field string, r *runtimeapi.LinuxContainerResources) error {
	for _, f := range []named[int64]{
		{"cpu_shares", r.GetCpuShares()},
		{"cpu_period", r.GetCpuPeriod()},
		{"cpu_quota", r.GetCpuQuota()},
		{"memory_limit_in_bytes", r.GetMemoryLimitInBytes()},
		{"memory_swap_limit_in_bytes", r.GetMemorySwapLimitInBytes()},
	} {
		if f.value < -1 {
			return invalid(f.field+" of "+field, f.value, "it may not be negative")
		}
	}
	return nil
}

func checkIDs(user, group *runtimeapi.Int64Value, groups []int64) error {
	if user != nil && (user.GetValue() < 0 || user.GetValue() > math.MaxInt32) {
		return invalid("run_as_user", user.GetValue(), "ids lie between 0 and 2147483647")
	}
	if group != nil && (group.GetValue() < 0 || group.GetValue() > math.MaxInt32) {
		return invalid("run_as_group", group.GetValue(), "ids lie between 0 and 2147483647")
	}
	if len(groups) > maxGroups {
		return invalid("number of supplemental_groups", len(groups), "the kernel takes at most 65536")
	}
	for _, g := range groups {
		if g < 0 || g > math.MaxInt32 {
			return invalid("supplemental_groups", g, "ids lie between 0 and 2147483647")
		}
	}
	return nil
}

func hasUserNamespace(ns *runtimeapi.NamespaceOption) bool {
	u := ns.GetUsernsOptions()
	return u != nil && u.GetMode() == runtimeapi.NamespaceMode_POD
}

// checkNamespaces checks the modes, alone and together.
func checkNamespaces(ns *runtimeapi.NamespaceOption, pod bool) error {
	allowed := []struct {
		field string
		mode  runtimeapi.NamespaceMode
		modes []runtimeapi.NamespaceMode
	}{
		{"network", ns.GetNetwork(), []runtimeapi.NamespaceMode{runtimeapi.NamespaceMode_POD, runtimeapi.NamespaceMode_NODE}},
		{"ipc", ns.GetIpc(), []runtimeapi.NamespaceMode{runtimeapi.NamespaceMode_POD, runtimeapi.NamespaceMode_NODE}},
		{"pid", ns.GetPid(), []runtimeapi.NamespaceMode{
			runtimeapi.NamespaceMode_POD, runtimeapi.NamespaceMode_CONTAINER, runtimeapi.NamespaceMode_NODE, runtimeapi.NamespaceMode_TARGET,
		}},
	}
	for _, a := range allowed {
		if !slices.Contains(a.modes, a.mode) {
			return invalid(a.field+" of namespace_options", a.mode.String(), "this namespace does not have that mode")
		}
	}
	if ns.GetPid() == runtimeapi.NamespaceMode_TARGET && ns.GetTargetId() == "" && !pod {
		return missing("target_id of namespace_options, which pid mode TARGET needs,")
	}
	if err := checkName("target_id", ns.GetTargetId()); err != nil {
		return err
	}
	if err := checkUserNamespace(ns.GetUsernsOptions()); err != nil {
		return err
	}
	if !hasUserNamespace(ns) {
		return nil
	}
	for _, f := range []named[runtimeapi.NamespaceMode]{{"pid", ns.GetPid()}, {"ipc", ns.GetIpc()}} {
		if f.value == runtimeapi.NamespaceMode_NODE {
			return invalid(f.field+" of namespace_options", f.value.String(), "a pod in a user namespace has no rights over the node's; remove one of the two")
		}
	}
	return nil
}

func checkUserNamespace(u *runtimeapi.UserNamespace) error {
	switch u.GetMode() {
	case runtimeapi.NamespaceMode_POD:
		if u == nil {
			return nil
		}
		if err := checkMapping("uids of userns_options", u.GetUids(), true); err != nil {
			return err
		}
		return checkMapping("gids of userns_options", u.GetGids(), true)
	case runtimeapi.NamespaceMode_NODE:
		if len(u.GetUids())+len(u.GetGids()) > 0 {
			return invalid("mode of userns_options", u.GetMode().String(), "mappings go with mode POD only")
		}
		return nil
	}
	return invalid("mode of userns_options", u.GetMode().String(), "give POD or NODE")
}

// checkMapping checks one list of id mappings. A pod has exactly one, and it
// maps the container's root.
func checkMapping(field string, list []*runtimeapi.IDMapping, pod bool) error {
	if pod && len(list) != 1 {
		return invalid("number of "+field, len(list), "give exactly one mapping")
	}
	if len(list) > maxRepeated {
		return invalid("number of "+field, len(list), "too many")
	}
	for _, m := range list {
		if m == nil {
			return missing("an entry of " + field)
		}
		if m.GetLength() == 0 {
			return invalid("length of "+field, 0, "map at least one id")
		}
		if pod && m.GetContainerId() != 0 {
			return invalid("container_id of "+field, m.GetContainerId(), "root of the container must be mapped: give 0")
		}
		for _, first := range []uint32{m.GetHostId(), m.GetContainerId()} {
			if uint64(first)+uint64(m.GetLength()) > math.MaxUint32 {
				return invalid("length of "+field, m.GetLength(), "the range passes the largest id")
			}
		}
	}
	return nil
}
