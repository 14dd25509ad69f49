package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// nodeName is how the one node is registered.
const nodeName = "cloister-e2e"

// cluster is the control plane and one kubelet.
type cluster struct {
	dir    string // everything lies below it; short, kubelet makes sockets there
	bin    string
	ca     *authority
	admin  string // kubeconfig
	nodeIP net.IP
	bridge string // carries nodeIP, which must not be a loopback address
	cgroup string

	ports struct{ etcd, etcdPeer, api, controllers, scheduler, kubelet, kubeletHealth int }

	started []*process
	kubelet *process
	metrics *metricsAPI
}

// startCluster brings everything up until the node is registered.
func startCluster(ctx context.Context, bin, endpoint string) (*cluster, error) {
	dir, err := os.MkdirTemp("/tmp", "clk")
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(dir, 0o755); err != nil { // pods with a user namespace pass through it
		return nil, err
	}
	id := filepath.Base(dir)
	c := &cluster{dir: dir, bin: bin, bridge: id[:min(len(id), 15)], cgroup: id}
	if err := c.start(ctx, endpoint); err != nil {
		return nil, errors.Join(err, c.close(), removeCgroup(c.cgroup))
	}
	return c, nil
}

func (c *cluster) start(ctx context.Context, endpoint string) error {
	ports, err := freePorts(7)
	if err != nil {
		return err
	}
	for i, p := range []*int{&c.ports.etcd, &c.ports.etcdPeer, &c.ports.api, &c.ports.controllers, &c.ports.scheduler,
		&c.ports.kubelet, &c.ports.kubeletHealth} {
		*p = ports[i]
	}
	if err := c.address(); err != nil {
		return err
	}
	if err := c.certificates(); err != nil {
		return err
	}
	if err := makeCgroup(c.cgroup); err != nil {
		return err
	}
	if err := c.controlPlane(ctx); err != nil {
		return err
	}
	return c.startKubelet(ctx, endpoint)
}

// address makes a bridge without ports that carries the node's address.
func (c *cluster) address() error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = c.bridge
	bridge := &netlink.Bridge{LinkAttrs: attrs}
	if err := netlink.LinkAdd(bridge); err != nil {
		return fmt.Errorf("make bridge %s: %w", c.bridge, err)
	}
	c.nodeIP = net.IPv4(10, 99, byte(os.Getpid()>>8), byte(os.Getpid())|1).To4()
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: c.nodeIP, Mask: net.CIDRMask(32, 32)}}
	if err := netlink.AddrAdd(bridge, addr); err != nil {
		return err
	}
	return netlink.LinkSetUp(bridge)
}

func (c *cluster) certificates() error {
	var err error
	if c.ca, err = newAuthority(filepath.Join(c.dir, "pki")); err != nil {
		return err
	}
	server := fmt.Sprintf("https://127.0.0.1:%d", c.ports.api)
	for _, err := range []error{
		c.ca.server("apiserver", "127.0.0.1", "localhost", "kubernetes", "kubernetes.default", "10.98.0.1"),
		c.ca.server("kubelet-server", nodeName, c.nodeIP.String(), "127.0.0.1"),
		c.ca.server("metrics", "localhost", "metrics.kube-system.svc"),
		c.ca.client("admin", "admin", "system:masters"),
		c.ca.client("apiserver-kubelet", "apiserver", "system:masters"),
		c.ca.client("controllers", "system:kube-controller-manager"),
		c.ca.client("scheduler", "system:kube-scheduler"),
		c.ca.client("kubelet", "system:node:"+nodeName, "system:nodes"),
		c.ca.server("service-account"), // its key pair signs tokens
	} {
		if err != nil {
			return err
		}
	}
	for _, name := range []string{"admin", "controllers", "scheduler", "kubelet"} {
		path, err := c.ca.kubeconfig(name, server)
		if err != nil {
			return err
		}
		if name == "admin" {
			c.admin = path
		}
	}
	return nil
}

// run starts a program of the cluster.
func (c *cluster) run(name string, args ...string) (*process, error) {
	p := &process{name: name, args: append([]string{filepath.Join(c.bin, name)}, args...), log: filepath.Join(c.dir, name+".log")}
	if err := p.start(); err != nil {
		return nil, err
	}
	c.started = append(c.started, p)
	return p, nil
}

