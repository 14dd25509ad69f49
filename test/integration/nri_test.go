package integration

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// plugin is an NRI plugin that notes what it is told. A hook may be set for an
// event before the plugin starts; what it returns is the plugin's answer.
type plugin struct {
	mu     sync.Mutex
	events []string // EVENT ID
	pods   []*api.PodSandbox
	seen   map[string]*api.Container // as they were in CreateContainer
	synced []string                  // containers of Synchronize
	ready  chan struct{}
	hooks  map[string]func(id string) error
	adjust func(*api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate)
	sync   func()
	stub   stub.Stub
}

func (p *plugin) note(event, id string) error {
	p.mu.Lock()
	p.events = append(p.events, event+" "+id)
	hook := p.hooks[event]
	p.mu.Unlock()
	if hook != nil {
		return hook(id)
	}
	return nil
}

func (p *plugin) of(id string) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []string
	for _, e := range p.events {
		if event, of, _ := strings.Cut(e, " "); of == id {
			all = append(all, event)
		}
	}
	return all
}

func (p *plugin) Synchronize(_ context.Context, pods []*api.PodSandbox, containers []*api.Container) ([]*api.ContainerUpdate, error) {
	p.mu.Lock()
	p.pods = pods
	for _, c := range containers {
		p.synced = append(p.synced, c.Id)
	}
	p.mu.Unlock()
	if p.sync != nil {
		p.sync()
	}
	close(p.ready)
	return nil, nil
}

func (p *plugin) RunPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	p.mu.Lock()
	p.pods = append(p.pods, pod)
	p.mu.Unlock()
	return p.note("RunPod", pod.Id)
}

func (p *plugin) UpdatePodSandbox(_ context.Context, pod *api.PodSandbox, _, _ *api.LinuxResources) error {
	return p.note("UpdatePod", pod.Id)
}

func (p *plugin) PostUpdatePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.note("PostUpdatePod", pod.Id)
}

func (p *plugin) StopPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.note("StopPod", pod.Id)
}

func (p *plugin) RemovePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	return p.note("RemovePod", pod.Id)
}

func (p *plugin) CreateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	p.mu.Lock()
	p.seen[c.Id] = c
	p.mu.Unlock()
	if err := p.note("Create", c.Id); err != nil {
		return nil, nil, err
	}
	if p.adjust == nil {
		return nil, nil, nil
	}
	a, u := p.adjust(c)
	return a, u, nil
}

func (p *plugin) PostCreateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.note("PostCreate", c.Id)
}

func (p *plugin) StartContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.note("Start", c.Id)
}

func (p *plugin) PostStartContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.note("PostStart", c.Id)
}

func (p *plugin) UpdateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container, _ *api.LinuxResources) ([]*api.ContainerUpdate, error) {
	return nil, p.note("Update", c.Id)
}

func (p *plugin) PostUpdateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.note("PostUpdate", c.Id)
}

func (p *plugin) StopContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) ([]*api.ContainerUpdate, error) {
	return nil, p.note("Stop", c.Id)
}

func (p *plugin) RemoveContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.note("Remove", c.Id)
}

// connect starts the plugin and waits until it knows what is there.
func connect(t *testing.T, n *testnode.Node, index string, set ...func(*plugin)) *plugin {
	t.Helper()
	p := begin(t, n, index, set...)
	select {
	case <-p.ready:
	case <-time.After(10 * time.Second):
		t.Fatal("the plugin is not ready after 10 s")
	}
	return p
}

