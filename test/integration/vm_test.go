package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// machines is the daemon whose handler vm runs pods in virtual machines. Tests
// that share it leave it as it is.
func machines(t *testing.T) *testnode.Node {
	t.Helper()
	needRoot(t)
	here.machines.Do(func() {
		var guests string
		if guests, here.vmErr = guest(context.Background()); here.vmErr == nil {
			here.vm, here.vmErr = here.start(context.Background(), testnode.Options{Guests: guests})
		}
	})
	if here.vmErr != nil {
		t.Fatal(here.vmErr)
	}
	return here.vm
}

// ownMachines is such a daemon for a test that kills it.
func ownMachines(t *testing.T) *testnode.Node {
	t.Helper()
	needRoot(t)
	guests, err := guest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n, err := here.start(t.Context(), testnode.Options{Guests: guests})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of the daemon's log:\n%s", n.LogTail(40))
		}
		if err := closeNode(n); err != nil {
			t.Error(err)
		}
	})
	return n
}

// guest builds the guest once.
func guest(ctx context.Context) (string, error) {
	dir := filepath.Join(here.dir, "guests")
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	return testnode.BuildGuest(ctx, here.bin, dir)
}

func runMachine(t *testing.T, n *testnode.Node, opts ...podOption) *pod {
	t.Helper()
	return runHandlerPod(t, n, "vm", opts...)
}

// facts is what a container tells of itself, and then what a file of a volume
// holds whenever that changes.
const facts = `echo to stderr >&2
fact() { echo "$1: $2"; }
fact kernel "$(uname -r)"
fact greeting "$GREETING"
fact hostname "$(hostname)"
fact resolver "$(tr '\n' ' ' </etc/resolv.conf)"
fact sysctl "$(tr '\t' ' ' </proc/sys/net/ipv4/ip_local_port_range)"
fact address "$(ip -4 -o addr show eth0 | sed 's/.*inet \([0-9.]*\).*/\1/')"
fact memory "$(cat /sys/fs/cgroup/memory.max)"
fact processors "$(cat /sys/fs/cgroup/cpu.max)"
fact read-only "$(touch /ro/x 2>/dev/null || cat /ro/key)"
fact seccomp "$(grep Seccomp: /proc/self/status | tr -d '[:space:]')"
fact capability "$(mount -t tmpfs x /mnt 2>/dev/null || echo refused)"
fact shm "$(echo x >/dev/shm/x && cat /dev/shm/x)"
echo inside >/data/file
trap 'exit 7' TERM
while true; do
  now=$(cat /ro/..data/k 2>/dev/null)
  [ "$now" = "$last" ] || fact updated "$now"
  last=$now
  sleep 0.2
done`

