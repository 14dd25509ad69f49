package integration

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"k8s.io/client-go/tools/remotecommand"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// Pods are reached, and their ports on the node, over every family that they
// have addresses of; streams are served on an address of it.
func TestFamilies(t *testing.T) {
	needRoot(t)
	if _, err := os.Stat("/proc/sys/net/ipv6"); err == nil {
		restoreForwarding(t)
	}
	for name, families := range map[string]testnode.Families{"IPv4": testnode.IPv4, "IPv6": testnode.IPv6, "dual stack": testnode.DualStack} {
		for _, network := range []string{"cni", "builtin"} {
			t.Run(network+" "+name, func(t *testing.T) {
				if _, err := os.Stat("/proc/sys/net/ipv6"); err != nil && families != testnode.IPv4 {
					t.Skip("the kernel has no IPv6")
				}
				n := own(t, testnode.Options{Network: network, Families: families})
				check := noLeak(t, n)
				p := servingPod(t, n, families)
				p.check(families)
				restart(t, n)
				p.check(families)
				p.remove()
				check()
			})
		}
	}
}

// restoreForwarding lets the node be the router that it was before: a bridge
// with IPv6 addresses makes it one.
func restoreForwarding(t *testing.T) {
	const path = "/proc/sys/net/ipv6/conf/all/forwarding"
	was, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if now, err := os.ReadFile(path); err == nil && !bytes.Equal(now, was) {
			if err := os.WriteFile(path, was, 0o644); err != nil {
				t.Error(err)
			}
		}
	})
}

// server is a pod that serves HTTP on port 8080, published on the node.
type server struct {
	*pod
	port int32
	ips  []netip.Addr
}

var hostPorts = 20000 + int32(os.Getpid()%1200)*10

func servingPod(t *testing.T, n *testnode.Node, families testnode.Families) *server {
	t.Helper()
	s := &server{port: hostPorts + int32(serial.Add(1)%10)}
	s.pod = runPod(t, n, func(c *cri.PodSandboxConfig) {
		c.PortMappings = []*cri.PortMapping{{ContainerPort: 8080, HostPort: s.port}}
		if families == testnode.IPv4 {
			c.PortMappings[0].HostIp = "127.0.0.1"
		}
	})
	s.demo("-http", ":8080", "-n", "1").waitLog("serving")
	inside := "127.0.0.1:8081"
	if families != testnode.IPv4 {
		inside = "[::1]:8081"
	}
	s.demo("-http", inside, "-n", "1").waitLog("serving")
	net := s.status().Network
	s.ips = []netip.Addr{netip.MustParseAddr(net.Ip)}
	for _, ip := range net.AdditionalIps {
		s.ips = append(s.ips, netip.MustParseAddr(ip.Ip))
	}
	return s
}

func (s *server) check(families testnode.Families) {
	t := s.t
	t.Helper()
	var want []bool // is it IPv4?
	addresses := []string{}
	if families != testnode.IPv6 {
		want = append(want, true)
		addresses = append(addresses, fmt.Sprintf("127.0.0.1:%d", s.port))
	}
	if families != testnode.IPv4 {
		want = append(want, false)
		addresses = append(addresses, fmt.Sprintf("[%s]:%d", bridgeAddress(t, s.n), s.port))
	}
	var got []bool
	for _, ip := range s.ips {
		got = append(got, ip.Is4())
		addresses = append(addresses, netip.AddrPortFrom(ip, 8080).String())
	}
	if !slices.Equal(got, want) {
		t.Fatalf("the pod's addresses are %v", s.ips)
	}
	for _, a := range addresses {
		if err := healthy(a); err != nil {
			t.Error(err)
		}
	}
	client := runPod(t, s.n)
	defer client.remove()
	for _, ip := range s.ips {
		url := fmt.Sprintf("http://%s/healthz", netip.AddrPortFrom(ip, 8080))
		if c := client.demo("-fetch", url); c.ended().ExitCode != 0 || !strings.Contains(c.log(), "ok") {
			t.Errorf("from another pod %s says %q", url, c.log())
		}
	}
	c := client.idle()
	for protocol := range executors {
		var out output
		if err := stream(t.Context(), protocol, c.execURL(&cri.ExecRequest{Cmd: []string{"cat"}, Stdin: true, Stdout: true}),
			remotecommand.StreamOptions{Stdin: strings.NewReader("through"), Stdout: &out}); err != nil || out.String() != "through" {
			t.Errorf("%s: %q, %v", protocol, out.String(), err)
		}
	}
	for _, port := range []int32{8080, 8081} { // the second one on the loopback of one family
		local, end := s.forward(port)
		if err := healthy(fmt.Sprintf("127.0.0.1:%d", local)); err != nil {
			t.Errorf("forwarded port %d: %v", port, err)
		}
		end()
	}
}

// bridgeAddress is the node's own IPv6 address on its bridge.
func bridgeAddress(t *testing.T, n *testnode.Node) string {
	t.Helper()
	link, err := net.InterfaceByName(bridge(n))
	if err != nil {
		t.Fatal(err)
	}
	addrs, err := link.Addrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if ip, ok := a.(*net.IPNet); ok && ip.IP.To4() == nil && !ip.IP.IsLinkLocalUnicast() {
			return ip.IP.String()
		}
	}
	t.Fatalf("bridge %s has no IPv6 address: %v", link.Name, addrs)
	return ""
}
