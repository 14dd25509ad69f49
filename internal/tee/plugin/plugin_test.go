package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	v1beta1 "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"

	"cloister.dev/internal/tee"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const ram = "cloister.sim/tee-ram"

// fake is a backend that says what the test tells it to.
type fake struct {
	mu        sync.Mutex
	resources []tee.Resource
	ailments  []tee.Ailment
	err       error
	refuse    error
}

func (f *fake) Name() string { return "fake" }

func (f *fake) Scan(context.Context) ([]tee.Resource, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.resources), f.err
}

func (f *fake) Health(context.Context, []tee.Resource) []tee.Ailment {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ailments
}

func (f *fake) Allocate(context.Context, tee.Resource, []string, *tee.Grant) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.refuse
}

func (f *fake) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func memory(units int) []tee.Resource {
	return []tee.Resource{{Name: ram, Model: tee.Memory, UnitKiB: 512, Parts: []tee.Part{{Units: units, Grant: tee.Grant{
		Devices: []tee.Device{{Host: "/dev/zero", Container: "/dev/tee", Access: "rw"}},
		Mounts:  []tee.Mount{{Host: "/tmp", Container: "/var/tee", ReadOnly: true}},
		Env:     map[string]string{"TEE": "fake"},
	}}}}}
}

// bed is a plugin at work on a private folder.
type bed struct {
	*kubelet
	f      *fake
	inv    *tee.Inventory
	plugin *Plugin
	cdi    string
	stop   func()
}

func newBed(t testing.TB, resources []tee.Resource, o Options) *bed {
	t.Helper()
	dir, err := os.MkdirTemp("", "dp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	b := &bed{kubelet: newKubelet(filepath.Join(dir, "device-plugins")), f: &fake{resources: resources}, cdi: filepath.Join(dir, "cdi")}
	if err := os.Mkdir(b.dir, 0o750); err != nil {
		t.Fatal(err)
	}
	o.Dir = b.dir
	if o.CDIDir == "" {
		o.CDIDir = b.cdi
	}
	if o.Log == nil {
		o.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	b.inv = tee.New([]tee.Backend{b.f}, tee.Options{Interval: 20 * time.Millisecond, Recheck: 10 * time.Millisecond, Recover: 2, Log: o.Log})
	b.plugin = New(b.inv, o)
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	all.Go(func() { b.inv.Run(ctx) })
	all.Go(func() { b.plugin.Run(ctx) })
	b.stop = sync.OnceFunc(func() {
		cancel()
		all.Wait()
	})
	t.Cleanup(b.kubelet.stop)
	t.Cleanup(b.stop)
	return b
}

func (b *bed) offered(t testing.TB, resource string, n int) {
	t.Helper()
	b.until(t, fmt.Sprintf("%d healthy units of %s", n, resource), 20*time.Second, func() bool { return b.healthy(resource) == n })
}

// A kubelet that takes no plugin, or has gone and left its socket, is not asked
// more often than now and then.
func TestFailedRegistrationsAreSpaced(t *testing.T) {
	b := newBed(t, memory(2), Options{})
	b.mu.Lock()
	b.refuse = errors.New("not this one")
	b.mu.Unlock()
	b.kubelet.start(t)
	time.Sleep(2 * time.Second)
	b.mu.Lock()
	n := b.registers
	b.mu.Unlock()
	if most := 8; n == 0 || n > most { // 100 ms, 200 ms, 400 ms, …
		t.Errorf("%d registrations in two seconds, not 1 to %d", n, most)
	}
}

func TestOfferAndAllocate(t *testing.T) {
	b := newBed(t, memory(20), Options{})
	b.kubelet.start(t)
	b.offered(t, ram, 20)
	ids := b.ids(ram, 10)
	r, err := b.allocate(t.Context(), ram, ids...)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Devices) != 1 || r.Devices[0].ContainerPath != "/dev/tee" || r.Devices[0].HostPath != "/dev/zero" || r.Devices[0].Permissions != "rw" {
		t.Errorf("devices: %v", r.Devices)
	}
	if len(r.Mounts) != 1 || !r.Mounts[0].ReadOnly || r.Envs["TEE"] != "fake" {
		t.Errorf("mounts %v, env %v", r.Mounts, r.Envs)
	}
	if len(r.CdiDevices) != 1 || r.CdiDevices[0].Name != "cloister.dev/cloister-sim-tee-ram=all" {
		t.Errorf("CDI: %v", r.CdiDevices)
	}
	if _, err := b.plugin.inv.Allocate(t.Context(), "example.com/nothing", ids); err == nil {
		t.Error("a resource that does not exist was allocated")
	}
	if _, err := b.kubelet.plugin(ram).client.PreStartContainer(t.Context(), &v1beta1.PreStartContainerRequest{DevicesIds: ids}); err != nil {
		t.Error(err)
	}
}

func TestRefusals(t *testing.T) {
	b := newBed(t, memory(20), Options{})
	b.kubelet.start(t)
	b.offered(t, ram, 20)
	huge := make([]string, 300_000)
	for n := range huge {
		huge[n] = fmt.Sprint("none", n)
	}
	tests := []struct {
		name string
		ids  []string
		code codes.Code
	}{
		{"unknown", []string{"zz"}, codes.NotFound},
		{"other form of a known one", []string{"01"}, codes.NotFound},
		{"negative", []string{"-1"}, codes.NotFound},
		{"none", nil, codes.InvalidArgument},
		{"twice", []string{"1", "1"}, codes.InvalidArgument},
		{"long", []string{strings.Repeat("x", 1<<20)}, codes.NotFound},
		{"300,000", huge, codes.NotFound},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := b.allocate(t.Context(), ram, tt.ids...)
			if status.Code(err) != tt.code {
				t.Errorf("got %.200v, want %v", err, tt.code)
			}
			if len(fmt.Sprint(err)) > 500 {
				t.Errorf("the error has %d bytes", len(fmt.Sprint(err)))
			}
		})
	}
	many := &v1beta1.AllocateRequest{}
	for range 1000 {
		many.ContainerRequests = append(many.ContainerRequests, &v1beta1.ContainerAllocateRequest{DevicesIds: []string{"1"}})
	}
	if _, err := b.kubelet.plugin(ram).client.Allocate(t.Context(), many); status.Code(err) != codes.InvalidArgument {
		t.Errorf("1000 containers: %v", err)
	}
	if _, err := b.kubelet.plugin(ram).client.Allocate(t.Context(), &v1beta1.AllocateRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("no container: %v", err)
	}
	b.f.set(func() { b.f.refuse = errors.New("out of memory") })
	if _, err := b.allocate(t.Context(), ram, "1"); err == nil {
		t.Error("the backend's refusal is not kubelet's")
	}
	b.f.set(func() {
		b.f.refuse = nil
		b.f.ailments = []tee.Ailment{{Resource: ram, Part: tee.AllParts, Reason: "unplugged"}}
	})
	b.offered(t, ram, 0)
	_, err := b.allocate(t.Context(), ram, "1")
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "unplugged") {
		t.Errorf("an unhealthy unit: %v", err)
	}
	if _, err := b.kubelet.plugin(ram).client.PreStartContainer(t.Context(), &v1beta1.PreStartContainerRequest{DevicesIds: []string{"1"}}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("start with an unhealthy unit: %v", err)
	}
}