// begin starts the plugin.
func begin(t *testing.T, n *testnode.Node, index string, set ...func(*plugin)) *plugin {
	t.Helper()
	p := &plugin{ready: make(chan struct{}), seen: map[string]*api.Container{}, hooks: map[string]func(string) error{}}
	for _, s := range set {
		s(p)
	}
	var err error
	p.stub, err = stub.New(p, stub.WithPluginName("test"), stub.WithPluginIdx(index), stub.WithSocketPath(filepath.Join(n.State(), "nri.sock")),
		stub.WithOnClose(func() {}))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer close(done)
		if err := p.stub.Run(ctx); err != nil && ctx.Err() == nil {
			t.Errorf("the plugin ended: %v", err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return p
}

func (p *plugin) on(event string, hook func(id string) error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hooks[event] = hook
}

// once fails the first call.
func once() func(string) error {
	var o sync.Once
	return func(string) (err error) {
		o.Do(func() { err = errors.New("induced failure") })
		return err
	}
}

// barrier is a hook that waits; it tells the id that reached it.
func barrier(t *testing.T) (hook func(string) error, reached <-chan string, open func()) {
	at, gate := make(chan string, 1), make(chan struct{})
	var o, c sync.Once
	open = func() { c.Do(func() { close(gate) }) }
	t.Cleanup(open)
	return func(id string) error {
		o.Do(func() { at <- id })
		<-gate
		return nil
	}, at, open
}

// patient gives plugins time, so that a barrier is no failure.
const patient = `version = 3
[plugins."io.containerd.nri.v1.nri"]
plugin_request_timeout = "20s"
`

func TestNRIEventsOfAPod(t *testing.T) {
	n := own(t, testnode.Options{Extra: patient})
	p := connect(t, n, "10")
	pod := runPod(t, n)
	c := pod.sh("sleep 1000")
	if _, err := n.Runtime.UpdateContainerResources(t.Context(), &cri.UpdateContainerResourcesRequest{ContainerId: c.id,
		Linux: &cri.LinuxContainerResources{CpuShares: 100}}); err != nil {
		t.Fatal(err)
	}
	c.stop(0)
	c.remove()
	want := []string{"Create", "PostCreate", "Start", "PostStart", "Update", "PostUpdate", "Stop", "Remove"}
	if got := p.of(c.id); !slices.Equal(got, want) {
		t.Errorf("container: %v, want %v", got, want)
	}
	seen := p.seen[c.id]
	if seen.Name != c.cfg.Metadata.Name || seen.PodSandboxId != pod.id || !slices.Contains(seen.Args, "sleep 1000") || seen.Linux.GetCgroupsPath() == "" {
		t.Errorf("plugins see %v", seen)
	}
	failing := pod.sh("exit 3")
	eventually(t, 10*time.Second, "the end of a container that ended by itself is told", func() bool { return slices.Contains(p.of(failing.id), "Stop") })
	update := &cri.UpdatePodSandboxResourcesRequest{PodSandboxId: pod.id, Resources: &cri.LinuxContainerResources{CpuShares: 512}}
	p.on("UpdatePod", once())
	_, err := n.Runtime.UpdatePodSandboxResources(t.Context(), update)
	wantError(t, err, codes.FailedPrecondition, "induced failure", "UpdatePodSandbox")
	if _, err := n.Runtime.UpdatePodSandboxResources(t.Context(), update); err != nil {
		t.Error(err)
	}
	for range 2 {
		if _, err := n.Runtime.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: pod.id}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := n.Runtime.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: pod.id}); err != nil {
		t.Fatal(err)
	}
	want = []string{"RunPod", "UpdatePod", "UpdatePod", "PostUpdatePod", "StopPod", "RemovePod"}
	if got := p.of(pod.id); !slices.Equal(got, want) {
		t.Errorf("pod: %v, want %v", got, want)
	}
	if sb := p.pods[len(p.pods)-1]; sb.Name != pod.cfg.Metadata.Name || sb.Namespace != "integration" || len(sb.Ips) == 0 {
		t.Errorf("plugins see %v", sb)
	}
}