func (c *cluster) controlPlane(ctx context.Context) error {
	etcdURL, peerURL := fmt.Sprintf("http://127.0.0.1:%d", c.ports.etcd), fmt.Sprintf("http://127.0.0.1:%d", c.ports.etcdPeer)
	etcd, err := c.run("etcd", "--data-dir", filepath.Join(c.dir, "etcd"), "--listen-client-urls", etcdURL,
		"--advertise-client-urls", etcdURL, "--listen-peer-urls", peerURL, "--initial-advertise-peer-urls", peerURL,
		"--initial-cluster", "default="+peerURL, "--unsafe-no-fsync", "--log-level", "warn")
	if err != nil {
		return err
	}
	if err := etcd.until(ctx, time.Minute, func() error { return get(etcdURL + "/health") }); err != nil {
		return err
	}
	pki := c.ca.file
	api, err := c.run("kube-apiserver", "--etcd-servers", etcdURL,
		"--bind-address=127.0.0.1", "--advertise-address="+c.nodeIP.String(), "--endpoint-reconciler-type=none",
		fmt.Sprint("--secure-port=", c.ports.api), "--service-cluster-ip-range=10.98.0.0/16",
		"--tls-cert-file", pki("apiserver.crt"), "--tls-private-key-file", pki("apiserver.key"), "--client-ca-file", pki("ca.crt"),
		"--kubelet-certificate-authority", pki("ca.crt"), "--kubelet-client-certificate", pki("apiserver-kubelet.crt"),
		"--kubelet-client-key", pki("apiserver-kubelet.key"), "--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file", pki("service-account.key"),
		"--service-account-signing-key-file", pki("service-account.key"),
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
		"--cert-dir", filepath.Join(c.dir, "apiserver"))
	if err != nil {
		return err
	}
	if err := api.until(ctx, 2*time.Minute, func() error {
		_, err := c.kubectl(ctx, "get", "--raw", "/readyz")
		return err
	}); err != nil {
		return err
	}
	if _, err := c.run("kube-controller-manager", "--kubeconfig", pki("controllers.kubeconfig"), "--bind-address=127.0.0.1",
		fmt.Sprint("--secure-port=", c.ports.controllers), "--root-ca-file", pki("ca.crt"),
		"--service-account-private-key-file", pki("service-account.key"), "--use-service-account-credentials=true",
		"--leader-elect=false", "--cert-dir", filepath.Join(c.dir, "controllers")); err != nil {
		return err
	}
	_, err = c.run("kube-scheduler", "--kubeconfig", pki("scheduler.kubeconfig"), "--bind-address=127.0.0.1",
		fmt.Sprint("--secure-port=", c.ports.scheduler), "--leader-elect=false", "--cert-dir", filepath.Join(c.dir, "scheduler"))
	return err
}

// startKubelet runs kubelet and waits until the node is ready.
func (c *cluster) startKubelet(ctx context.Context, endpoint string) error {
	config := filepath.Join(c.dir, "kubelet.yaml")
	resolv := filepath.Join(c.dir, "resolv.conf")
	if err := os.WriteFile(resolv, []byte("nameserver 127.0.0.1\n"), 0o644); err != nil {
		return err
	}
	if err := os.WriteFile(config, []byte(c.kubeletConfig(endpoint, resolv)), 0o644); err != nil {
		return err
	}
	var err error
	c.kubelet, err = c.run("kubelet", "--config", config, "--kubeconfig", c.ca.file("kubelet.kubeconfig"),
		"--hostname-override", nodeName, "--node-ip", c.nodeIP.String(), "--root-dir", c.root(),
		"--cert-dir", filepath.Join(c.dir, "kubelet-pki"), "-v", "2")
	if err != nil {
		return err
	}
	if err := c.kubeletHealthy(ctx); err != nil {
		return err
	}
	return c.nodeReady(ctx)
}

// kubeletHealthy waits until kubelet itself answers: the node's condition is
// still the old one for a while after a restart.
func (c *cluster) kubeletHealthy(ctx context.Context) error {
	return c.kubelet.until(ctx, time.Minute, func() error {
		return get(fmt.Sprintf("http://127.0.0.1:%d/healthz", c.ports.kubeletHealth))
	})
}

func (c *cluster) root() string { return filepath.Join(c.dir, "kubelet") }