func TestHealthComesAndGoes(t *testing.T) {
	b := newBed(t, memory(20), Options{})
	b.kubelet.start(t)
	b.offered(t, ram, 20)
	for range 3 {
		b.f.set(func() { b.f.ailments = []tee.Ailment{{Resource: ram, Part: tee.AllParts, Reason: "unplugged"}} })
		b.offered(t, ram, 0)
		b.f.set(func() { b.f.ailments = nil })
		b.offered(t, ram, 20)
	}
	b.f.set(func() { b.f.err = errors.New("the TEE's daemon is gone") })
	b.offered(t, ram, 0)
	b.f.set(func() { b.f.err = nil; b.f.resources = memory(7) })
	b.offered(t, ram, 7)
	b.f.set(func() { b.f.resources = nil })
	b.offered(t, ram, 0)
	if n := b.registers; n != 1 {
		t.Errorf("%d registrations, want 1", n)
	}
}

func TestKubeletRestarts(t *testing.T) {
	b := newBed(t, memory(20), Options{})
	b.kubelet.start(t)
	b.offered(t, ram, 20)
	for n := range 10 {
		b.kubelet.stop()
		b.kubelet.start(t)
		start := time.Now()
		b.offered(t, ram, 20)
		t.Logf("restart %d: offered again after %v", n+1, time.Since(start).Round(time.Millisecond))
		if _, err := b.allocate(t.Context(), ram, "1"); err != nil {
			t.Fatal(err)
		}
	}
}