// What is being made is nobody's before its plugins agree.
func TestNRIHoldsWhatIsNotMade(t *testing.T) {
	n := own(t, testnode.Options{Extra: patient})
	p := connect(t, n, "10")
	hook, reached, open := barrier(t)
	p.on("RunPod", hook)
	cfg := podConfig(n, t)
	made := make(chan error, 1)
	var id string
	go func() {
		r, err := n.Runtime.RunPodSandbox(context.Background(), &cri.RunPodSandboxRequest{Config: cfg})
		id = r.GetPodSandboxId()
		made <- err
	}()
	at := <-reached
	list, err := n.Runtime.ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{})
	if err != nil || len(list.Items) != 0 {
		t.Errorf("listed: %v, %v", list.GetItems(), err)
	}
	early := &pod{t, n, at, cfg}
	if _, err := early.tryCreate(t.Context(), containerConfig(busybox, []string{"sh"})); err == nil {
		t.Error("a container in a pod that is not made")
	}
	open()
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	if id != at {
		t.Errorf("plugins were told of %s, the pod is %s", at, id)
	}
	ready := &pod{t, n, id, cfg}
	t.Cleanup(ready.remove)

	hook, reached, open = barrier(t)
	p.on("Create", hook)
	go func() {
		_, err := ready.tryCreate(context.Background(), containerConfig(busybox, []string{"sh"}))
		made <- err
	}()
	at = <-reached
	containers, err := n.Runtime.ListContainers(t.Context(), &cri.ListContainersRequest{})
	if err != nil || len(containers.Containers) != 0 {
		t.Errorf("listed: %v, %v", containers.GetContainers(), err)
	}
	if _, err := statusOf(n, at); err == nil {
		t.Error("a container that is not made has a status")
	}
	open()
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	p.on("Create", nil)

	c := ready.sh("sleep 1000")
	hook, reached, open = barrier(t)
	p.on("StopPod", hook)
	go func() {
		_, err := n.Runtime.StopPodSandbox(context.Background(), &cri.StopPodSandboxRequest{PodSandboxId: id})
		made <- err
	}()
	<-reached
	if st := c.status(); st.State != cri.ContainerState_CONTAINER_EXITED {
		t.Errorf("at the end of the pod its container is %v", st.State)
	}
	ready.status()
	open()
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	if _, err := ready.tryCreate(t.Context(), containerConfig(busybox, []string{"sh"})); err == nil {
		t.Error("a container in a stopped pod")
	}
}

// A plugin's refusal leaves nothing, and the next attempt may succeed.
func TestNRIRefusals(t *testing.T) {
	n := own(t, testnode.Options{Extra: patient})
	p := connect(t, n, "10")
	p.on("RunPod", once())
	cfg := podConfig(n, t)
	_, err := n.Runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: cfg})
	wantError(t, err, codes.FailedPrecondition, "induced failure", "RunPodSandbox")
	if list, err := n.Runtime.ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{}); err != nil || len(list.Items) != 0 {
		t.Errorf("left: %v, %v", list.GetItems(), err)
	}
	r, err := n.Runtime.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: cfg})
	if err != nil {
		t.Fatal(err)
	}
	made := &pod{t, n, r.PodSandboxId, cfg}
	t.Cleanup(made.remove)

	p.on("Create", once())
	config := containerConfig(busybox, []string{"sleep", "1000"})
	_, err = made.tryCreate(t.Context(), config)
	wantError(t, err, codes.FailedPrecondition, "induced failure", "CreateContainer")
	if list, err := n.Runtime.ListContainers(t.Context(), &cri.ListContainersRequest{}); err != nil || len(list.Containers) != 0 {
		t.Errorf("left: %v, %v", list.GetContainers(), err)
	}
	c, err := made.tryCreate(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	p.on("Start", once())
	wantError(t, c.tryStart(), codes.FailedPrecondition, "induced failure", "StartContainer")
	if st := c.status(); st.State != cri.ContainerState_CONTAINER_EXITED || st.Reason != "StartError" {
		t.Errorf("after a refused start: %v %s", st.State, st.Reason)
	}
}

