package client

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ParsePort reads [[IP:]HOSTPORT:]PORT[/tcp|udp|sctp]. An IPv6 address stands
// in brackets. Without a host port the container's port is taken.
func ParsePort(s string) (*runtimeapi.PortMapping, error) {
	fail := func() error {
		return fmt.Errorf("port %q: it is written [[IP:]HOSTPORT:]PORT[/tcp|udp|sctp], such as 8080:80", s)
	}
	rest, protocol, _ := strings.Cut(s, "/")
	m := &runtimeapi.PortMapping{}
	switch strings.ToLower(protocol) {
	case "", "tcp":
	case "udp":
		m.Protocol = runtimeapi.Protocol_UDP
	case "sctp":
		m.Protocol = runtimeapi.Protocol_SCTP
	default:
		return nil, fail()
	}
	host, container := "", rest
	if i := strings.LastIndexByte(rest, ':'); i >= 0 {
		host, container = rest[:i], rest[i+1:]
	}
	hostPort := container
	if host != "" {
		hostPort = host
		if i := strings.LastIndexByte(host, ':'); i >= 0 {
			ip, err := netip.ParseAddr(strings.Trim(host[:i], "[]"))
			if err != nil {
				return nil, fail()
			}
			m.HostIp, hostPort = ip.String(), host[i+1:]
		}
	}
	var ok1, ok2 bool
	m.ContainerPort, ok1 = parsePortNumber(container)
	m.HostPort, ok2 = parsePortNumber(hostPort)
	if !ok1 || !ok2 || strings.HasPrefix(rest, ":") {
		return nil, fail()
	}
	return m, nil
}

func parsePortNumber(s string) (int32, bool) {
	n, err := strconv.ParseUint(s, 10, 16)
	return int32(n), err == nil && n > 0
}

// ParseMount reads SOURCE:TARGET[:ro|rw]. A relative source is under dir.
func ParseMount(s, dir string) (*runtimeapi.Mount, error) {
	parts := strings.Split(s, ":")
	if len(parts) < 2 || len(parts) > 3 || parts[0] == "" || !filepath.IsAbs(parts[1]) {
		return nil, fmt.Errorf("volume %q: it is written SOURCE:/TARGET[:ro], such as ./data:/data", s)
	}
	m := &runtimeapi.Mount{HostPath: parts[0], ContainerPath: filepath.Clean(parts[1])}
	if !filepath.IsAbs(m.HostPath) {
		m.HostPath = filepath.Join(dir, m.HostPath)
	}
	if len(parts) == 3 {
		switch parts[2] {
		case "ro":
			m.Readonly = true
		case "rw":
		default:
			return nil, fmt.Errorf("volume %q: the option %q is not known; it is ro or rw", s, parts[2])
		}
	}
	return m, nil
}

// ParseEnv reads NAME=VALUE, or NAME for the caller's own value.
func ParseEnv(s string, lookup func(string) (string, bool)) (*runtimeapi.KeyValue, error) {
	name, value, ok := strings.Cut(s, "=")
	if name == "" {
		return nil, fmt.Errorf("variable %q: it is written NAME=VALUE", s)
	}
	if !ok {
		if value, ok = lookup(name); !ok {
			return nil, fmt.Errorf("variable %q: it is not set here; write %s=VALUE", name, name)
		}
	}
	return &runtimeapi.KeyValue{Key: name, Value: []byte(value)}, nil
}
