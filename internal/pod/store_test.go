package pod

import (
	"encoding/json"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestRecordsSurviveTheStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pods.db")
	s, err := openStore(path, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now().Round(0)
	sb := &sandboxRecord{Name: "n", Hash: "h", Phase: ready, NetworkUp: true, Sandbox: Sandbox{
		ID: "a", Handler: "runc", CreatedAt: now, IPs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Network: json.RawMessage(`{"x":1}`),
		State:    runtimeapi.PodSandboxState_SANDBOX_NOTREADY,
		Config:   &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Name: "p"}, Hostname: "host", Labels: map[string]string{"k": "v"}},
		Overhead: &runtimeapi.LinuxContainerResources{CpuShares: 7}}}
	ct := &containerRecord{Name: "n", Phase: exited, Container: Container{
		ID: "b", SandboxID: "a", ExitCode: 3, StartedAt: now, Reason: "Error", Bundle: "/b", Config: &runtimeapi.ContainerConfig{Metadata: &runtimeapi.ContainerMetadata{Name: "c"}, LogPath: "0.log"},
		Mounts: []*runtimeapi.Mount{{HostPath: "/h", ContainerPath: "/c"}},
		User:   &runtimeapi.ContainerUser{Linux: &runtimeapi.LinuxContainerUser{Uid: 9}}}}
	if err := s.put(sandboxBucket, "a", sb); err != nil {
		t.Fatal(err)
	}
	if err := s.put(containerBucket, "b", ct); err != nil {
		t.Fatal(err)
	}
	if _, err := openStore(path, t.TempDir()); err == nil {
		t.Error("a second daemon opened the store that is in use")
	}
	s.close()
	if s, err = openStore(path, t.TempDir()); err != nil {
		t.Fatal(err)
	}
	defer s.close()
	sbs, bad, err := load[sandboxRecord](s, sandboxBucket)
	if len(bad) > 0 {
		t.Errorf("unreadable: %v", bad)
	}
	if err != nil || len(sbs) != 1 {
		t.Fatal(sbs, err)
	}
	got := sbs[0]
	if got.ID != "a" || got.Phase != ready || !got.NetworkUp || got.IPs[0] != sb.IPs[0] || string(got.Network) != `{"x":1}` ||
		!got.CreatedAt.Equal(now) || got.State != sb.State || !proto.Equal(got.Config, sb.Config) || !proto.Equal(got.Overhead, sb.Overhead) || got.Resources != nil {
		t.Errorf("sandbox came back as %+v", got)
	}
	cts, bad, err := load[containerRecord](s, containerBucket)
	if len(bad) > 0 {
		t.Errorf("unreadable: %v", bad)
	}
	if err != nil || len(cts) != 1 {
		t.Fatal(cts, err)
	}
	c := cts[0]
	if c.SandboxID != "a" || c.ExitCode != 3 || !proto.Equal(c.Config, ct.Config) || len(c.Mounts) != 1 || !proto.Equal(c.Mounts[0], ct.Mounts[0]) || !proto.Equal(c.User, ct.User) {
		t.Errorf("container came back as %+v", c)
	}
	if err := s.delete(sandboxBucket, "a"); err != nil {
		t.Fatal(err)
	}
	if sbs, _, _ := load[sandboxRecord](s, sandboxBucket); len(sbs) != 0 {
		t.Error("deleted record is still there")
	}
}
