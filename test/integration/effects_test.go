package integration

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// ociSpec is what these tests read of a container's specification.
type ociSpec struct {
	Process struct {
		Env          []string
		SelinuxLabel string
		Rlimits      []struct {
			Type       string
			Soft, Hard uint64
		}
	}
	Mounts []struct {
		Destination, Source string
		Options             []string
	}
	Annotations map[string]string
	Linux       struct {
		CgroupsPath                string
		MaskedPaths, ReadonlyPaths []string
		Seccomp                    *struct{ DefaultAction string }
		Devices                    []struct {
			Path     string
			UID, GID uint32
		}
		Resources struct {
			BlockIO *struct{ Weight *uint16 }
			Memory  *struct{ Limit *int64 }
		}
	}
}

func (c *container) spec() ociSpec {
	c.pod.t.Helper()
	r, err := c.pod.n.Runtime.ContainerStatus(c.pod.t.Context(), &cri.ContainerStatusRequest{ContainerId: c.id, Verbose: true})
	if err != nil {
		c.pod.t.Fatal(err)
	}
	var info struct{ RuntimeSpec ociSpec }
	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil {
		c.pod.t.Fatal(err)
	}
	return info.RuntimeSpec
}

func save(t *testing.T, path, text string, mode os.FileMode) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	return path
}

// wrapped is an OCI runtime that notes its arguments.
func wrapped(t *testing.T, dir, name string) (program, log string) {
	t.Helper()
	real, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("needs %s: its arguments are looked at", name)
	}
	log = filepath.Join(dir, name+".log")
	return save(t, filepath.Join(dir, name), fmt.Sprintf("#!/bin/sh\necho \"$@\" >>%s\nexec %s \"$@\"\n", log, real), 0o755), log
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// changed is a configuration in which every key has another value than by
// default, as far as keys go together.
const changed = `version = 3

[metrics]
address = "%[2]s"

[plugins."io.containerd.service.v1.tasks-service"]
blockio_config_file = "%[1]s/blockio.yaml"

[plugins."io.containerd.grpc.v1.cri"]
enable_tls_streaming = true
stream_idle_timeout = "1m"

[plugins."io.containerd.cri.v1.runtime"]
max_container_log_line_size = 32
unset_seccomp_profile = "runtime/default"
tolerate_missing_hugetlb_controller = false
disable_hugetlb_controller = false
device_ownership_from_security_context = true
ignore_image_defined_volumes = true
netns_mounts_under_state_dir = false
enable_unprivileged_ports = false
enable_unprivileged_icmp = false
disable_proc_mount = true
drain_exec_sync_io_timeout = "1s"
cdi_spec_dirs = ["%[1]s/cdi"]

[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "noting"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.noting]
runtime_type = "io.containerd.runc.v2"
pod_annotations = ["example.com/*"]
container_annotations = ["device.example.com/?"]
privileged_without_host_devices = true
base_runtime_spec = "%[1]s/base.json"
cni_conf_dir = "%[1]s/net.d"
cni_max_conf_num = 1
treat_ro_mounts_as_rro = "IfPossible"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.noting.options]
BinaryName = "%[1]s/runc"
Root = "%[1]s/runc-root"
NoNewKeyring = true
NoPivotRoot = true
IoUid = 1001
IoGid = 1002

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.open]
runtime_type = "io.containerd.runc.v2"
privileged_without_host_devices = true
privileged_without_host_devices_all_devices_allowed = true
options = { BinaryName = "runc" }

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.untrusted]
runtime_type = "io.containerd.runc.v2"
options = { BinaryName = "runc" }

[cloister]
cdi_annotations = true
[cloister.handlers.noting]
ulimits = { nofile = "777:888" }
`

const effectNetwork = `{"cniVersion":"1.0.0","name":"own","plugins":[{"type":"bridge","bridge":"%s","isGateway":true,
"ipam":{"type":"host-local","dataDir":"%s/ipam","subnet":"10.231.77.0/24"}}]}`