func TestComesBack(t *testing.T) {
	tests := []struct {
		name string
		harm func(t *testing.T, b *bed)
	}{
		{"kubelet drops the stream", func(_ *testing.T, b *bed) { b.kubelet.plugin(ram).cancel() }},
		{"our socket is deleted", func(t *testing.T, b *bed) {
			if err := os.Remove(b.plugin.all()[0].socket); err != nil {
				t.Fatal(err)
			}
			b.kubelet.plugin(ram).cancel()
		}},
		{"kubelet refuses for a while", func(t *testing.T, b *bed) {
			b.mu.Lock()
			b.refuse = errors.New("not now")
			b.mu.Unlock()
			b.kubelet.stop()
			b.kubelet.start(t)
			before := b.registers
			b.until(t, "two refusals", 10*time.Second, func() bool {
				b.mu.Lock()
				defer b.mu.Unlock()
				return b.registers >= before+2
			})
			b.mu.Lock()
			b.refuse = nil
			b.mu.Unlock()
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBed(t, memory(20), Options{})
			b.kubelet.start(t)
			b.offered(t, ram, 20)
			before := b.kubelet.plugin(ram)
			tt.harm(t, b)
			b.until(t, "another registration", 20*time.Second, func() bool { return b.kubelet.plugin(ram) != before && b.healthy(ram) == 20 })
		})
	}
}

// A kubelet that starts may empty its folder between our socket and our
// registration.
func TestFolderEmptiedMeanwhile(t *testing.T) {
	b := newBed(t, memory(20), Options{})
	b.sweep = true
	b.kubelet.start(t)
	start := time.Now()
	b.offered(t, ram, 20)
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("offered after %v", took)
	}
}

