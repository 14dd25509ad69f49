// Package external runs pods on containerd-shim-runc-v2, built from its module,
// as a handler of a private daemon, and looks whether everything that a pod on
// the resident shim can do works there too, and whether anything is left.
package external

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// image is a busybox with a shell.
const image = "docker.io/library/busybox:latest"

// handler is the name of the handler under test.
const handler = "ext"

type machine struct {
	*testnode.Node
	crictl, shim string
}

// start builds what the tests need and runs a private daemon with the resident
// handler runc and the external one, and further configuration.
func start(t *testing.T, extra string) machine {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it runs real containers")
	}
	ctx := t.Context()
	if err := testnode.Need(ctx, "runc", "runc", "the shim under test runs it"); err != nil {
		t.Fatal(err)
	}
	checkout, err := testnode.Checkout()
	if err != nil {
		t.Fatal(err)
	}
	built, err := testnode.RuncShim(ctx, checkout)
	if err != nil {
		t.Fatal(err)
	}
	shim := filepath.Join(t.TempDir(), filepath.Base(built)) // a part of the test breaks it
	if out, err := exec.CommandContext(ctx, "cp", built, shim).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
	crictl, err := testnode.Crictl(ctx, checkout)
	if err != nil {
		t.Fatal(err)
	}
	bin, err := testnode.Build(ctx, checkout, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	reg, err := testnode.StartRegistry(ctx, checkout)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := reg.Close(); err != nil {
			t.Error(err)
		}
	})
	n, err := testnode.Start(ctx, testnode.Options{Bin: bin, Hosts: reg.Hosts, LogLevel: os.Getenv("LOG_LEVEL"),
		Handlers: map[string]string{"runc": "runc"}, Default: "runc", Shims: map[string]string{handler: shim}, Extra: extra})
	if err != nil {
		t.Fatal(err)
	}
	m := machine{n, crictl, shim}
	t.Cleanup(m.removeCgroups)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of the daemon's log:\n%s", n.LogTail(80))
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	if _, err := n.Image.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: image}}); err != nil {
		t.Fatal(err)
	}
	return m
}

// pod is a sandbox on the external shim.
type pod struct {
	m   machine
	id  string
	cfg *cri.PodSandboxConfig
}

func (m machine) podConfig(name string) *cri.PodSandboxConfig {
	return &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Uid: name, Namespace: "external"},
		LogDirectory: filepath.Join(m.Dir, "logs", name),
		Linux: &cri.LinuxPodSandboxConfig{CgroupParent: m.cgroup(),
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}}},
	}
}

func (m machine) run(ctx context.Context, cfg *cri.PodSandboxConfig) (pod, error) {
	r, err := m.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: cfg, RuntimeHandler: handler})
	if err != nil {
		return pod{}, fmt.Errorf("run pod %s: %w", cfg.Metadata.Name, err)
	}
	return pod{m, r.PodSandboxId, cfg}, nil
}

func (m machine) mustRun(t *testing.T, name string) pod {
	t.Helper()
	p, err := m.run(t.Context(), m.podConfig(name))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// log is where the container called name writes.
func (p pod) log(name string) string { return filepath.Join(p.cfg.LogDirectory, name+".log") }

// script is a container that runs a shell script.
func script(name, text string) *cri.ContainerConfig {
	return &cri.ContainerConfig{Metadata: &cri.ContainerMetadata{Name: name}, Image: &cri.ImageSpec{Image: image},
		Command: []string{"sh", "-c", text}, LogPath: name + ".log", Linux: &cri.LinuxContainerConfig{
			SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}}}}
}

// start runs a container.
func (p pod) start(ctx context.Context, cfg *cri.ContainerConfig) (string, error) {
	c, err := p.m.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: p.id, SandboxConfig: p.cfg, Config: cfg})
	if err != nil {
		return "", fmt.Errorf("create container %s: %w", cfg.Metadata.Name, err)
	}
	if _, err := p.m.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: c.ContainerId}); err != nil {
		return "", fmt.Errorf("start container %s: %w", cfg.Metadata.Name, err)
	}
	return c.ContainerId, nil
}

func (p pod) mustStart(t *testing.T, cfg *cri.ContainerConfig) string {
	t.Helper()
	id, err := p.start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// remove stops and removes the pod.
func (p pod) remove(ctx context.Context) error {
	if _, err := p.m.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		return fmt.Errorf("stop pod: %w", err)
	}
	if _, err := p.m.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		return fmt.Errorf("remove pod: %w", err)
	}
	return nil
}

func (p pod) mustRemove(t *testing.T) {
	t.Helper()
	if err := p.remove(t.Context()); err != nil {
		t.Error(err)
	}
}

func (m machine) status(t *testing.T, id string) *cri.ContainerStatus {
	t.Helper()
	r, err := m.Runtime.ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		t.Fatal(err)
	}
	return r.Status
}

// until asks again and again, for what sends no event, until it is so.
func until(t *testing.T, what string, so func() bool) {
	t.Helper()
	if !comesTrue(so) {
		t.Fatalf("in 30 seconds it did not come true that %s", what)
	}
}

func comesTrue(so func() bool) bool {
	deadline := time.Now().Add(30 * time.Second)
	for !so() {
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(10 * time.Millisecond)
	}
	return true
}

// ended waits until the container has exited.
func (m machine) ended(t *testing.T, id string) *cri.ContainerStatus {
	t.Helper()
	var st *cri.ContainerStatus
	until(t, "container "+id+" has ended", func() bool {
		st = m.status(t, id)
		return st.State == cri.ContainerState_CONTAINER_EXITED
	})
	return st
}

// logged waits until the log holds line, as text of a complete entry.
func logged(t *testing.T, path, line string) {
	t.Helper()
	until(t, fmt.Sprintf("%s says %q", path, line), func() bool {
		data, err := os.ReadFile(path)
		return err == nil && strings.Contains(string(data), " F "+line+"\n")
	})
}

func (m machine) execSync(t *testing.T, id string, cmd ...string) *cri.ExecSyncResponse {
	t.Helper()
	r, err := m.Runtime.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: id, Cmd: cmd, Timeout: 20})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (m machine) command(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, m.crictl, append([]string{"--config", "/dev/null", "--runtime-endpoint", m.Endpoint()}, args...)...)
}

// client runs crictl with in as its input and gives what it said.
func (m machine) client(ctx context.Context, in io.Reader, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	cmd := m.command(ctx, args...)
	cmd.Stdin = in
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("crictl %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), err
}

// terminalClient runs crictl on a terminal of its own.
func (m machine) terminalClient(t *testing.T, in string, args ...string) (string, error) {
	t.Helper()
	master, slave := terminal(t)
	defer master.Close()
	if _, err := master.WriteString(in); err != nil {
		t.Fatal(err)
	}
	cmd := m.command(t.Context(), args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	err := cmd.Start()
	slave.Close()
	if err != nil {
		t.Fatal(err)
	}
	// Reading fails when the last process closes the terminal.
	out, _ := io.ReadAll(master)
	return string(out), cmd.Wait()
}

// terminal makes a terminal.
func terminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if slave, err = os.OpenFile(fmt.Sprint("/dev/pts/", n), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	return master, slave
}