// TestEffectsOfKeys shows what each key of the configuration does, on one
// daemon that has them all.
func TestEffectsOfKeys(t *testing.T) {
	needRoot(t)
	dir, err := os.MkdirTemp("/tmp", "cle")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	_, args := wrapped(t, dir, "runc")
	save(t, filepath.Join(dir, "base.json"), `{"ociVersion":"1.0.2","process":{"env":["FROM_BASE=1"]},"annotations":{"base":"yes"},
		"mounts":[{"destination":"/proc","type":"proc","source":"proc"},{"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["mode=755"]},
		{"destination":"/dev/pts","type":"devpts","source":"devpts","options":["newinstance","ptmxmode=0666","mode=0620","gid=5"]},
		{"destination":"/sys","type":"sysfs","source":"sysfs","options":["ro"]}]}`, 0o644)
	save(t, filepath.Join(dir, "cdi/v.json"), `{"cdiVersion":"0.5.0","kind":"vendor.com/dev","devices":[
		{"name":"one","containerEdits":{"env":["CDI_ONE=1"]}},{"name":"two","containerEdits":{"env":["CDI_TWO=1"]}}]}`, 0o644)
	save(t, filepath.Join(dir, "blockio.yaml"), "Classes:\n  slow:\n    - Weight: 40\n", 0o644)
	link := "cle" + filepath.Base(dir)[3:]
	link = link[:min(15, len(link))]
	save(t, filepath.Join(dir, "net.d/10.conflist"), fmt.Sprintf(effectNetwork, link, dir), 0o644)
	t.Cleanup(func() { _ = exec.Command("ip", "link", "delete", link).Run() }) // the bridge outlives its pods
	address := freePort(t)
	n := own(t, testnode.Options{Extra: fmt.Sprintf(changed, dir, address)})
	p := runPod(t, n, func(c *cri.PodSandboxConfig) {
		c.Annotations = map[string]string{"example.com/a": "1", "example.com/b/c": "2", "other": "3"}
		c.Linux.SecurityContext.Privileged = true
	})

	in := func(t *testing.T) *pod { return &pod{t, n, p.id, p.cfg} } // its errors are the part's
	t.Run("pod", func(t *testing.T) { effectsOnPod(t, n, in(t)) })
	t.Run("specification", func(t *testing.T) { effectsOnSpec(t, in(t), dir) })
	t.Run("running", func(t *testing.T) { effectsOnRunning(t, in(t), dir, args) })
	t.Run("devices", func(t *testing.T) { effectsOnDevices(t, n, in(t)) })
	t.Run("untrusted", func(t *testing.T) { effectsOfUntrusted(t, n) })
	t.Run("streaming", func(t *testing.T) { effectsOnStreams(t, in(t)) })
	t.Run("metrics", func(t *testing.T) { effectsOnMetrics(t, address) })
}

func effectsOnPod(t *testing.T, n *testnode.Node, p *pod) {
	st := p.status()
	if ip := st.Network.Ip; !strings.HasPrefix(ip, "10.231.77.") {
		t.Errorf("cni_conf_dir: address %s", ip)
	}
	r, err := n.Runtime.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	if err != nil || !strings.Contains(r.Info["info"], "/var/run/netns/cloister-"+p.id) {
		t.Errorf("netns_mounts_under_state_dir: %v, %.300s", err, r.GetInfo()["info"])
	}
	if _, err := os.Stat("/var/run/netns/cloister-" + p.id); err != nil {
		t.Errorf("netns_mounts_under_state_dir: %v", err)
	}
	gone := runPod(t, n)
	gone.remove()
	if _, err := os.Stat("/var/run/netns/cloister-" + gone.id); err == nil {
		t.Error("netns_mounts_under_state_dir: the pin of a removed pod is left")
	}
}

