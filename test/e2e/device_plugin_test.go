package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cloister.dev/test/testnode"
)

// The resources that the test offers: the names of the plugin for TrustZone that came before, and a
// simulation of the size that it allowed.
const (
	teeRAM      = "huawei.com/tee-ram"
	simRAM      = "cloister.sim/tee-ram"
	teeUnits    = "2896" // (2 GiB - 600 MiB) / 512 KiB
	simUnits    = "220k" // as Kubernetes writes 220,000
	plainImage  = "registry.k8s.io/e2e-test-images/busybox:1.29-2"
	kubeletDir  = "/var/lib/kubelet"
	ownMountEnv = "E2E_OWN_MOUNTS"
)

// TestDevicePlugin runs in mount namespaces of its own: the folder in which
// kubelet meets device plugins cannot be moved, and must not be the machine's.
func TestDevicePlugin(t *testing.T) {
	if os.Getenv("E2E") == "" {
		t.Skip("starts a whole cluster as root: test/e2e/run does that")
	}
	if os.Getenv("RUNTIME_ENDPOINT") != "" {
		t.Skip("the runtime is not ours: it does not see this test's mounts")
	}
	if os.Getenv(ownMountEnv) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestDevicePlugin$", "-test.v", "-test.timeout=25m")
		cmd.Env = append(os.Environ(), ownMountEnv+"=1")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
		if err := cmd.Run(); err != nil {
			t.Fatal(err)
		}
		return
	}
	for _, dir := range []string{filepath.Join(kubeletDir, "device-plugins"), "/var/run/cdi"} {
		hide(t, dir)
	}
	d := &devices{bed: startBed(t)}
	d.prepare(t)
	d.must(t, "wait", "serviceaccount/default", "--for=create", "--timeout=60s")
	for _, s := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"allocatable", d.allocatable},
		{"pod gets devices and mounts", d.podGets},
		{"pod that asks for more stays pending", d.podPends},
		{"status", d.status},
		{"health loss and recovery", d.health},
		{"ten restarts of kubelet", d.kubeletRestarts},
		{"kills of the plugin", d.pluginKills},
		{"SGX", d.sgx},
		{"as a DaemonSet", d.daemonSet},
		{"inside the daemon", d.insideDaemon},
	} {
		if !t.Run(s.name, s.run) {
			t.Logf("plugin: %s", d.plugin.tail(20))
			t.Logf("kubelet: %s", d.kubelet.tail(5))
		}
		if !d.kubelet.running() {
			t.Fatal("kubelet has ended, there is nothing to test on")
		}
	}
}

// hide lays an empty folder over one of the machine's, in our namespace.
func hide(t *testing.T, dir string) {
	own, err := os.MkdirTemp("/tmp", "cld")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(own, dir, "", unix.MS_BIND, ""); err != nil {
		t.Fatalf("mount %s: %v", dir, err)
	}
	t.Cleanup(func() {
		if err := errors.Join(unix.Unmount(dir, unix.MNT_DETACH), os.RemoveAll(own)); err != nil {
			t.Error(err)
		}
	})
}

// devices is a cluster with a device plugin.
type devices struct {
	*bed
	work   string // the stand-in TEE: its library, script, devices
	config string
	plugin *process
}

