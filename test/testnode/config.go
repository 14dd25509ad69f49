package testnode

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"text/template"

	"golang.org/x/sys/unix"
)

// configuration is containerd's version 3 file, which Cloister reads too.
var configuration = template.Must(template.New("config.toml").Parse(`version = 3
root = "{{.Root}}"
state = "{{.State}}"
{{- if .Extra}}
imports = ["extra.toml"]
{{- end}}

[grpc]
address = "{{.Socket}}"

[plugins."io.containerd.cri.v1.images"]
snapshotter = "overlayfs"

[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "registry.k8s.io/pause:3.10.2"

[plugins."io.containerd.cri.v1.images".registry]
config_path = "{{.Hosts}}"

[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true

[plugins."io.containerd.cri.v1.runtime".cni]
{{- if .CNIBin}}
bin_dirs = ["{{.CNIBin}}"]
{{- end}}
conf_dir = "{{.CNIConf}}"

[plugins."io.containerd.cri.v1.runtime".containerd]
{{- if .Default}}
default_runtime_name = "{{.Default}}"
{{- end}}
{{range $name, $binary := .Handlers}}
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.{{$name}}]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.{{$name}}.options]
BinaryName = "{{$binary}}"
{{if $.Runtimes}}Root = "{{$.Runtimes}}"
{{end -}}
{{end}}
{{- range $name, $shim := .Shims}}
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.{{$name}}]
runtime_type = "io.containerd.runc.v2"
runtime_path = "{{$shim}}"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.{{$name}}.options]
BinaryName = "runc"
{{end}}
{{- if .Guests}}
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.vm]
runtime_type = "io.containerd.cloister-vm.v2"
{{- if not .Cloister}}
sandboxer = "shim"
disable_pause_image_pull = true
{{- end}}
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.vm.options]
guests = "{{.Guests}}"
accel = "auto"
{{- range .GuestOptions}}
{{.}}
{{- else}}
boot_timeout = 180
{{- end}}
{{end}}
[plugins."io.containerd.grpc.v1.cri"]
stream_server_address = "{{.Stream}}"
stream_server_port = "0"
{{if .Cloister}}
[cloister]
network = "{{.Network}}"
{{- if eq .Network "builtin"}}
[cloister.builtin_network]
bridge = "{{.Bridge}}"
subnets = [{{range $i, $s := .Subnets}}{{if $i}}, {{end}}"{{$s}}"{{end}}]
{{- end}}
{{end -}}
`))

// configure writes config.toml and the CNI configuration.
func (n *Node) configure() error {
	subnets, err := n.subnets()
	if err != nil {
		return err
	}
	cniConf := filepath.Join(n.Dir, "net.d")
	for _, d := range []string{cniConf, n.Root(), n.State()} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			return err
		}
	}
	runtimes := ""
	if n.opts.MemoryState {
		if err := unix.Mount("tmpfs", n.State(), "tmpfs", 0, "mode=711"); err != nil {
			return fmt.Errorf("mount the state folder: %w", err)
		}
		if n.opts.Runtime == Containerd {
			runtimes = filepath.Join(n.State(), "runtimes")
		}
	}
	if n.opts.Network == "cni" {
		if err := os.WriteFile(filepath.Join(cniConf, "10-test.conflist"), n.conflist(subnets), 0o644); err != nil {
			return err
		}
	}
	handlers, def := n.opts.Handlers, n.opts.Default
	if n.opts.Guests != "" && len(handlers) == 0 {
		runc, err := exec.LookPath("runc")
		if err != nil {
			return fmt.Errorf("a default handler beside vm: %w", err)
		}
		handlers = map[string]string{"runc": runc}
		if def == "" {
			def = "runc"
		}
	}
	if n.opts.Runtime == Containerd {
		if len(handlers) == 0 {
			runc, err := exec.LookPath("runc")
			if err != nil {
				return fmt.Errorf("containerd needs runc: %w", err)
			}
			handlers = map[string]string{"runc": runc}
		}
		if def == "" {
			def = "runc"
		}
	}
	var buf bytes.Buffer
	err = configuration.Execute(&buf, struct {
		Root, State, Runtimes, Socket, Hosts, CNIBin, CNIConf, Default, Network, Bridge, Stream, Guests string
		Subnets, GuestOptions                                                                           []string
		Handlers, Shims                                                                                 map[string]string
		Cloister, Extra                                                                                 bool
	}{
		n.Root(), n.State(), runtimes, n.Socket, n.opts.Hosts, n.opts.CNIBin, cniConf, def, n.opts.Network, n.bridge, n.streamAddress(), n.opts.Guests,
		subnets, n.opts.GuestOptions, handlers, n.opts.Shims, n.opts.Runtime == Cloister, n.opts.Extra != "",
	})
	if err != nil {
		return err
	}
	if n.opts.Extra != "" {
		if err := os.WriteFile(filepath.Join(n.Dir, "extra.toml"), []byte(n.opts.Extra), 0o644); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(n.Dir, "config.toml"), buf.Bytes(), 0o644)
}