// A pod in a virtual machine is a pod: other kernel, same everything else.
func TestMachine(t *testing.T) {
	n := machines(t)
	witness(t, n)
	check := noLeak(t, n)
	p := runMachine(t, n, func(c *cri.PodSandboxConfig) {
		c.Hostname = "inside"
		c.DnsConfig = &cri.DNSConfig{Servers: []string{"192.0.2.53"}, Searches: []string{"example.org"}}
		c.Linux.Sysctls = map[string]string{"net.ipv4.ip_local_port_range": "2000 3000"}
	})
	volume, readOnly := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(readOnly, "key"), []byte("held"), 0o644); err != nil {
		t.Fatal(err)
	}
	c := p.sh(facts, func(c *cri.ContainerConfig) {
		c.Envs = []*cri.KeyValue{{Key: "GREETING", Value: []byte("hello")}}
		c.Mounts = []*cri.Mount{{HostPath: volume, ContainerPath: "/data"}, {HostPath: readOnly, ContainerPath: "/ro", Readonly: true}}
		c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuPeriod: 100000, CpuQuota: 50000}
		c.Linux.SecurityContext.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}
	})
	c.waitLog("shm: ")
	c.waitLog("stderr F to stderr")
	told := c.log()
	for name, want := range map[string]string{
		"greeting": "hello", "hostname": "inside", "resolver": "search example.org nameserver 192.0.2.53 ", "sysctl": "2000 3000",
		"address": p.status().Network.Ip, "memory": strconv.Itoa(64 << 20), "processors": "50000 100000", "read-only": "held",
		"seccomp": "Seccomp:2", "capability": "refused", "shm": "x",
	} {
		if !strings.Contains(told, name+": "+want+"\n") {
			t.Errorf("the container does not tell %s: %q", name, want)
		}
	}
	var host syscall.Utsname
	if err := syscall.Uname(&host); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(told, "kernel: "+release(host)) {
		t.Error("the kernel is the node's")
	}
	if t.Failed() {
		t.Log(told)
	}
	eventually(t, time.Minute, "the node reads what the container wrote", func() bool {
		b, err := os.ReadFile(filepath.Join(volume, "file"))
		return err == nil && string(b) == "inside\n"
	})
	for i, content := range []string{"second", "third"} {
		update(t, readOnly, i, content)
		c.waitLog("updated: " + content)
	}
	execInMachine(t, c)
	c.stop(60)
	if st := c.status(); st.ExitCode != 7 {
		t.Errorf("exit code %d, not 7: %s", st.ExitCode, st.Message)
	}
	hog := p.create(busybox, []string{"sh", "-c", "tail -c 100m /dev/zero"}, func(c *cri.ContainerConfig) {
		c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 16 << 20}
	})
	hog.start()
	if st := hog.ended(); st.Reason != "OOMKilled" {
		t.Errorf("reason %q, exit code %d", st.Reason, st.ExitCode)
	}
	p.remove()
	check()
}

// execInMachine runs programs in a container beside its own, and asks for its
// figures.
func execInMachine(t *testing.T, c *container) {
	t.Helper()
	r, err := c.execSync(60, "sh", "-c", "echo out; echo err >&2; exit 5")
	if err != nil || r.ExitCode != 5 || string(r.Stdout) != "out\n" || string(r.Stderr) != "err\n" {
		t.Errorf("exec: %+v, %v", r, err)
	}
	if _, err := c.execSync(60, "/no/such/program"); err == nil || status.Code(err) == codes.DeadlineExceeded {
		t.Errorf("exec of a missing program: %v", err)
	}
	s, err := c.pod.n.Runtime.ContainerStats(t.Context(), &cri.ContainerStatsRequest{ContainerId: c.id})
	if err != nil || s.Stats.GetMemory().GetWorkingSetBytes().GetValue() == 0 || s.Stats.GetCpu().GetUsageCoreNanoSeconds().GetValue() == 0 {
		t.Errorf("statistics %v, %v", s, err)
	}
}

func release(u syscall.Utsname) string {
	var b []byte
	for _, c := range u.Release {
		if c == 0 {
			break
		}
		b = append(b, byte(c))
	}
	return string(b)
}

// update replaces a file of a volume as kubelet does, by a symlink that is
// renamed.
func update(t *testing.T, dir string, i int, content string) {
	t.Helper()
	version := filepath.Join(dir, fmt.Sprintf("..v%d", i))
	if err := errors.Join(os.Mkdir(version, 0o755), os.WriteFile(filepath.Join(version, "k"), []byte(content), 0o644),
		os.Symlink(filepath.Base(version), filepath.Join(dir, "..new")), os.Rename(filepath.Join(dir, "..new"), filepath.Join(dir, "..data"))); err != nil {
		t.Fatal(err)
	}
}

// What cannot be had in a virtual machine is refused at once, with the reason
// and the remedy, and leaves nothing.
func TestMachineRefuses(t *testing.T) {
	n := machines(t)
	witness(t, n)
	check := noLeak(t, n)
	for name, test := range map[string]struct {
		change podOption
		code   codes.Code
		words  []string
	}{
		"the node's network": {func(c *cri.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Network = cri.NamespaceMode_NODE
		}, codes.InvalidArgument, []string{"network", "runc"}},
		"the node's processes": {func(c *cri.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_NODE
		}, codes.InvalidArgument, []string{"pid", "runc"}},
		"the node's IPC": {func(c *cri.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Ipc = cri.NamespaceMode_NODE
		}, codes.InvalidArgument, []string{"ipc", "runc"}},
		"an annotation": {func(c *cri.PodSandboxConfig) {
			c.Annotations = map[string]string{"io.katacontainers.config.hypervisor.kernel": "/tmp/mine"}
		}, codes.PermissionDenied, []string{"enable_annotations"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := n.Runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: podConfig(n, t, test.change), RuntimeHandler: "vm"})
			wantError(t, err, test.code, test.words...)
		})
	}
	check()
}