func effectsOnSpec(t *testing.T, p *pod, dir string) {
	ref := push(t, hostileImage(t, func(c *imageConfig) { c.Volumes = map[string]struct{}{"/vol": {}} }))
	if _, err := pull(t.Context(), p.n, ref); err != nil {
		t.Fatal(err)
	}
	c := p.create(ref, []string{"sh"}, func(c *cri.ContainerConfig) {
		c.Annotations = map[string]string{"device.example.com/1": "x", "device.example.com/12": "y", "cdi.k8s.io/v": "vendor.com/dev=two",
			"io.kubernetes.cri.blockio-class": "slow"}
		c.CDIDevices = []*cri.CDIDevice{{Name: "vendor.com/dev=one"}}
		c.Mounts = []*cri.Mount{{HostPath: dir, ContainerPath: "/ro", Readonly: true}}
		c.Linux.SecurityContext.MaskedPaths = []string{"/proc/one"}
		c.Linux.Resources = &cri.LinuxContainerResources{}
	})
	s := c.spec()
	for key, ok := range map[string]bool{
		"pod_annotations":       s.Annotations["example.com/a"] == "1" && s.Annotations["example.com/b/c"] == "" && s.Annotations["other"] == "",
		"container_annotations": s.Annotations["device.example.com/1"] == "x" && s.Annotations["device.example.com/12"] == "",
		"base_runtime_spec":     s.Annotations["base"] == "yes" && slices.ContainsFunc(s.Process.Env, prefixed("FROM_BASE=")),
		"cdi_spec_dirs":         slices.ContainsFunc(s.Process.Env, prefixed("CDI_ONE=")),
		"cdi_annotations":       slices.ContainsFunc(s.Process.Env, prefixed("CDI_TWO=")),
		"unset_seccomp_profile": s.Linux.Seccomp != nil && s.Linux.Seccomp.DefaultAction == "SCMP_ACT_ERRNO",
		"disable_proc_mount":    slices.Contains(s.Linux.MaskedPaths, "/proc/kcore") && slices.Contains(s.Linux.ReadonlyPaths, "/proc/sys"),
		"blockio_config_file":   s.Linux.Resources.BlockIO != nil && *s.Linux.Resources.BlockIO.Weight == 40,
		"ulimits":               len(s.Process.Rlimits) == 1 && s.Process.Rlimits[0].Soft == 777 && s.Process.Rlimits[0].Hard == 888,
	} {
		if !ok {
			t.Errorf("%s: %+v", key, s)
		}
	}
	want := "ro"
	if supports(t, p.n).RecursiveReadOnlyMounts {
		want = "rro"
	}
	for _, m := range s.Mounts {
		if m.Destination == "/ro" && !slices.Contains(m.Options, want) {
			t.Errorf("treat_ro_mounts_as_rro: %v, want %s", m.Options, want)
		}
		if m.Destination == "/vol" {
			t.Errorf("ignore_image_defined_volumes: %v", m)
		}
	}
	_, err := p.tryCreate(t.Context(), containerConfig(busybox, []string{"sh"}, func(c *cri.ContainerConfig) {
		c.Linux.Resources = &cri.LinuxContainerResources{HugepageLimits: []*cri.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}}}
	}))
	if _, absent := os.Stat("/sys/fs/cgroup/hugetlb"); absent != nil {
		wantError(t, err, codes.FailedPrecondition, "tolerate_missing_hugetlb_controller")
	}
}

func prefixed(p string) func(string) bool {
	return func(s string) bool { return strings.HasPrefix(s, p) }
}