// A plugin that joins hears of each container once, however the two meet.
func TestNRISynchronization(t *testing.T) {
	n := own(t, testnode.Options{Extra: patient})
	made := runPod(t, n)
	before := made.sh("sleep 1000")
	hook, reached, open := barrier(t)
	p := begin(t, n, "20", func(p *plugin) { p.sync = func() { _ = hook("sync") } })
	<-reached
	const many = 4
	var ids sync.Map
	var all sync.WaitGroup
	for range many {
		all.Go(func() {
			c, err := made.tryCreate(context.Background(), containerConfig(busybox, []string{"sleep", "1000"}))
			if err != nil {
				t.Error(err)
				return
			}
			ids.Store(c.id, true)
		})
	}
	open()
	all.Wait()
	<-p.ready
	if !slices.Contains(p.synced, before.id) || len(p.pods) != 1 || p.pods[0].Id != made.id {
		t.Errorf("synchronized with containers %v, pods %v", p.synced, p.pods)
	}
	for id := range ids.Range {
		told := slices.Contains(p.of(id.(string)), "Create")
		if slices.Contains(p.synced, id.(string)) == told {
			t.Errorf("container %s: synchronized and told are both %v", id, told)
		}
	}
}

// Plugins change a container before it is made, in the order of their indices,
// and the resources of others.
func TestNRIAdjustments(t *testing.T) {
	n := own(t, testnode.Options{Extra: patient})
	made := runPod(t, n)
	other := made.sh("sleep 1000")
	var order []string
	adjust := func(index string) func(*plugin) {
		return func(p *plugin) {
			p.adjust = func(c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) {
				order = append(order, index)
				a := &api.ContainerAdjustment{}
				a.AddEnv("FROM_"+index, index)
				if index == "30" {
					return a, nil
				}
				a.AddAnnotation("plugin", index)
				a.AddMount(&api.Mount{Source: "tmpfs", Destination: "/from-plugin", Type: "tmpfs", Options: []string{"size=64k"}})
				a.SetLinuxCPUShares(321)
				a.AddRlimit("RLIMIT_NOFILE", 4321, 1234)
				u := &api.ContainerUpdate{}
				u.SetContainerId(other.id)
				u.SetLinuxCPUShares(77)
				return a, []*api.ContainerUpdate{u}
			}
		}
	}
	connect(t, n, "30", adjust("30"))
	connect(t, n, "10", adjust("10"))
	c := made.sh("sleep 1000")
	if got := c.run("echo $FROM_10 $FROM_30; ulimit -n; grep -c from-plugin /proc/mounts"); got != "10 30\n1234\n1" {
		t.Errorf("the container says %q", got)
	}
	if !slices.Equal(order, []string{"10", "30"}) {
		t.Errorf("plugins were asked in the order %v", order)
	}
	if got := setting(t, c, "cpu", "cpu.shares", "cpu.weight"); got != "321" && got != "13" {
		t.Errorf("shares of the adjusted container: %s", got)
	}
	if got := setting(t, other, "cpu", "cpu.shares", "cpu.weight"); got != "77" && got != "3" {
		t.Errorf("shares of the updated container: %s", got)
	}
}

// What the configuration keeps plugins from is refused.
func TestNRIValidator(t *testing.T) {
	n := own(t, testnode.Options{Extra: patient + `[plugins."io.containerd.nri.v1.nri".default_validator]
enable = true
reject_oci_hook_adjustment = true
`})
	made := runPod(t, n)
	connect(t, n, "10", func(p *plugin) {
		p.adjust = func(*api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate) {
			a := &api.ContainerAdjustment{}
			a.AddHooks(&api.Hooks{CreateRuntime: []*api.Hook{{Path: "/bin/true", Args: []string{"true"}}}})
			return a, nil
		}
	})
	_, err := made.tryCreate(t.Context(), containerConfig(busybox, []string{"sh"}))
	wantError(t, err, codes.FailedPrecondition, "hook")
}

// Turned off there is no socket, and a daemon beside others has one of its own.
func TestNRIDisabled(t *testing.T) {
	n := own(t, testnode.Options{Extra: "version = 3\n[plugins.\"io.containerd.nri.v1.nri\"]\ndisable = true\n"})
	if found, _ := filepath.Glob(filepath.Join(n.State(), "nri*")); len(found) > 0 {
		t.Errorf("there is %v", found)
	}
}
