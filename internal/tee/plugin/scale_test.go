package plugin_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	v1beta1 "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

// registry takes one registration.
type registry struct {
	v1beta1.UnimplementedRegistrationServer
	got chan string
}

func (r *registry) Register(_ context.Context, q *v1beta1.RegisterRequest) (*v1beta1.Empty, error) {
	r.got <- q.Endpoint
	return &v1beta1.Empty{}, nil
}

// The program itself with 220,000 units: what it costs, and how fast it allocates.
func TestScale(t *testing.T) {
	const units = 220_000
	bin := program(t)
	dir := t.TempDir()
	plugins := filepath.Join(dir, "k", "device-plugins")
	if err := os.MkdirAll(plugins, 0o750); err != nil {
		t.Fatal(err)
	}
	lis, err := net.Listen("unix", filepath.Join(plugins, "kubelet.sock"))
	if err != nil {
		t.Skipf("%s is too long for a socket: %v", plugins, err)
	}
	reg := &registry{got: make(chan string, 8)}
	g := grpc.NewServer()
	v1beta1.RegisterRegistrationServer(g, reg)
	go func() { _ = g.Serve(lis) }()
	defer g.Stop()
	fault := filepath.Join(dir, "fault")
	file := filepath.Join(dir, "c.toml")
	text := fmt.Sprintf("version = 3\nroot = %q\nstate = %q\n[device_plugin]\nbackends = [\"sim\"]\nkubelet_dir = %q\ncdi_dir = %q\n[device_plugin.sim]\nmemory = %d\nfault_file = %q\n",
		filepath.Join(dir, "r"), filepath.Join(dir, "s"), filepath.Join(dir, "k"), filepath.Join(dir, "cdi"), units*512, fault)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cmd := exec.Command(bin, "device-plugin", "run", "--config", file)
	cmd.Stderr = &log
	start := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("the plugin ended with %v:\n%s", err, &log)
		}
	}()
	endpoint := <-reg.got
	conn, err := grpc.NewClient("unix://"+filepath.Join(plugins, endpoint), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := v1beta1.NewDevicePluginClient(conn)
	stream, err := client.ListAndWatch(t.Context(), &v1beta1.Empty{})
	if err != nil {
		t.Fatal(err)
	}
	list, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d units listed %v after the start of the program, in a message of %d bytes", len(list.Devices), time.Since(start).Round(time.Millisecond), proto.Size(list))
	if len(list.Devices) != units {
		t.Errorf("%d units, want %d", len(list.Devices), units)
	}
	if err := os.WriteFile(fault, []byte("gone"), 0o600); err != nil {
		t.Fatal(err)
	}
	start = time.Now()
	lost, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("loss of all units told after %v, in a message of %d bytes", time.Since(start).Round(time.Millisecond), proto.Size(lost))
	if err := os.Remove(fault); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	rate := allocateMany(t, client, list.Devices)
	if rate < 1000 {
		t.Errorf("%.0f allocations a second, want 1000", rate)
	}
	atRest(t, cmd.Process.Pid)
}

func program(t *testing.T) string {
	if dir := os.Getenv("CLOISTER_BIN"); dir != "" {
		path := filepath.Join(dir, "cloister")
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	path := filepath.Join(t.TempDir(), "cloister")
	cmd := exec.Command("go", "build", "-o", path, "cloister.dev/cmd/cloister")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	return path
}

// allocateMany has eight callers allocate ten units each, again and again.
func allocateMany(t *testing.T, client v1beta1.DevicePluginClient, devices []*v1beta1.Device) float64 {
	const calls, callers, size = 4000, 8, 10
	took := make([]time.Duration, calls)
	next := make(chan int, calls)
	for n := range calls {
		next <- n
	}
	close(next)
	start := time.Now()
	var all sync.WaitGroup
	for range callers {
		all.Go(func() {
			for n := range next {
				var ids []string
				for _, d := range devices[n*size%len(devices):][:size] {
					ids = append(ids, d.ID)
				}
				begin := time.Now()
				_, err := client.Allocate(t.Context(), &v1beta1.AllocateRequest{ContainerRequests: []*v1beta1.ContainerAllocateRequest{{DevicesIds: ids}}})
				took[n] = time.Since(begin)
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	rate := calls / time.Since(start).Seconds()
	slices.Sort(took)
	t.Logf("%.0f allocations of %d units a second by %d callers; p50 %v, p99 %v", rate, size, callers, took[calls/2], took[calls*99/100])
	return rate
}

// atRest measures memory and processor time of a plugin that nobody asks.
func atRest(t *testing.T, pid int) {
	const window = 5 * time.Second
	before := cpu(t, pid)
	<-time.After(window)
	used := cpu(t, pid) - before
	rss, peak := statusKiB(t, pid, "VmRSS"), statusKiB(t, pid, "VmHWM")
	t.Logf("at rest: %v of processor time in %v, %d KiB resident, %d KiB at the highest", used, window, rss, peak)
	if used > window/50 {
		t.Errorf("%v of processor time at rest", used)
	}
	if peak > 128<<10 {
		t.Errorf("%d KiB at the highest", peak)
	}
}

func cpu(t *testing.T, pid int) time.Duration {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	user, errUser := strconv.Atoi(f[11])
	system, errSystem := strconv.Atoi(f[12])
	if err := errors.Join(errUser, errSystem); err != nil {
		t.Fatal(err)
	}
	return time.Duration(user+system) * 10 * time.Millisecond
}

func statusKiB(t *testing.T, pid int, key string) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == key+":" {
			n, err := strconv.Atoi(f[1])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no %s of %d", key, pid)
	return 0
}