// prepare builds the stand-in TEE and starts the plugin.
func (d *devices) prepare(t *testing.T) {
	checkout, err := testnode.Checkout()
	if err != nil {
		t.Fatal(err)
	}
	if err := testnode.Need(t.Context(), "cc", "gcc", "the stand-in for a vendor's TEE client library"); err != nil {
		t.Fatal(err)
	}
	bin, err := testnode.Build(t.Context(), checkout, filepath.Join(t.TempDir(), "bin"))
	if err != nil {
		t.Fatal(err)
	}
	d.work = filepath.Join(d.dir, "tee")
	if err := os.MkdirAll(filepath.Join(d.work, "teecd"), 0o755); err != nil {
		t.Fatal(err)
	}
	source := filepath.Join(checkout, "internal/tee/teec/teectest/libteec.c.txt")
	if out, err := exec.Command("cc", "-x", "c", "-shared", "-fPIC", "-o", filepath.Join(d.work, "libteec.so"), source).CombinedOutput(); err != nil {
		t.Fatalf("cc: %v: %s", err, out)
	}
	for _, name := range []string{"tc_ns_cvm", "teelog"} {
		if err := unix.Mknod(filepath.Join(d.work, name), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))); err != nil {
			t.Fatal(err)
		}
	}
	d.say(t, "unit=1")
	t.Setenv("STANDIN", filepath.Join(d.work, "script"))
	d.config = filepath.Join(d.work, "config.toml")
	text := fmt.Sprintf("version = 3\nroot = %q\nstate = %q\n", filepath.Join(d.work, "root"), filepath.Join(d.work, "state")) + d.table(false)
	if err := os.WriteFile(d.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	d.plugin = &process{name: "device-plugin", log: filepath.Join(d.dir, "plugin.log"),
		args: []string{filepath.Join(bin, "cloister"), "device-plugin", "run", "--config", d.config, "-precision", "512", "-internal", "1"}}
	if err := d.plugin.start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closing(t, func() error { return d.plugin.stop(syscall.SIGTERM) }) })
}

// table is [device_plugin] of the configuration.
func (d *devices) table(enabled bool) string {
	at := func(name string) string { return filepath.Join(d.work, name) }
	return fmt.Sprintf(`
[device_plugin]
enabled = %v
backends = ["trustzone", "sim"]
health_interval = "1s"
kubeconfig = %q
node_name = %q
[device_plugin.trustzone]
library = %q
devices = [%q, %q]
folders = [%q]
[device_plugin.sim]
memory = 112640000
fault_file = %q
`, enabled, d.ca.file("kubelet.kubeconfig"), nodeName, at("libteec.so"), at("tc_ns_cvm"), at("teelog"), at("teecd"), at("fault"))
}

func (d *devices) say(t *testing.T, script string) {
	t.Helper()
	fresh := filepath.Join(d.work, "script.new")
	if err := errors.Join(os.WriteFile(fresh, []byte(script), 0o600), os.Rename(fresh, filepath.Join(d.work, "script"))); err != nil {
		t.Fatal(err)
	}
}

// offers waits until the node's status tells a number of units.
func (d *devices) offers(t *testing.T, resource, units string, limit time.Duration) time.Duration {
	t.Helper()
	path := "jsonpath={.status.allocatable." + strings.ReplaceAll(resource, ".", `\.`) + "}"
	start := time.Now()
	eventually(t, limit, func() error {
		out, err := d.kubectl(t.Context(), "get", "node", nodeName, "-o", path)
		if err == nil && out != units {
			err = fmt.Errorf("%s is %q, want %q", resource, out, units)
		}
		return err
	})
	return time.Since(start).Round(100 * time.Millisecond)
}

func (d *devices) allocatable(t *testing.T) {
	t.Logf("%s units of %s allocatable after %v", teeUnits, teeRAM, d.offers(t, teeRAM, teeUnits, 60*time.Second))
	t.Logf("%s units of %s allocatable after %v more", simUnits, simRAM, d.offers(t, simRAM, simUnits, 60*time.Second))
	eventually(t, 20*time.Second, func() error {
		return want(d.must(t, "get", "node", nodeName, "-o", "jsonpath={.metadata.labels.teetype}"), "trustzone")
	})
	if out := d.must(t, "get", "events", "-A", "--field-selector", "reason=TEEHealthy", "-o", "jsonpath={.items[*].message}"); !strings.Contains(out, teeRAM) {
		t.Errorf("events of the node: %q", out)
	}
}