// conflist is the network that kubelet users know: a bridge with addresses
// from host-local, host ports, and the firewall's forward rules.
func (n *Node) conflist(subnets []string) []byte {
	type m map[string]any
	var ranges [][]m
	var routes []m
	for _, s := range subnets {
		ranges = append(ranges, []m{{"subnet": s}})
		dst := "0.0.0.0/0"
		if strings.Contains(s, ":") {
			dst = "::/0"
		}
		routes = append(routes, m{"dst": dst})
	}
	b, err := json.MarshalIndent(m{
		"cniVersion": "1.0.0",
		"name":       n.bridge,
		"plugins": []m{
			{
				"type": "bridge", "bridge": n.bridge, "isGateway": true, "ipMasq": true, "hairpinMode": true,
				"ipam": m{
					"type": "host-local", "dataDir": filepath.Join(n.Dir, "ipam"),
					"ranges": ranges, "routes": routes,
				},
			},
			{"type": "portmap", "capabilities": m{"portMappings": true}},
			{"type": "firewall"},
		},
	}, "", "  ")
	if err != nil {
		panic(err) // only strings and booleans are in it
	}
	return b
}

// nodes counts the nodes of this process, which must not choose the same range:
// a bridge is made with the first pod.
var nodes atomic.Int32

// subnets gives the node a range of each of its families.
func (n *Node) subnets() ([]string, error) {
	four, i, err := freeSubnet()
	if err != nil {
		return nil, err
	}
	six := fmt.Sprintf("fd6e:6f64:65:%x::/64", i)
	return map[Families][]string{IPv4: {four}, IPv6: {six}, DualStack: {four, six}}[n.opts.Families], nil
}

// streamAddress is where streams are served.
func (n *Node) streamAddress() string {
	if n.opts.Families == IPv4 {
		return "127.0.0.1"
	}
	return "::1"
}

// freeSubnet finds a range that no interface of the machine lies in, and gives
// its number too.
func freeSubnet() (string, int, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return "", 0, err
	}
	const ranges = 100 * 16 // 10.100.0.0/20 to 10.199.240.0/20
	for range ranges {
		i := (os.Getpid()*16 + int(nodes.Add(1))) % ranges
		subnet := &net.IPNet{IP: net.IPv4(10, byte(100+i/16), byte(i%16*16), 0).To4(), Mask: net.CIDRMask(20, 32)}
		taken := false
		for _, a := range addrs {
			if other, ok := a.(*net.IPNet); ok && (subnet.Contains(other.IP) || other.Contains(subnet.IP)) {
				taken = true
			}
		}
		if !taken {
			return subnet.String(), i, nil
		}
	}
	return "", 0, fmt.Errorf("no free range in 10.100.0.0 to 10.199.255.255")
}