func TestPluginRestarts(t *testing.T) {
	b := newBed(t, memory(20), Options{})
	b.kubelet.start(t)
	b.offered(t, ram, 20)
	b.stop()
	b.until(t, "the loss of the stream", 5*time.Second, func() bool { return b.healthy(ram) == -1 })
	if left, _ := filepath.Glob(filepath.Join(b.dir, "cloister-*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	// Another one of the same folder, as after a crash that left its socket.
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(b.dir, "cloister-cloister-sim-tee-ram.sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	p := New(b.inv, Options{Dir: b.dir, CDIDir: b.cdi})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); p.Run(ctx) }()
	b.offered(t, ram, 20)
	cancel()
	<-done
}

// Several watchers, one of which never reads, must not keep news from the others.
func TestSlowStream(t *testing.T) {
	b := newBed(t, memory(DefaultMaxDevices), Options{})
	b.kubelet.start(t)
	b.offered(t, ram, DefaultMaxDevices)
	conn, err := grpc.NewClient("unix://"+b.plugin.all()[0].socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for range 3 {
		s, err := v1beta1.NewDevicePluginClient(conn).ListAndWatch(ctx, &v1beta1.Empty{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Header(); err != nil { // the stream is open; nothing more is read
			t.Fatal(err)
		}
	}
	start := time.Now()
	b.f.set(func() { b.f.ailments = []tee.Ailment{{Resource: ram, Part: tee.AllParts, Reason: "unplugged"}} })
	b.offered(t, ram, 0)
	t.Logf("loss of %d units told in %v beside three streams that nobody reads", DefaultMaxDevices, time.Since(start).Round(time.Millisecond))
	if n := b.plugin.Status().Endpoints[0].Streams; n != 4 {
		t.Errorf("%d streams, want 4", n)
	}
}

func TestTwoPlugins(t *testing.T) {
	b := newBed(t, memory(20), Options{})
	b.kubelet.start(t)
	b.offered(t, ram, 20)
	other := New(b.inv, Options{Dir: b.dir, CDIDir: b.cdi})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); other.Run(ctx) }()
	deadline := time.After(10 * time.Second)
	for other.Status().Endpoints == nil || other.Status().Endpoints[0].Error == "" {
		select {
		case <-deadline:
			t.Fatal("the second plugin does not complain")
		case <-time.After(10 * time.Millisecond):
		}
	}
	if e := other.Status().Endpoints[0].Error; !strings.Contains(e, "another device plugin") {
		t.Errorf("second plugin: %s", e)
	}
	if b.healthy(ram) != 20 || b.registers != 1 {
		t.Errorf("the first lost its place: %d healthy, %d registrations", b.healthy(ram), b.registers)
	}
	cancel()
	<-done
}

func TestBadSockets(t *testing.T) {
	tests := []struct {
		name, want string
		make       func(t *testing.T, path string)
	}{
		{"a symbolic link", "symbolic link", func(t *testing.T, path string) {
			if err := os.Symlink("/run/elsewhere.sock", path); err != nil {
				t.Fatal(err)
			}
		}},
		{"a regular file", "not a socket", func(t *testing.T, path string) {
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		{"of another user", "belongs to user", func(t *testing.T, path string) {
			l, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
			if err := os.Chown(path, 4242, -1); err != nil {
				t.Skip("only root gives files away:", err)
			}
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := newBed(t, memory(20), Options{})
			path := filepath.Join(b.dir, "kubelet.sock")
			tt.make(t, path)
			deadline := time.After(10 * time.Second)
			for {
				if e := b.plugin.Status().Endpoints; len(e) > 0 && strings.Contains(e[0].Error, tt.want) {
					break
				}
				select {
				case <-deadline:
					t.Fatalf("status: %+v", b.plugin.Status().Endpoints)
				case <-time.After(5 * time.Millisecond):
				}
			}
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			b.kubelet.start(t)
			b.offered(t, ram, 20)
		})
	}
}

func TestOurNameIsTaken(t *testing.T) {
	two := append(memory(20), tee.Resource{Name: "cloister.sim/other", Model: tee.Count, Parts: []tee.Part{{Units: 3}}})
	b := newBed(t, two, Options{})
	b.kubelet.start(t)
	b.offered(t, ram, 20)
	b.kubelet.stop()
	name := filepath.Join(b.dir, "cloister-cloister-sim-tee-ram.sock")
	_ = os.Remove(name)
	if err := os.WriteFile(name, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	b.kubelet.start(t)
	b.offered(t, "cloister.sim/other", 3) // what is well is served
	if text, err := os.ReadFile(name); err != nil || string(text) != "precious" {
		t.Errorf("the file in the way: %q, %v", text, err)
	}
}

func TestFullCDIFolder(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4096,nr_inodes=4"); err != nil {
		t.Skip("mounting takes root:", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	if err := os.WriteFile(filepath.Join(dir, "other.json"), bytes.Repeat([]byte(" "), 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	b := newBed(t, memory(20), Options{CDIDir: dir, Log: slog.New(slog.NewTextHandler(&log, nil))})
	b.kubelet.start(t)
	b.offered(t, ram, 20)
	r, err := b.allocate(t.Context(), ram, "1")
	if err != nil || len(r.Devices) != 1 || len(r.CdiDevices) != 0 {
		t.Errorf("without CDI: %v, %v", r, err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left in the full folder: %v, %v", entries, err)
	}
	if err := os.Remove(filepath.Join(dir, "other.json")); err != nil {
		t.Fatal(err)
	}
	for limit := time.Now().Add(15 * time.Second); ; {
		b.plugin.all()[0].nudge() // it looks by itself every ten seconds
		if r, err = b.allocate(t.Context(), ram, "1"); err != nil {
			t.Fatal(err)
		}
		if len(r.CdiDevices) == 1 || time.Now().After(limit) {
			break
		}
	}
	if len(r.CdiDevices) != 1 {
		t.Error("no CDI after there is room")
	}
	b.stop()
	if !strings.Contains(log.String(), "no space left") {
		t.Errorf("nothing says why there is no CDI:\n%s", &log)
	}
}

func TestLimitIsSaid(t *testing.T) {
	var log bytes.Buffer
	b := newBed(t, memory(1000), Options{MaxDevices: 300, Log: slog.New(slog.NewTextHandler(&log, nil))})
	b.kubelet.start(t)
	b.offered(t, ram, 300)
	if _, err := b.allocate(t.Context(), ram, "8b"); err != nil { // unit 299
		t.Error(err)
	}
	if _, err := b.allocate(t.Context(), ram, "8c"); status.Code(err) != codes.NotFound {
		t.Errorf("a unit above the limit: %v", err)
	}
	b.stop()
	if !strings.Contains(log.String(), "max_devices is 300") {
		t.Errorf("the log does not tell of the limit:\n%s", &log)
	}
}

func TestStatusAndMetrics(t *testing.T) {
	b := newBed(t, memory(20), Options{})
	b.kubelet.start(t)
	b.offered(t, ram, 20)
	if _, err := b.allocate(t.Context(), ram, "1"); err != nil {
		t.Fatal(err)
	}
	h, err := b.plugin.Handler("v1")
	if err != nil {
		t.Fatal(err)
	}
	get := func(path string) string {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		return w.Body.String()
	}
	var s Status
	// kubelet lists before it has answered the registration.
	for tick, end := time.NewTicker(time.Millisecond), time.Now().Add(10*time.Second); ; <-tick.C {
		s = Status{}
		if err := json.Unmarshal([]byte(get("/status")), &s); err != nil {
			t.Fatal(err)
		}
		if len(s.Endpoints) == 1 && s.Endpoints[0].Registered || time.Now().After(end) {
			break
		}
	}
	if len(s.Endpoints) != 1 || !s.Endpoints[0].Registered || s.Endpoints[0].Listed != 20 || s.Backends[0].Resources[0].Name != ram {
		t.Errorf("status: %+v", s)
	}
	text := get("/metrics")
	for _, want := range []string{
		`cloister_tee_units{backend="fake",health="healthy",resource="cloister.sim/tee-ram"} 20`,
		`cloister_tee_allocations_total{resource="cloister.sim/tee-ram",result="ok"} 1`,
		`cloister_tee_streams{resource="cloister.sim/tee-ram"} 1`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
}