// A guest that does not come up is refused with what it said last, and leaves
// nothing.
func TestMachineDoesNotComeUp(t *testing.T) {
	needRoot(t)
	guests, err := guest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	kernel := fmt.Sprintf("kernel = %q", filepath.Join(guests, "default", "kernel"))
	empty := filepath.Join(t.TempDir(), "initrd")
	if err := os.WriteFile(empty, make([]byte, 4096), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct{ options, words []string }{
		"no such kernel":           {[]string{`kernel = "/no/such/kernel"`, `initrd = "/no/such/initrd"`}, []string{"/no/such/"}},
		"no such guest":            {[]string{`guest = "nobody"`}, []string{"nobody", "cloister guest build"}},
		"a guest that panics":      {[]string{kernel, fmt.Sprintf("initrd = %q", empty)}, []string{"console", "Unable to mount root"}},
		"a guest that is silent":   {[]string{"boot_timeout = 1", `kernel_params = "rdinit=/bare"`}, []string{"boot_timeout"}},
		"a kernel without a timer": {[]string{`kernel_params = "nolapic_timer"`}, []string{"no timer", "busy"}},
		"a kernel without files":   {[]string{`kernel_params = "module_blacklist=virtiofs"`}, []string{"virtiofs"}},
		"no QEMU":                  {[]string{`path = "qemu-of-nobody"`}, []string{"qemu-of-nobody", "install"}},
		"no virtiofsd":             {[]string{`virtio_fs_daemon = "/no/virtiofsd"`}, []string{"/no/virtiofsd", "install"}},
	} {
		t.Run(name, func(t *testing.T) {
			n, err := testnode.Start(t.Context(), testnode.Options{Bin: here.bin, Hosts: here.hosts, Guests: guests, GuestOptions: test.options})
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := closeNode(n); err != nil {
					t.Error(err)
				}
			}()
			_, err = n.Runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: podConfig(n, t), RuntimeHandler: "vm"})
			if code := status.Code(err); code != codes.FailedPrecondition {
				t.Errorf("code %v", code)
			}
			for _, w := range test.words {
				if !strings.Contains(fmt.Sprint(err), w) {
					t.Errorf("the error does not name %q: %v", w, err)
				}
			}
			for _, pid := range n.Processes() {
				if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && (bytes.Contains(b, []byte("qemu")) || bytes.Contains(b, []byte("virtiofsd"))) {
					t.Errorf("%q is left", b)
				}
			}
		})
	}
}

// A machine that dies takes its containers along, says so, and nothing else.
func TestMachineDies(t *testing.T) {
	n := machines(t)
	witness(t, n)
	check := noLeak(t, n)
	p, other := runMachine(t, n), runMachine(t, n)
	victim, survivor := p.sh("sleep 1000"), other.sh("while true; do echo tick; sleep 0.2; done")
	survivor.waitLog("tick")
	began := time.Now()
	if err := syscall.Kill(qemuOf(t, n, p), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	st := victim.ended()
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("the end was told after %v", took)
	}
	if st.ExitCode != 137 || !strings.Contains(st.Message, "virtual machine") {
		t.Errorf("exit code %d, %s: %q", st.ExitCode, st.Reason, st.Message)
	}
	eventually(t, 5*time.Second, "the pod is not ready", func() bool {
		return p.status().State == cri.PodSandboxState_SANDBOX_NOTREADY
	})
	if st := survivor.status(); st.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the other machine's container is %v", st.State)
	}
	p.remove()
	other.remove()
	check()
}