// kubeletConfig leaves the cgroup driver out: kubelet has to learn it from the
// runtime.
func (c *cluster) kubeletConfig(endpoint, resolv string) string {
	return fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: %q
address: %q
port: %d
healthzPort: %d
readOnlyPort: 0
tlsCertFile: %q
tlsPrivateKeyFile: %q
authentication: {anonymous: {enabled: false}, webhook: {enabled: false}, x509: {clientCAFile: %q}}
authorization: {mode: AlwaysAllow}
failCgroupV1: false
failSwapOn: false
cgroupRoot: /%s
cgroupsPerQOS: true
enforceNodeAllocatable: [pods]
makeIPTablesUtilChains: false
resolvConf: %q
clusterDomain: cluster.local
clusterDNS: ["10.98.0.10"]
podLogsDir: %q
volumePluginDir: %q
staticPodPath: ""
syncFrequency: 5s
nodeStatusUpdateFrequency: 2s
containerLogMaxSize: 100Ki
containerLogMaxFiles: 3
containerLogMonitorInterval: 3s
evictionHard: {memory.available: 50Mi, nodefs.available: "1%%", imagefs.available: "1%%"}
oomScoreAdj: 0
maxPods: 100
registryPullQPS: 0
serializeImagePulls: false
`, endpoint, c.nodeIP.String(), c.ports.kubelet, c.ports.kubeletHealth, c.ca.file("kubelet-server.crt"),
		c.ca.file("kubelet-server.key"), c.ca.file("ca.crt"), c.cgroup, resolv,
		filepath.Join(c.dir, "pod-logs"), filepath.Join(c.dir, "volume-plugins"))
}

func (c *cluster) nodeReady(ctx context.Context) error {
	return c.kubelet.until(ctx, 2*time.Minute, func() error {
		out, err := c.kubectl(ctx, "get", "node", nodeName, "-o",
			`jsonpath={range .status.conditions[?(@.type=="Ready")]}{.status} {.reason} {.message}{end}`)
		if err == nil && !strings.HasPrefix(out, "True") {
			err = fmt.Errorf("node Ready: %s", out)
		}
		return err
	})
}

// kubectl runs a command as the administrator and returns its output.
func (c *cluster) kubectl(ctx context.Context, args ...string) (string, error) {
	return c.kubectlIn(ctx, "", args...)
}

// kubectlIn does so with standard input.
func (c *cluster) kubectlIn(ctx context.Context, stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 4*time.Minute)
	defer cancel()
	cmd := c.kubectlCommand(ctx, args...)
	if stdin != "" {
		cmd.Stdin = strings.NewReader(stdin)
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("kubectl %s: %w: %s%s", strings.Join(args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String(), nil
}

func (c *cluster) kubectlCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(c.bin, "kubectl"), append([]string{"--kubeconfig", c.admin}, args...)...)
	cmd.Env = append(os.Environ(), "HOME="+c.dir) // its cache
	return cmd
}

// close ends the cluster, the last started first, and deletes what it made.
// With KEEP=1 in the environment the folder with the logs stays.
func (c *cluster) close() error {
	var errs []error
	if c.metrics != nil {
		errs = append(errs, c.metrics.close())
	}
	for i := len(c.started) - 1; i >= 0; i-- {
		errs = append(errs, c.started[i].stop(syscall.SIGTERM))
	}
	if link, err := netlink.LinkByName(c.bridge); err == nil {
		errs = append(errs, netlink.LinkDel(link))
	}
	if os.Getenv("KEEP") != "" {
		fmt.Fprintln(os.Stderr, "kept", c.dir)
		return errors.Join(errs...)
	}
	errs = append(errs, c.unmountVolumes(), c.removeLogLinks(), os.RemoveAll(c.dir))
	return errors.Join(errs...)
}

// unmountVolumes detaches what kubelet mounted for pods that were not deleted.
func (c *cluster) unmountVolumes() error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var errs []error
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], c.dir+"/") {
			// One below another that was detached is gone with it.
			if err := unix.Unmount(f[4], unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("unmount %s: %w", f[4], err))
			}
		}
	}
	return errors.Join(errs...)
}

// removeLogLinks deletes kubelet's links to the log files of this cluster: their
// folder is the one path of kubelet that cannot be moved.
func (c *cluster) removeLogLinks() error {
	links, err := filepath.Glob("/var/log/containers/*.log")
	if err != nil {
		return err
	}
	var errs []error
	for _, l := range links {
		if target, err := os.Readlink(l); err == nil && strings.HasPrefix(target, c.dir+"/") {
			errs = append(errs, os.Remove(l))
		}
	}
	return errors.Join(errs...)
}

func get(url string) error {
	client := http.Client{Timeout: 5 * time.Second}
	resp, err := client.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, resp.Status)
	}
	return nil
}
