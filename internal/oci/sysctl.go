package oci

import (
	"maps"
	"regexp"
	"slices"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	portStart = "net.ipv4.ip_unprivileged_port_start"
	pingRange = "net.ipv4.ping_group_range"

	maxSysctlValue = 4096
)

var sysctlName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]*([./][A-Za-z0-9_-]+(@[A-Za-z0-9_-]+)?)+$`)

// Sysctls returns what to set in the pod's namespaces: the request's, and
// where the node says so and the pod has a network of its own, ports below
// 1024 and ping for everybody. Names are in the form with dots.
func Sysctls(cfg *runtimeapi.PodSandboxConfig, node Node) map[string]string {
	all := map[string]string{}
	for name, value := range cfg.GetLinux().GetSysctls() {
		all[dotted(name)] = value
	}
	ns := cfg.GetLinux().GetSecurityContext().GetNamespaceOptions()
	if ns.GetNetwork() == runtimeapi.NamespaceMode_NODE {
		return all
	}
	if _, ok := all[portStart]; !ok && node.UnprivilegedPorts {
		all[portStart] = "0"
	}
	// In a user namespace the kernel refuses group ids that it does not map.
	if _, ok := all[pingRange]; !ok && node.UnprivilegedICMP && !hasUserNamespace(ns) {
		all[pingRange] = "0 2147483647"
	}
	return all
}

// SplitSysctls sorts sysctls by the namespace that they belong to.
func SplitSysctls(sysctls map[string]string) (net, ipc, uts map[string]string) {
	net, ipc, uts = map[string]string{}, map[string]string{}, map[string]string{}
	for name, value := range sysctls {
		switch sysctlNamespace(dotted(name)) {
		case "net":
			net[name] = value
		case "ipc":
			ipc[name] = value
		case "uts":
			uts[name] = value
		}
	}
	return net, ipc, uts
}

// SysctlPath is the file of a sysctl beneath /proc/sys. In the form with
// slashes the dots belong to names, as in net/ipv4/conf/eth0.100/forwarding.
func SysctlPath(name string) string {
	if i := strings.IndexAny(name, "./"); i >= 0 && name[i] == '/' {
		return "/proc/sys/" + name
	}
	return "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
}

// dotted gives a name its usual form, unless that would lose a dot that is
// part of an interface's name.
func dotted(name string) string {
	if strings.Contains(name, ".") {
		return name
	}
	return strings.ReplaceAll(name, "/", ".")
}

// sysctlNamespace names the namespace that a sysctl belongs to; empty means
// that it is the whole node's.
func sysctlNamespace(name string) string {
	name = strings.ReplaceAll(name, "/", ".")
	ipc := []string{
		"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem",
		"kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced",
	}
	switch {
	case strings.HasPrefix(name, "net."):
		return "net"
	case strings.HasPrefix(name, "fs.mqueue.") || slices.Contains(ipc, name):
		return "ipc"
	case name == "kernel.domainname":
		return "uts"
	}
	return ""
}

// checkSysctls refuses names and values that could become more than one
// setting, and settings of the node in the guise of the pod's.
func checkSysctls(cfg *runtimeapi.PodSandboxConfig) error {
	sysctls := cfg.GetLinux().GetSysctls()
	if len(sysctls) > maxRepeated {
		return invalid("number of sysctls", len(sysctls), "too many")
	}
	ns := cfg.GetLinux().GetSecurityContext().GetNamespaceOptions()
	for _, name := range slices.Sorted(maps.Keys(sysctls)) {
		if err := checkSysctl(name, sysctls[name]); err != nil {
			return err
		}
		switch sysctlNamespace(name) {
		case "net", "uts":
			if ns.GetNetwork() == runtimeapi.NamespaceMode_NODE {
				return invalid("sysctl", name, "the pod is on the node's network, so it would change the node; remove it or hostNetwork")
			}
		case "ipc":
			if ns.GetIpc() == runtimeapi.NamespaceMode_NODE {
				return invalid("sysctl", name, "the pod shares the node's IPC, so it would change the node; remove it or hostIPC")
			}
		default:
			return invalid("sysctl", name, "it is not namespaced, so it would change the node; set it on the node")
		}
	}
	return nil
}

func checkSysctl(name, value string) error {
	if len(name) > maxName || !sysctlName.MatchString(name) || hasDotDot(SysctlPath(name)) {
		return invalid("sysctl", name, `give a name such as "net.ipv4.ip_forward"`)
	}
	// "+" joined settings in a parser of another runtime (CVE-2022-0811).
	if len(value) > maxSysctlValue || strings.Contains(value, "+") || !printable(strings.ReplaceAll(value, "\t", " ")) {
		return invalid("value of sysctl "+name, value, `give at most 4096 printable bytes on one line, without "+"`)
	}
	return nil
}
