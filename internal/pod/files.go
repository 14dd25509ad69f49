package pod

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/network"
)

// hostname gives the sandbox's host name: the pod's, else the node's.
func hostname(cfg *runtimeapi.PodSandboxConfig) string {
	if cfg.Hostname != "" {
		return cfg.Hostname
	}
	name, err := os.Hostname()
	if err != nil {
		return ""
	}
	return name
}

// writeFiles writes the files that containers of the sandbox see under /etc.
// They belong to root as the containers see it: id-mapped mounts would do the
// same, but not every OCI runtime can make them in namespaces that it joins.
func writeFiles(dir string, cfg *runtimeapi.PodSandboxConfig, uid, gid uint32) error {
	resolv, err := resolvConf(cfg.DnsConfig)
	if err != nil {
		return err
	}
	hosts, err := os.ReadFile("/etc/hosts")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read the node's hosts file: %w", err)
	}
	for name, content := range map[string]string{
		"resolv.conf": resolv,
		"hostname":    hostname(cfg) + "\n",
		"hosts":       string(hosts),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			return fmt.Errorf("write the sandbox's %s: %w", name, err)
		}
		if err := os.Chown(filepath.Join(dir, name), int(uid), int(gid)); err != nil {
			return fmt.Errorf("give the sandbox's %s to root of the pod: %w", name, err)
		}
	}
	return nil
}

// resolvConf gives the pod's resolv.conf: its own, else the node's.
func resolvConf(d *runtimeapi.DNSConfig) (string, error) {
	if d == nil {
		b, err := os.ReadFile("/etc/resolv.conf")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("read the node's resolv.conf: %w", err)
		}
		return string(b), nil
	}
	var b strings.Builder
	if len(d.Searches) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(d.Searches, " "))
	}
	for _, s := range d.Servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	if len(d.Options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(d.Options, " "))
	}
	return b.String(), nil
}

// bandwidth reads the annotations with which Kubernetes users limit a pod's
// traffic; values are quantities of bits per second.
func bandwidth(annotations map[string]string) *network.Bandwidth {
	var b network.Bandwidth
	for name, rate := range map[string]*uint64{
		"kubernetes.io/ingress-bandwidth": &b.IngressRate,
		"kubernetes.io/egress-bandwidth":  &b.EgressRate,
	} {
		q, err := resource.ParseQuantity(annotations[name])
		if err == nil && q.Value() > 0 {
			*rate = uint64(q.Value())
		}
	}
	if b == (network.Bandwidth{}) {
		return nil
	}
	return &b
}
