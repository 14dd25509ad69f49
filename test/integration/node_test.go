package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// shared is the daemon of tests that leave it as it is. They run at the same
// time as others.
func shared(t *testing.T) *testnode.Node {
	t.Helper()
	needRoot(t)
	t.Parallel()
	return here.node
}

// own is a daemon for this test alone, which runs at the same time as others.
func own(t *testing.T, opts testnode.Options) *testnode.Node {
	t.Helper()
	needRoot(t)
	t.Parallel()
	n, err := here.start(t.Context(), opts)
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

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it runs real containers")
	}
}

func pull(ctx context.Context, n *testnode.Node, ref string) (string, error) {
	r, err := n.Image.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}})
	return r.GetImageRef(), err
}

// pod is a sandbox that is removed when its test ends.
type pod struct {
	t   *testing.T
	n   *testnode.Node
	id  string
	cfg *cri.PodSandboxConfig
}

type (
	podOption       func(*cri.PodSandboxConfig)
	containerOption func(*cri.ContainerConfig)
)

// serial makes names unique over all tests.
var serial atomic.Int64

func podConfig(n *testnode.Node, t *testing.T, opts ...podOption) *cri.PodSandboxConfig {
	name := fmt.Sprintf("%s-%d", strings.ToLower(strings.NewReplacer("/", "-", "_", "-", " ", "-").Replace(t.Name())), serial.Add(1))
	name = name[max(0, len(name)-60):]
	cfg := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Uid: name, Namespace: "integration"},
		LogDirectory: filepath.Join(n.Dir, "logs", name),
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent:    "/" + filepath.Base(n.Dir),
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}},
		},
	}
	for _, o := range opts {
		o(cfg)
	}
	return cfg
}

func runPod(t *testing.T, n *testnode.Node, opts ...podOption) *pod {
	t.Helper()
	return runHandlerPod(t, n, "", opts...)
}

func runHandlerPod(t *testing.T, n *testnode.Node, handler string, opts ...podOption) *pod {
	t.Helper()
	cfg := podConfig(n, t, opts...)
	r, err := n.Runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: cfg, RuntimeHandler: handler})
	if err != nil {
		t.Fatalf("run pod: %v", err)
	}
	p := &pod{t, n, r.PodSandboxId, cfg}
	t.Cleanup(p.remove)
	return p
}

// remove stops and removes the pod, which may be gone already.
func (p *pod) remove() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := p.n.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		p.t.Errorf("stop pod: %v", err)
	}
	if _, err := p.n.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		p.t.Errorf("remove pod: %v", err)
	}
}

func (p *pod) status() *cri.PodSandboxStatus {
	p.t.Helper()
	r, err := p.n.Runtime.PodSandboxStatus(p.t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: p.id})
	if err != nil {
		p.t.Fatalf("pod status: %v", err)
	}
	return r.Status
}

type container struct {
	pod *pod
	id  string
	cfg *cri.ContainerConfig
}

func containerConfig(image string, args []string, opts ...containerOption) *cri.ContainerConfig {
	name := fmt.Sprintf("c%d", serial.Add(1))
	cfg := &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: name},
		Image:    &cri.ImageSpec{Image: image},
		LogPath:  name + ".log",
		Linux:    &cri.LinuxContainerConfig{Resources: &cri.LinuxContainerResources{}, SecurityContext: &cri.LinuxContainerSecurityContext{}},
	}
	if image == demo {
		cfg.Args = args
	} else {
		cfg.Command = args
	}
	cfg.Linux.SecurityContext.NamespaceOptions = &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}
	for _, o := range opts {
		o(cfg)
	}
	return cfg
}

func (p *pod) tryCreate(ctx context.Context, cfg *cri.ContainerConfig) (*container, error) {
	r, err := p.n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.cfg})
	if err != nil {
		return nil, err
	}
	return &container{p, r.ContainerId, cfg}, nil
}

func (p *pod) create(image string, args []string, opts ...containerOption) *container {
	p.t.Helper()
	c, err := p.tryCreate(p.t.Context(), containerConfig(image, args, opts...))
	if err != nil {
		p.t.Fatalf("create container: %v", err)
	}
	return c
}

// sh runs a script in the busybox image.
func (p *pod) sh(script string, opts ...containerOption) *container {
	p.t.Helper()
	c := p.create(busybox, []string{"sh", "-c", script}, opts...)
	c.start()
	return c
}

// idle runs a container that does nothing, for scripts to run in.
func (p *pod) idle(opts ...containerOption) *container {
	p.t.Helper()
	return p.sh("sleep 1000", opts...)
}

// demo runs the demo program.
func (p *pod) demo(args ...string) *container {
	p.t.Helper()
	c := p.create(demo, args)
	c.start()
	return c
}

func (c *container) tryStart() error {
	_, err := c.pod.n.Runtime.StartContainer(c.pod.t.Context(), &cri.StartContainerRequest{ContainerId: c.id})
	return err
}

func (c *container) start() {
	c.pod.t.Helper()
	if err := c.tryStart(); err != nil {
		c.pod.t.Fatalf("start container: %v", err)
	}
}

func (c *container) stop(seconds int64) {
	c.pod.t.Helper()
	if _, err := c.pod.n.Runtime.StopContainer(c.pod.t.Context(), &cri.StopContainerRequest{ContainerId: c.id, Timeout: seconds}); err != nil {
		c.pod.t.Fatalf("stop container: %v", err)
	}
}