func effectsOnRunning(t *testing.T, p *pod, dir, args string) {
	// Old versions of runc raise the limit of what is executed later.
	c := p.sh("echo limit $(ulimit -n); printf '%040d' 0; sleep 1000")
	c.waitLog("limit 777")
	// The runtime gives the streams to the container's user, not to its group.
	if got := c.run("stat -L -c %g /proc/1/fd/1"); got != "1002" {
		t.Errorf("IoGid: the container's output belongs to group %s", got)
	}
	if got := c.run("cat /proc/sys/net/ipv4/ip_unprivileged_port_start"); got != "1024" {
		t.Errorf("enable_unprivileged_ports: %s", got)
	}
	if got := strings.Fields(c.run("cat /proc/sys/net/ipv4/ping_group_range")); !slices.Equal(got, []string{"1", "0"}) {
		t.Errorf("enable_unprivileged_icmp: %v", got)
	}
	eventually(t, 10*time.Second, "the long line is in the log", func() bool {
		data, _ := os.ReadFile(c.logPath())
		return strings.Contains(string(data), " P "+strings.Repeat("0", 32)+"\n")
	})
	if _, err := os.Stat(filepath.Join(dir, "runc-root", c.id)); err != nil {
		t.Errorf("Root: %v", err)
	}
	start := time.Now()
	if _, err := c.execSync(30, "sh", "-c", "sleep 20 & echo started"); err != nil {
		t.Errorf("drain_exec_sync_io_timeout: %v", err)
	}
	if took := time.Since(start); took > 10*time.Second || took < time.Second {
		t.Errorf("drain_exec_sync_io_timeout: ExecSync took %v", took)
	}
	said, err := os.ReadFile(args)
	if err != nil {
		t.Fatal(err)
	}
	for _, word := range []string{"--no-new-keyring", "--no-pivot", "--root " + filepath.Join(dir, "runc-root")} {
		if !strings.Contains(string(said), word) {
			t.Errorf("the runtime was not told %s", word)
		}
	}
}

func effectsOnDevices(t *testing.T, n *testnode.Node, p *pod) {
	privileged := func(c *cri.ContainerConfig) {
		c.Linux.SecurityContext.Privileged = true
		c.Linux.SecurityContext.RunAsUser, c.Linux.SecurityContext.RunAsGroup = &cri.Int64Value{Value: 1234}, &cri.Int64Value{Value: 2345}
		c.Devices = []*cri.Device{{HostPath: "/dev/null", ContainerPath: "/dev/mine", Permissions: "rw"}}
	}
	s := p.create(busybox, []string{"sh"}, privileged).spec()
	if d := s.Linux.Devices; len(d) != 1 || d[0].Path != "/dev/mine" {
		t.Errorf("privileged_without_host_devices: %v", d)
	} else if d[0].UID != 1234 || d[0].GID != 2345 {
		t.Errorf("device_ownership_from_security_context: %v", d)
	}
	for handler, allowed := range map[string]bool{"noting": false, "open": true} {
		q := runHandlerPod(t, n, handler, func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
		c := q.sh("sleep 1000", func(c *cri.ContainerConfig) { c.Linux.SecurityContext.Privileged = true })
		// The memory of the kernel's log: nothing reads from it here.
		out := c.run("mknod /tmp/kmsg c 1 11 && (: </tmp/kmsg) 2>/dev/null && echo open || echo closed")
		if (out == "open") != allowed {
			t.Errorf("privileged_without_host_devices_all_devices_allowed with handler %s: the device is %s", handler, out)
		}
	}
}

func effectsOfUntrusted(t *testing.T, n *testnode.Node) {
	annotated := func(c *cri.PodSandboxConfig) {
		c.Annotations = map[string]string{"io.kubernetes.cri.untrusted-workload": "true"}
	}
	p := runPod(t, n, annotated)
	if ip := p.status().Network.Ip; strings.HasPrefix(ip, "10.231.77.") {
		t.Errorf("it ran on the default handler: address %s", ip)
	}
	run := func(handler string, opts ...podOption) error {
		r, err := n.Runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{RuntimeHandler: handler, Config: podConfig(n, t, append(opts, annotated)...)})
		if err == nil {
			(&pod{t, n, r.PodSandboxId, nil}).remove()
		}
		return err
	}
	if err := run("untrusted"); err != nil {
		t.Error(err)
	}
	wantError(t, run("open"), codes.InvalidArgument, "untrusted", "open")
	for name, set := range map[string]func(*cri.NamespaceOption){
		"network": func(o *cri.NamespaceOption) { o.Network = cri.NamespaceMode_NODE },
		"PID":     func(o *cri.NamespaceOption) { o.Pid = cri.NamespaceMode_NODE },
		"IPC":     func(o *cri.NamespaceOption) { o.Ipc = cri.NamespaceMode_NODE },
	} {
		err := run("", func(c *cri.PodSandboxConfig) { set(c.Linux.SecurityContext.NamespaceOptions) })
		wantError(t, err, codes.InvalidArgument, name)
	}
	_, err := here.node.Runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: podConfig(here.node, t, annotated)})
	wantError(t, err, codes.InvalidArgument, "untrusted", "runtimes")
}

