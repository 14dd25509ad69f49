package external

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// TestStockContainerd: a containerd that was not made for it runs a pod in a
// virtual machine on Cloister's shim. STOCK_CONTAINERD is the folder of that
// containerd and of its CNI plugins; "make stock" builds them and runs this.
func TestStockContainerd(t *testing.T) {
	stock := os.Getenv("STOCK_CONTAINERD")
	if stock == "" {
		t.Skip("containerd takes minutes to build; make stock does so and runs this test")
	}
	ctx := t.Context()
	checkout, err := testnode.Checkout()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	bin, err := testnode.Build(ctx, checkout, filepath.Join(dir, "bin"))
	if err != nil {
		t.Fatal(err)
	}
	guests, err := testnode.BuildGuest(ctx, bin, filepath.Join(dir, "guests"))
	if err != nil {
		t.Fatal(err)
	}
	programs := filepath.Join(dir, "programs") // where containerd looks for shims
	if err := os.Mkdir(programs, 0o755); err != nil {
		t.Fatal(err)
	}
	links := map[string]string{"containerd": filepath.Join(stock, "containerd"), "containerd-shim-cloister-vm-v2": filepath.Join(bin, "cloister-shim")}
	for name, target := range links {
		if err := os.Symlink(target, filepath.Join(programs, name)); err != nil {
			t.Fatal(err)
		}
	}
	state, err := os.MkdirTemp("/tmp", "clstock") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(state)
	t.Setenv("CLOISTER_SHIM_STATE", state)
	defer endShims(t, bin, state)
	registry, err := testnode.StartRegistry(ctx, checkout)
	if err != nil {
		t.Fatal(err)
	}
	defer registry.Close()
	crictl, err := testnode.Crictl(ctx, checkout)
	if err != nil {
		t.Fatal(err)
	}
	node, err := testnode.Start(ctx, testnode.Options{Runtime: testnode.Containerd, Bin: programs, Hosts: registry.Hosts, CNIBin: filepath.Join(stock, "cni"),
		Guests: guests})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if t.Failed() {
			t.Log(node.LogTail(40))
		}
		if err := node.Close(); err != nil {
			t.Error(err)
		}
	}()
	m := stockNode{t, node, crictl, t.TempDir()}
	m.runPod()
}

// endShims ends the resident shim, which no containerd ends.
func endShims(t *testing.T, bin, state string) {
	dirs, err := filepath.Glob(filepath.Join(state, "*", "vm"))
	if err != nil || len(dirs) != 1 {
		t.Errorf("%d resident shims: %v", len(dirs), err)
	}
	for _, d := range dirs {
		out, err := exec.CommandContext(context.Background(), filepath.Join(bin, "cloister-shim"), "stop", "--state", d).CombinedOutput()
		if err != nil {
			log, _ := os.ReadFile(filepath.Join(d, "shim.log"))
			t.Errorf("end the resident shim: %v: %s\n%s", err, out, log)
		}
	}
}

type stockNode struct {
	t      *testing.T
	node   *testnode.Node
	crictl string
	dir    string
}

// run is a crictl command that has to work.
func (m stockNode) run(args ...string) string {
	m.t.Helper()
	cmd := exec.CommandContext(m.t.Context(), m.crictl, append([]string{"-r", m.node.Endpoint(), "-i", m.node.Endpoint(), "-t", "60s"}, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		m.t.Fatalf("crictl %s: %v: %s", strings.Join(args, " "), err, stderr.String())
	}
	return strings.TrimSpace(string(out))
}

func (m stockNode) write(name, text string) string {
	m.t.Helper()
	path := filepath.Join(m.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		m.t.Fatal(err)
	}
	return path
}

func (m stockNode) runPod() {
	const image = "registry.k8s.io/e2e-test-images/busybox:1.29-2"
	pod := m.write("pod.json", `{"metadata":{"name":"stock","uid":"stock","namespace":"default"},"log_directory":"`+m.dir+`","linux":{}}`)
	container := m.write("container.json", `{"metadata":{"name":"c"},"image":{"image":"`+image+`"},"command":["sh","-c","uname -r; sleep 1000"],"log_path":"c.log","linux":{}}`)
	m.run("pull", image)
	p := m.run("runp", "--runtime", "vm", pod)
	c := m.run("create", p, container, pod)
	m.run("start", c)
	host, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		m.t.Fatal(err)
	}
	got := m.run("exec", c, "uname", "-r")
	if got == "" || got == strings.TrimSpace(string(host)) {
		m.t.Errorf("the pod's kernel is %q, the host's %q", got, host)
	}
	logged(m.t, filepath.Join(m.dir, "c.log"), got)
	m.run("stop", "-t", "1", c)
	st, err := m.node.Runtime.ContainerStatus(m.t.Context(), &cri.ContainerStatusRequest{ContainerId: c})
	if err != nil || st.Status.ExitCode != 137 {
		m.t.Errorf("the stopped container is %v, %v", st.GetStatus(), err)
	}
	m.run("rm", c)
	m.run("stopp", p)
	m.run("rmp", p)
}
