package plugin

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	v1beta1 "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

// kubelet does what kubelet's device manager does to plugins: it empties its
// folder when it starts, calls back inside Register, keeps one stream a
// resource, and never comes back to a plugin by itself.
type kubelet struct {
	v1beta1.UnimplementedRegistrationServer
	dir string

	mu        sync.Mutex // guards what follows
	server    *grpc.Server
	plugins   map[string]*pluginConn // by resource
	registers int
	changed   chan struct{}
	refuse    error
	sweep     bool // empty the folder when the next registration comes, as a start does
	running   sync.WaitGroup
}

type pluginConn struct {
	conn    *grpc.ClientConn
	client  v1beta1.DevicePluginClient
	cancel  context.CancelFunc
	options *v1beta1.DevicePluginOptions
	lists   int
	devices []*v1beta1.Device // nil when the stream is gone
}

func newKubelet(dir string) *kubelet {
	return &kubelet{dir: dir, plugins: map[string]*pluginConn{}, changed: make(chan struct{})}
}

func (k *kubelet) start(t testing.TB) {
	t.Helper()
	if err := k.tryStart(); err != nil {
		t.Fatal(err)
	}
}

func (k *kubelet) tryStart() error {
	if err := os.MkdirAll(k.dir, 0o750); err != nil {
		return err
	}
	entries, err := os.ReadDir(k.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Type()&os.ModeSocket != 0 {
			if err := os.Remove(filepath.Join(k.dir, e.Name())); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
	}
	lis, err := net.Listen("unix", filepath.Join(k.dir, "kubelet.sock"))
	if err != nil {
		return err
	}
	lis.(*net.UnixListener).SetUnlinkOnClose(false) // a killed kubelet leaves its socket, too
	g := grpc.NewServer()
	v1beta1.RegisterRegistrationServer(g, k)
	k.mu.Lock()
	k.server = g
	k.mu.Unlock()
	k.running.Go(func() { _ = g.Serve(lis) })
	return nil
}

func (k *kubelet) stop() {
	k.mu.Lock()
	g, plugins := k.server, k.plugins
	k.server, k.plugins = nil, map[string]*pluginConn{}
	k.mu.Unlock()
	if g != nil {
		g.Stop()
	}
	for _, p := range plugins {
		p.cancel()
		p.conn.Close()
	}
	k.running.Wait()
}

// news tells those who wait; k.mu is held.
func (k *kubelet) news() {
	close(k.changed)
	k.changed = make(chan struct{})
}

func (k *kubelet) Register(ctx context.Context, r *v1beta1.RegisterRequest) (*v1beta1.Empty, error) {
	k.mu.Lock()
	k.registers++
	refuse, sweep := k.refuse, k.sweep
	k.sweep = false
	k.news()
	k.mu.Unlock()
	if refuse != nil {
		return nil, refuse
	}
	if sweep { // kubelet looks for the plugin's socket for ten seconds
		_ = os.Remove(filepath.Join(k.dir, r.Endpoint))
		select {
		case <-ctx.Done():
		case <-time.After(10 * time.Second):
		}
		return nil, context.DeadlineExceeded
	}
	if r.Version != v1beta1.Version || filepath.Base(r.Endpoint) != r.Endpoint {
		return nil, errors.New("bad request")
	}
	conn, err := grpc.NewClient("unix://"+filepath.Join(k.dir, r.Endpoint), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	if err != nil {
		return nil, err
	}
	client := v1beta1.NewDevicePluginClient(conn)
	options, err := client.GetDevicePluginOptions(ctx, &v1beta1.Empty{})
	if err != nil {
		conn.Close()
		return nil, err
	}
	watch, cancel := context.WithCancel(context.Background())
	p := &pluginConn{conn: conn, client: client, cancel: cancel, options: options}
	k.mu.Lock()
	old := k.plugins[r.ResourceName]
	if k.server == nil {
		k.mu.Unlock()
		cancel()
		conn.Close()
		return nil, errors.New("stopping")
	}
	k.plugins[r.ResourceName] = p
	k.running.Add(1)
	k.mu.Unlock()
	if old != nil {
		old.cancel()
		old.conn.Close()
	}
	go k.watch(watch, p)
	return &v1beta1.Empty{}, nil
}

func (k *kubelet) watch(ctx context.Context, p *pluginConn) {
	defer k.running.Done()
	stream, err := p.client.ListAndWatch(ctx, &v1beta1.Empty{})
	for err == nil {
		var r *v1beta1.ListAndWatchResponse
		if r, err = stream.Recv(); err == nil {
			k.mu.Lock()
			p.devices, p.lists = r.Devices, p.lists+1
			if p.devices == nil {
				p.devices = []*v1beta1.Device{}
			}
			k.news()
			k.mu.Unlock()
		}
	}
	k.mu.Lock()
	p.devices = nil
	k.news()
	k.mu.Unlock()
}

// healthy counts the healthy units of a resource; -1 means that kubelet has no list.
func (k *kubelet) healthy(resource string) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	p := k.plugins[resource]
	if p == nil || p.devices == nil {
		return -1
	}
	n := 0
	for _, d := range p.devices {
		if d.Health == v1beta1.Healthy {
			n++
		}
	}
	return n
}

// until waits for a condition on what kubelet knows.
func (k *kubelet) until(t testing.TB, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	deadline := time.After(limit)
	for {
		k.mu.Lock()
		changed := k.changed
		k.mu.Unlock()
		if ok() {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

func (k *kubelet) plugin(resource string) *pluginConn {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.plugins[resource]
}

func (k *kubelet) ids(resource string, n int) []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	var ids []string
	if p := k.plugins[resource]; p != nil {
		for _, d := range p.devices[:min(n, len(p.devices))] {
			ids = append(ids, d.ID)
		}
	}
	return ids
}

func (k *kubelet) allocate(ctx context.Context, resource string, ids ...string) (*v1beta1.ContainerAllocateResponse, error) {
	p := k.plugin(resource)
	if p == nil {
		return nil, io.ErrClosedPipe
	}
	r, err := p.client.Allocate(ctx, &v1beta1.AllocateRequest{ContainerRequests: []*v1beta1.ContainerAllocateRequest{{DevicesIds: ids}}})
	if err != nil {
		return nil, err
	}
	return r.ContainerResponses[0], nil
}