// qemuOf finds the QEMU process of a pod.
func qemuOf(t *testing.T, n *testnode.Node, p *pod) int {
	t.Helper()
	for _, pid := range n.Processes() {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err == nil && bytes.Contains(b, []byte("qemu-system")) && bytes.Contains(b, []byte(p.id)) {
			return pid
		}
	}
	t.Fatalf("pod %s has no QEMU", p.id)
	return 0
}

// Lines that a pod in a virtual machine writes are in the log once each and in
// order, whatever is killed outside meanwhile, and its end is told.
func TestMachineOutlivesItsKeepers(t *testing.T) {
	n := ownMachines(t)
	p := runMachine(t, n)
	writer := p.sh("trap 'stop=1' TERM; i=0; while [ -z \"$stop\" ]; do echo line $i; i=$((i+1)); done; echo last $i; exit 9")
	writer.waitLog("line 10\n")
	for round := range 6 {
		if round%3 != 1 {
			killShim(t, n)
		}
		if round%3 != 0 {
			if err := n.Kill(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := n.Run(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		size := logSize(t, writer)
		eventually(t, time.Minute, "the log goes on", func() bool { return logSize(t, writer) > size })
	}
	if r, err := writer.execSync(60, "echo", "alive"); err != nil || string(r.Stdout) != "alive\n" {
		t.Errorf("exec after all that: %v, %v", r, err)
	}
	writer.stop(60)
	if st := writer.ended(); st.ExitCode != 9 {
		t.Errorf("exit code %d, %s %s", st.ExitCode, st.Reason, st.Message)
	}
	lines := strings.Split(strings.TrimSpace(writer.log()), "\n")
	for i, line := range lines[:len(lines)-1] {
		if line != "line "+strconv.Itoa(i) {
			t.Fatalf("line %d is %q", i, line)
		}
	}
	if want := fmt.Sprintf("last %d", len(lines)-1); lines[len(lines)-1] != want {
		t.Errorf("the last line is %q, want %q", lines[len(lines)-1], want)
	}
	t.Logf("%d lines", len(lines))
}

// The machine of a probe does not outlive the shim that probes.
func TestMachineOfAProbeEnds(t *testing.T) {
	n := ownMachines(t)
	probing := func() (pids []int) {
		for _, pid := range n.Processes() {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			if err == nil && bytes.Contains(b, []byte("qemu-system")) && bytes.Contains(b, []byte("guest=cloister.probe-")) {
				pids = append(pids, pid)
			}
		}
		return pids
	}
	// A daemon probes its handlers when it starts.
	if err := n.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	started := make(chan error, 1)
	go func() { started <- n.Run(t.Context()) }()
	eventually(t, time.Minute, "a machine is probed", func() bool { return len(probing()) > 0 })
	old := probing()
	killShim(t, n)
	eventually(t, time.Minute, "the machine of the probe is gone", func() bool {
		return !slices.ContainsFunc(probing(), func(pid int) bool { return slices.Contains(old, pid) })
	})
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	runMachine(t, n).remove()
	eventually(t, time.Minute, "no folder of a machine is left", func() bool {
		left, err := os.ReadDir(filepath.Join(n.State(), "shim", "vm", "m"))
		return err == nil && len(left) == 0
	})
}

func logSize(t *testing.T, c *container) int64 {
	t.Helper()
	info, err := os.Stat(c.logPath())
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

// killShim kills the shim of the virtual machines, which its keeper starts
// again.
func killShim(t *testing.T, n *testnode.Node) {
	t.Helper()
	dir := filepath.Join(n.State(), "shim", "vm")
	for _, pid := range n.Processes() {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		args := strings.Split(string(b), "\x00")
		if err == nil && len(args) > 3 && args[1] == "serve" && slices.Contains(args, dir) {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatal("no shim of virtual machines runs")
}

// Streams that a client holds.
func TestMachineStreams(t *testing.T) {
	p := runMachine(t, machines(t))
	for name, test := range map[string]func(*testing.T, *pod){
		"exec": execStreams, "exec with a terminal": execTerminalIsResized, "input once": stdinOnceEndsWithItsClient,
		"attach to a terminal": attachToATerminal, "forwarded port": portForward,
	} {
		t.Run(name, func(t *testing.T) { test(t, &pod{t, p.n, p.id, p.cfg}) })
	}
}