// pod makes a pod that asks for units.
func (d *devices) pod(t *testing.T, name, resource, units string) {
	t.Helper()
	text := fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %s, labels: {keep: "tee"}}, spec: {terminationGracePeriodSeconds: 1, containers: [
  {name: main, image: %q, command: [sh, -c, "trap 'exit 0' TERM; while :; do sleep 1; done"], resources: {limits: {%s: "%s"}}}]}}`, name, plainImage, resource, units)
	if _, err := d.kubectlIn(t.Context(), text, "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
}

func (d *devices) podGets(t *testing.T) {
	start := time.Now()
	d.pod(t, "ta", teeRAM, "10")
	d.pod(t, "sim", simRAM, "3")
	d.must(t, "wait", "pod/ta", "pod/sim", "--for=condition=Ready", "--timeout=90s")
	t.Logf("both pods ready after %v", time.Since(start).Round(100*time.Millisecond))
	dev := filepath.Join(d.work, "tc_ns_cvm")
	if out := d.must(t, "exec", "ta", "--", "sh", "-c", "ls -l "+dev+" && head -c 4 "+dev+" | wc -c && echo x > "+dev); !strings.Contains(out, "1,   5") || !strings.Contains(out, "4") {
		t.Errorf("the device in the pod: %s", out)
	}
	mounted := d.must(t, "exec", "ta", "--", "grep", filepath.Join(d.work, "teecd"), "/proc/self/mounts")
	if !strings.Contains(mounted, " ro,") || strings.Count(mounted, "\n") != 1 {
		t.Errorf("teecd's folder in the pod: %q", mounted)
	}
	if out := d.must(t, "exec", "sim", "--", "sh", "-c", "echo $CLOISTER_TEE"); out != "sim\n" {
		t.Errorf("environment of the simulated one: %q", out)
	}
	if _, err := d.kubectl(t.Context(), "exec", "sim", "--", "ls", dev); err == nil {
		t.Error("a pod that did not ask has the device")
	}
}

func (d *devices) podPends(t *testing.T) {
	d.pod(t, "greedy", teeRAM, "2890") // 10 of 2896 are taken
	eventually(t, 30*time.Second, func() error {
		return want(d.must(t, "get", "pod", "greedy", "-o", "jsonpath={.status.phase} {.status.conditions[0].message}"), "Insufficient "+teeRAM)
	})
	d.must(t, "delete", "pod", "greedy", "--timeout=30s")
}

func (d *devices) status(t *testing.T) {
	out, err := exec.Command(d.plugin.args[0], "device-plugin", "status", "--config", d.config, "--kubelet-dir", d.root(), "-o", "json").Output()
	if err != nil {
		t.Fatal(err)
	}
	var s struct {
		Endpoints []struct {
			Resource               string
			Registered             bool
			Streams, Listed, Bytes int
		}
		Uses []struct {
			Pod, Resource string
			Units         int
		}
	}
	if err := json.Unmarshal(out, &s); err != nil {
		t.Fatal(err)
	}
	used := map[string]int{}
	for _, u := range s.Uses {
		used[u.Pod+" "+u.Resource] = u.Units
	}
	if used["ta "+teeRAM] != 10 || used["sim "+simRAM] != 3 {
		t.Errorf("who holds what: %v", s.Uses)
	}
	for _, e := range s.Endpoints {
		if !e.Registered || e.Streams != 1 {
			t.Errorf("endpoint: %+v", e)
		}
	}
}

func (d *devices) health(t *testing.T) {
	d.say(t, "unit=1 fail=TEEC_InitializeContext:ffff000e:0")
	t.Logf("loss of the TEE's daemon: nothing allocatable after %v", d.offers(t, teeRAM, "0", 30*time.Second))
	d.offers(t, simRAM, simUnits, 5*time.Second) // the other one is well
	d.say(t, "unit=1")
	t.Logf("recovery: allocatable after %v", d.offers(t, teeRAM, teeUnits, 60*time.Second))
	if err := os.Rename(filepath.Join(d.work, "teelog"), filepath.Join(d.work, "lost")); err != nil {
		t.Fatal(err)
	}
	t.Logf("loss of a device node: nothing allocatable after %v", d.offers(t, teeRAM, "0", 30*time.Second))
	if err := os.Rename(filepath.Join(d.work, "lost"), filepath.Join(d.work, "teelog")); err != nil {
		t.Fatal(err)
	}
	d.offers(t, teeRAM, teeUnits, 60*time.Second)
	d.say(t, "unit=1 hang=TEEC_OpenSession")
	t.Logf("library that hangs: nothing allocatable after %v", d.offers(t, teeRAM, "0", 60*time.Second))
	d.say(t, "unit=1")
	d.offers(t, teeRAM, teeUnits, 60*time.Second)
}

// unharmed tells whether the pods are those of before.
func (d *devices) unharmed(t *testing.T, before podState) {
	t.Helper()
	after := d.state(t, "keep=tee")
	if fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("pods were %v and are %v", before, after)
	}
}

func (d *devices) kubeletRestarts(t *testing.T) {
	before := d.state(t, "keep=tee")
	for n := range 10 {
		sig := syscall.SIGKILL
		if n%2 == 1 {
			sig = syscall.SIGTERM
		}
		if err := d.kubelet.stop(sig); err != nil {
			t.Fatal(err)
		}
		if err := d.kubelet.start(); err != nil {
			t.Fatal(err)
		}
		if err := d.kubeletHealthy(t.Context()); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		d.registered(t)
		again := time.Since(start).Round(100 * time.Millisecond)
		d.offers(t, simRAM, simUnits, 60*time.Second)
		t.Logf("restart %d (%v): registered %v after kubelet is healthy, allocatable after %v", n+1, sig, again, d.offers(t, teeRAM, teeUnits, 60*time.Second)+again)
		d.unharmed(t, before)
	}
	d.pod(t, "after", teeRAM, "5")
	d.must(t, "wait", "pod/after", "--for=condition=Ready", "--timeout=90s")
	d.must(t, "delete", "pod", "after", "--timeout=30s")
}

// registered waits until the plugin says that kubelet watches both resources.
func (d *devices) registered(t *testing.T) {
	t.Helper()
	eventually(t, 30*time.Second, func() error {
		// An unhealthy resource makes the command fail and still print.
		out, _ := exec.Command(d.plugin.args[0], "device-plugin", "status", "--config", d.config, "-o", "wide").Output()
		if n := strings.Count(string(out), "registered   "); n != 2 {
			return fmt.Errorf("%d registered:\n%s", n, out)
		}
		return nil
	})
}

func (d *devices) pluginKills(t *testing.T) {
	before := d.state(t, "keep=tee")
	for range 3 {
		if err := d.plugin.stop(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		gone := d.offers(t, teeRAM, "0", 60*time.Second)
		if err := d.plugin.start(); err != nil {
			t.Fatal(err)
		}
		t.Logf("plugin killed: nothing allocatable after %v, started again: allocatable after %v", gone, d.offers(t, teeRAM, teeUnits, 60*time.Second))
		d.unharmed(t, before)
	}
}

func (d *devices) insideDaemon(t *testing.T) {
	before := d.state(t, "keep=tee")
	if err := d.plugin.stop(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	d.offers(t, teeRAM, "0", 60*time.Second)
	f, err := os.OpenFile(filepath.Join(d.node.Dir, "config.toml"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(d.table(true)); err != nil {
		t.Fatal(err)
	}
	f.Close()
	ctx := context.WithoutCancel(t.Context())
	if err := errors.Join(d.node.Stop(ctx), d.node.Run(ctx)); err != nil {
		t.Fatal(err)
	}
	t.Logf("daemon restarted with the plugin inside: allocatable after %v", d.offers(t, teeRAM, teeUnits, 60*time.Second))
	d.unharmed(t, before)
	d.pod(t, "inside", teeRAM, "5")
	d.must(t, "wait", "pod/inside", "--for=condition=Ready", "--timeout=90s")
}

// sgx shows a plugin a machine with SGX. Bytes of EPC go into the node's status
// by the API server, as kubelet takes no device for each byte.
func (d *devices) sgx(t *testing.T) {
	const node = "/sys/devices/system/node"
	file := filepath.Join(d.work, "sgx.toml")
	text := fmt.Sprintf("version = 3\nroot = %q\nstate = %q\n[device_plugin]\nhealth_interval = \"1s\"\nkubeconfig = %q\nnode_name = %q\n",
		filepath.Join(d.work, "sgx-root"), filepath.Join(d.work, "sgx-state"), d.ca.file("kubelet.kubeconfig"), nodeName)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	script := strings.Join([]string{
		"mount -t tmpfs tmpfs " + node, "mkdir -p " + node + "/node0/x86 " + node + "/node1/x86",
		"echo 67108864 >" + node + "/node0/x86/sgx_total_bytes", "echo 33554432 >" + node + "/node1/x86/sgx_total_bytes",
		"mount -t tmpfs tmpfs /dev", "mknod /dev/null c 1 3", "mknod /dev/sgx_enclave c 1 5", "mknod /dev/sgx_provision c 1 5",
		"exec " + d.plugin.args[0] + " device-plugin run --config " + file,
	}, " && ")
	p := &process{name: "sgx-plugin", log: filepath.Join(d.dir, "sgx.log"), args: []string{"unshare", "--mount", "sh", "-c", script}}
	if err := p.start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		closing(t, func() error { return p.stop(syscall.SIGTERM) })
		if t.Failed() {
			t.Log(p.tail(20))
		}
	}()
	d.offers(t, "sgx.intel.com/enclave", "110", 60*time.Second)
	d.offers(t, "sgx.intel.com/provision", "110", 60*time.Second)
	t.Logf("EPC of both NUMA nodes allocatable after %v more", d.offers(t, "sgx.intel.com/epc", "100663296", 60*time.Second))
	d.pod(t, "epc", "sgx.intel.com/epc", "64Mi")
	d.must(t, "wait", "pod/epc", "--for=condition=Ready", "--timeout=60s")
	d.pod(t, "epc2", "sgx.intel.com/epc", "64Mi")
	eventually(t, 30*time.Second, func() error {
		return want(d.must(t, "get", "pod", "epc2", "-o", "jsonpath={.status.phase} {.status.conditions[0].message}"), "Insufficient sgx.intel.com/epc")
	})
	d.must(t, "delete", "pod", "epc", "epc2", "--timeout=60s")
}

// daemonSet runs the plugin in a pod without privileges, from the manifest that
// the program prints. The program comes from the host: there is no image of it.
func (d *devices) daemonSet(t *testing.T) {
	if err := d.plugin.stop(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	d.offers(t, simRAM, "0", 60*time.Second)
	out, err := exec.Command(d.plugin.args[0], "device-plugin", "manifest", "--backend", "sim", "--image", plainImage, "--precision", "1024").Output()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.kubectlIn(t.Context(), string(out), "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	const name = "daemonset/cloister-device-plugin-sim"
	patch := fmt.Sprintf(`{"spec":{"template":{"spec":{"containers":[{"name":"device-plugin","volumeMounts":[{"name":"program","mountPath":"/cloister","readOnly":true}]}],
"volumes":[{"name":"program","hostPath":{"path":%q,"type":"File"}}]}}}}`, d.plugin.args[0])
	d.must(t, "-n", "kube-system", "patch", name, "-p", patch)
	d.must(t, "label", "node", nodeName, "tee.cloister.dev/sim=true", "--overwrite")
	t.Logf("a pod without privileges offers after %v", d.offers(t, simRAM, "64", 90*time.Second))
	d.pod(t, "from-daemonset", simRAM, "2")
	d.must(t, "wait", "pod/from-daemonset", "--for=condition=Ready", "--timeout=60s")
	d.must(t, "delete", "pod", "from-daemonset", "--timeout=60s")
	d.must(t, "-n", "kube-system", "delete", name, "--timeout=60s")
	if err := d.plugin.start(); err != nil {
		t.Fatal(err)
	}
	d.offers(t, simRAM, simUnits, 60*time.Second)
}