func (c *container) remove() {
	c.pod.t.Helper()
	if _, err := c.pod.n.Runtime.RemoveContainer(c.pod.t.Context(), &cri.RemoveContainerRequest{ContainerId: c.id}); err != nil {
		c.pod.t.Fatalf("remove container: %v", err)
	}
}

func (c *container) status() *cri.ContainerStatus {
	c.pod.t.Helper()
	r, err := c.pod.n.Runtime.ContainerStatus(c.pod.t.Context(), &cri.ContainerStatusRequest{ContainerId: c.id})
	if err != nil {
		c.pod.t.Fatalf("container status: %v", err)
	}
	return r.Status
}

// ended waits until the container has exited.
func (c *container) ended() *cri.ContainerStatus {
	c.pod.t.Helper()
	var st *cri.ContainerStatus
	eventually(c.pod.t, time.Minute, "container "+c.id+" ends", func() bool {
		st = c.status()
		return st.State == cri.ContainerState_CONTAINER_EXITED
	})
	return st
}

// log is what the container wrote, without the framing of the log file.
func (c *container) log() string {
	c.pod.t.Helper()
	data, err := os.ReadFile(c.logPath())
	if err != nil {
		c.pod.t.Fatal(err)
	}
	var out strings.Builder
	for line := range strings.Lines(string(data)) {
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		if len(fields) != 4 || fields[1] != "stdout" && fields[1] != "stderr" || fields[2] != "F" && fields[2] != "P" {
			c.pod.t.Fatalf("%s: %q is no log line", c.logPath(), line)
		}
		out.WriteString(fields[3])
		if fields[2] == "F" {
			out.WriteByte('\n')
		}
	}
	return out.String()
}

func (c *container) logPath() string { return filepath.Join(c.pod.cfg.LogDirectory, c.cfg.LogPath) }

// waitLog waits until the container has written text.
func (c *container) waitLog(text string) {
	c.pod.t.Helper()
	eventually(c.pod.t, time.Minute, fmt.Sprintf("the log says %q", text), func() bool {
		data, err := os.ReadFile(c.logPath())
		return err == nil && strings.Contains(string(data), text)
	})
}

func (c *container) execSync(seconds int64, cmd ...string) (*cri.ExecSyncResponse, error) {
	return c.pod.n.Runtime.ExecSync(c.pod.t.Context(), &cri.ExecSyncRequest{ContainerId: c.id, Cmd: cmd, Timeout: seconds})
}

// run gives the output of a script in the container, which must succeed.
func (c *container) run(script string) string {
	c.pod.t.Helper()
	r, err := c.execSync(20, "sh", "-c", script)
	if err != nil {
		c.pod.t.Fatalf("exec %q: %v", script, err)
	}
	if r.ExitCode != 0 {
		c.pod.t.Fatalf("exec %q ended with %d: %s%s", script, r.ExitCode, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(string(r.Stdout))
}

// says runs scripts and compares what each says.
func (c *container) says(want map[string]string) {
	c.pod.t.Helper()
	for script, want := range want {
		if got := c.run(script); got != want {
			c.pod.t.Errorf("%s: %q, not %q", script, got, want)
		}
	}
}

// restart ends the daemon without warning and starts the next one.
func restart(t *testing.T, n *testnode.Node) {
	t.Helper()
	endWith(t, n, n.Kill)
}

// endWith ends the daemon and starts the next one.
func endWith(t *testing.T, n *testnode.Node, end func(context.Context) error) {
	t.Helper()
	if err := end(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// eventually asks every 10 ms, for things that send no event.
func eventually(t *testing.T, limit time.Duration, what string, true func() bool) {
	t.Helper()
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !true() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("after %v it is still not so that %s", limit, what)
		}
	}
}

// wantError checks an error's code and that its text names every one of words.
func wantError(t *testing.T, err error, code codes.Code, words ...string) {
	t.Helper()
	st, _ := status.FromError(err)
	if err == nil || st.Code() != code {
		t.Errorf("got code %v, want %v: %.300s", st.Code(), code, st.Message())
		return
	}
	for _, w := range words {
		if !strings.Contains(strings.ToLower(st.Message()), strings.ToLower(w)) {
			t.Errorf("the error does not name %q: %.300s", w, st.Message())
		}
	}
	if strings.Contains(st.Message(), "\n") || len(st.Message()) > 5000 {
		t.Errorf("the error is no single sentence: %d bytes: %.300q", len(st.Message()), st.Message())
	}
}

// wantOneOf is wantError where two codes are right.
func wantOneOf(t *testing.T, err error, allowed []codes.Code, words ...string) {
	t.Helper()
	for _, c := range allowed {
		if status.Code(err) == c {
			wantError(t, err, c, words...)
			return
		}
	}
	wantError(t, err, allowed[0], words...)
}

func statusOf(n *testnode.Node, id string) (string, error) {
	r, err := n.Runtime.ContainerStatus(context.Background(), &cri.ContainerStatusRequest{ContainerId: id})
	return fmt.Sprintf("%v %d", r.GetStatus().GetState(), r.GetStatus().GetStartedAt()), err
}

// cgroupOf gives the folder of the container's cgroup, of the controller where
// there is one hierarchy for each.
func cgroupOf(t *testing.T, c *container, controller string) string {
	t.Helper()
	for _, pattern := range []string{"/sys/fs/cgroup/" + controller + "/", "/sys/fs/cgroup/"} {
		dirs, _ := filepath.Glob(pattern + filepath.Base(c.pod.n.Dir) + "/" + c.id + "*")
		if len(dirs) == 1 {
			return dirs[0]
		}
	}
	t.Fatalf("container %s has no cgroup", c.id)
	return ""
}

func limit(t *testing.T, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.Context(), d)
}