func effectsOnStreams(t *testing.T, p *pod) {
	c := p.sh("sleep 1000")
	address, err := url.Parse(c.execURL(&cri.ExecRequest{Cmd: []string{"true"}, Stdout: true}))
	if err != nil || address.Scheme != "https" {
		t.Fatalf("enable_tls_streaming: %v, %v", address, err)
	}
	conn, err := tls.Dial("tcp", address.Host, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if name := conn.ConnectionState().PeerCertificates[0].Subject.CommonName; name != "cloister streaming" {
		t.Errorf("enable_tls_streaming: a certificate of %s", name)
	}
}

func effectsOnMetrics(t *testing.T, address string) {
	r, err := http.Get("http://" + address + "/v1/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`cloister_cri_calls_total{call="RunPodSandbox",code="InvalidArgument"}`, `cloister_cri_calls_total{call="StartContainer",code="OK"}`,
		`cloister_stage_seconds_count{object="pod_sandbox",stage="attaching_the_network"}`,
		`cloister_stage_seconds_count{object="container",stage="making_the_root_file_system"}`,
		`cloister_image_pull_seconds_count{result="ok"}`, `cloister_network_seconds_count{operation="attach",result="ok"}`,
		`cloister_shim_seconds_count{operation="start container",result="ok"}`, `cloister_pods{state="ready"} 1`, `cloister_handler_works{handler="noting"} 1`,
	} {
		if !strings.Contains(string(body), want) {
			t.Errorf("the metrics lack %s", want)
		}
	}
	health, err := http.Get("http://" + address + "/healthz")
	if err != nil {
		t.Fatal(err)
	}
	health.Body.Close()
	// The network of the default folder counts, and that is there.
	if health.StatusCode != http.StatusOK {
		t.Errorf("healthz: %s", health.Status)
	}
}

// TestEffectOfDisableCgroup runs a container outside of any cgroup of its own.
func TestEffectOfDisableCgroup(t *testing.T) {
	needRoot(t)
	dir, err := os.MkdirTemp("/tmp", "cle")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	program, args := wrapped(t, dir, "crun")
	n := own(t, testnode.Options{Handlers: map[string]string{"crun": program}, Default: "crun", Extra: "version = 3\n[cloister]\ndisable_cgroup = true\n"})
	p := runPod(t, n)
	c := p.sh("sleep 1000", func(c *cri.ContainerConfig) { c.Linux.Resources.MemoryLimitInBytes = 64 << 20 })
	if s := c.spec(); s.Linux.CgroupsPath != "" || s.Linux.Resources.Memory != nil {
		t.Errorf("specification: %+v", s.Linux)
	}
	for _, dirs := range []string{"/sys/fs/cgroup/*/cloister*/" + c.id, "/sys/fs/cgroup/*/" + c.id, "/sys/fs/cgroup/" + c.id} {
		if found, _ := filepath.Glob(dirs); len(found) > 0 {
			t.Errorf("there are cgroups %v", found)
		}
	}
	if said, err := os.ReadFile(args); err != nil || !strings.Contains(string(said), "--cgroup-manager=disabled") {
		t.Errorf("the runtime was told %s, %v", said, err)
	}
	c.stop(0)
	if st := c.status(); st.ExitCode != 137 {
		t.Errorf("ended with %d", st.ExitCode)
	}
	c.remove()
}

// TestEffectOfConfTemplate makes the network out of what kubelet tells.
func TestEffectOfConfTemplate(t *testing.T) {
	needRoot(t)
	dir, err := os.MkdirTemp("/tmp", "clt")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	link := filepath.Base(dir)
	link = link[:min(15, len(link))]
	t.Cleanup(func() { _ = exec.Command("ip", "link", "delete", link).Run() })
	save(t, filepath.Join(dir, "t"), fmt.Sprintf(`{"cniVersion":"1.0.0","name":"templ","plugins":[{"type":"bridge","bridge":%q,"isGateway":true,
		"ipam":{"type":"host-local","dataDir":"%s/ipam","ranges":[{{range $i, $r := .PodCIDRRanges}}{{if $i}},{{end}}[{"subnet":"{{$r}}"}]{{end}}],
		"routes":[{{range $i, $r := .Routes}}{{if $i}},{{end}}{"dst":"{{$r}}"}{{end}}]}}]}`, link, dir), 0o644)
	n := own(t, testnode.Options{})
	if err := n.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(n.Dir, "net.d", "10-test.conflist")); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(n.Dir, "config.toml")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const table = "[plugins.\"io.containerd.cri.v1.runtime\".cni]\n"
	text := strings.Replace(string(data), table, table+fmt.Sprintf("conf_template = %q\nip_pref = \"ipv6\"\n", filepath.Join(dir, "t")), 1)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	up := make(chan error, 1)
	go func() { up <- n.Run(t.Context()) }() // is ready when the network is
	update := func(cidr string) error {
		_, err := n.Runtime.UpdateRuntimeConfig(t.Context(), &cri.UpdateRuntimeConfigRequest{
			RuntimeConfig: &cri.RuntimeConfig{NetworkConfig: &cri.NetworkConfig{PodCidr: cidr}}})
		return err
	}
	eventually(t, 20*time.Second, "the daemon takes the node's ranges", func() bool { return update("10.232.78.0/24, fd13:78::/64") == nil })
	if err := <-up; err != nil {
		t.Fatal(err)
	}
	wantError(t, update("10.0.0.0"), codes.InvalidArgument, "pod_cidr")
	st := runPod(t, n).status()
	if !strings.HasPrefix(st.Network.Ip, "fd13:78::") || len(st.Network.AdditionalIps) != 1 || !strings.HasPrefix(st.Network.AdditionalIps[0].Ip, "10.232.78.") {
		t.Errorf("addresses %v", st.Network)
	}
}

// TestTracesOfAPod sends the spans of a pod to a collector.
func TestTracesOfAPod(t *testing.T) {
	needRoot(t)
	var mu sync.Mutex
	var got bytes.Buffer
	collector := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		_, _ = got.ReadFrom(r.Body)
	}))
	t.Cleanup(collector.Close)
	n := own(t, testnode.Options{Extra: fmt.Sprintf("version = 3\n[plugins.\"io.containerd.tracing.processor.v1.otlp\"]\nendpoint = %q\ninsecure = true\n", collector.URL)})
	runPod(t, n).sh("exit 0").ended()
	if err := n.Stop(t.Context()); err != nil { // sends what is left
		t.Fatal(err)
	}
	mu.Lock()
	for _, span := range []string{"runtime.v1.RuntimeService/RunPodSandbox", "make pod sandbox", "attaching the network", "make container", "writing the specification"} {
		if !bytes.Contains(got.Bytes(), []byte(span)) {
			t.Errorf("the collector got no span %q", span)
		}
	}
	mu.Unlock()
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
}
