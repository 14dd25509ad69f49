package pod

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/image"
)

// restart ends the daemon and starts its successor on the same machine.
func (m *machine) restart(t *testing.T) {
	t.Helper()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	var err error
	if m.Service, err = Open(m.o); err != nil {
		t.Fatal(err)
	}
}

// settled waits for the recovery of a sandbox.
func (m *machine) settled(t *testing.T, id string) *sandbox {
	t.Helper()
	sb, err := m.index.sandbox(id)
	if err != nil {
		t.Fatal(err)
	}
	if err := sb.op.lock(t.Context()); err != nil {
		t.Fatal(err)
	}
	sb.op.unlock()
	return sb
}

func (m *machine) recovered(t *testing.T, id string) *container {
	t.Helper()
	c, err := m.index.container(id)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestRecoveryGoesOnWhereItFailed(t *testing.T) {
	m := newMachine(t, Options{})
	sb := m.sandbox(t, "")
	a, b := m.container(t, sb).rec.ID, m.container(t, sb).rec.ID
	end := make(chan struct{})
	m.shim.mu.Lock()
	m.shim.ends = map[string]chan struct{}{a: end, b: end}
	m.shim.sick = map[string]bool{b: true, a: false}
	m.shim.mu.Unlock()
	m.restart(t)
	if _, err := m.index.container(a); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(300*time.Millisecond, func() { m.shim.set(&m.shim.sick, b, false) }) // some repeats later
	for _, id := range []string{a, b} {
		c := m.recovered(t, id)
		if err := c.op.lock(t.Context()); err != nil {
			t.Fatal(err)
		}
		c.op.unlock()
	}
	m.settled(t, sb.rec.ID)
	close(end)
	for _, id := range []string{a, b} {
		<-m.recovered(t, id).deleted.passed()
		if v := m.recovered(t, id).get(); v.State != runtimeapi.ContainerState_CONTAINER_EXITED {
			t.Errorf("container is %v", v.State)
		}
	}
	m.shim.mu.Lock()
	defer m.shim.mu.Unlock()
	want := []string{a, b}
	slices.Sort(want)
	slices.Sort(m.shim.runs)
	if !slices.Equal(m.shim.runs, want) {
		t.Errorf("watched were %v, want each of %v once", m.shim.runs, want)
	}
}

func TestPodsOfAFormerHandlerCanBeRemoved(t *testing.T) {
	m := newMachine(t, Options{})
	sb := m.sandbox(t, "")
	if err := m.changeSandbox(sb, func(r *sandboxRecord) { r.HandlerName, r.Whole, r.SharePID, r.Pid = "dropped", false, true, 1 }); err != nil {
		t.Fatal(err)
	}
	c := m.container(t, sb)
	end := make(chan struct{})
	m.shim.mu.Lock()
	m.shim.ends = map[string]chan struct{}{c.rec.ID: end}
	m.shim.mu.Unlock()
	m.restart(t)
	m.settled(t, sb.rec.ID)
	if v := m.recovered(t, c.rec.ID).get(); v.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("a container that runs on it is %v", v.State)
	}
	if _, err := m.CreateContainer(t.Context(), sb.rec.ID, &runtimeapi.ContainerConfig{}, nil); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a new container there: %v", err)
	}
	close(end)
	if err := m.RemoveSandbox(t.Context(), sb.rec.ID); err != nil {
		t.Fatal(err)
	}
	known, err := m.knownIDs()
	if err != nil || len(known) != 0 {
		t.Errorf("left are %v, %v", known, err)
	}
}

func TestContainersOfARecoveredPodWaitForTheProbe(t *testing.T) {
	m := newMachine(t, Options{})
	sb := m.sandbox(t, "").rec.ID
	m.shim.probing = make(chan struct{})
	m.o.Shims = newShims(t, m.o)
	m.restart(t)
	create := func(ctx context.Context) error {
		_, err := m.CreateContainer(ctx, sb, &runtimeapi.ContainerConfig{}, nil)
		return err
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := create(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while it is not known what the handler can do: %v", err)
	}
	close(m.shim.probing)
	if err := create(t.Context()); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an empty configuration: %v", err)
	}
}

func TestHalfMadePodGivesUpItsName(t *testing.T) {
	m := newMachine(t, Options{})
	sb := m.sandbox(t, "")
	if err := m.changeSandbox(sb, func(r *sandboxRecord) { r.Phase = creating }); err != nil {
		t.Fatal(err)
	}
	m.restart(t)
	m.attempts.mu.Lock()
	_, held := m.attempts.byName[sb.rec.Name]
	m.attempts.mu.Unlock()
	if held {
		t.Error("its name is still taken")
	}
	// Who found it before it was taken down must not write it again.
	if half, err := m.index.sandbox(sb.rec.ID); err == nil {
		for !errdefs.IsNotFound(err) {
			_, err = m.index.sandbox(sb.rec.ID)
		}
		if err := m.changeSandbox(half, func(r *sandboxRecord) { r.Phase = stopped }); !errdefs.IsNotFound(err) {
			t.Errorf("a change after the end: %v", err)
		}
	}
	if ids, err := m.store.ids(sandboxBucket); err != nil || len(ids) != 0 {
		t.Errorf("records left: %v, %v", ids, err)
	}
}

func TestAFullDiskEndsNoContainerTwice(t *testing.T) {
	m := newMachine(t, Options{})
	c := m.container(t, m.sandbox(t, ""))
	if err := m.changeContainer(c, func(r *containerRecord) { r.Phase = ready }); err != nil {
		t.Fatal(err)
	}
	working := m.store
	broken, err := openStore(filepath.Join(t.TempDir(), "pods.db"), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := broken.close(); err != nil {
		t.Fatal(err)
	}
	m.store = broken
	cause := errors.New("no such program")
	if err := m.noteFailedStart(c, cause); err == nil {
		t.Error("a failed start was noted nowhere")
	}
	if c.phase() != ready {
		t.Errorf("readers see %s, the store does not", c.phase())
	}
	m.store = working
	if err := m.noteFailedStart(c, cause); err != nil {
		t.Error(err)
	}
	if err := m.stopContainer(t.Context(), c, 0); err != nil {
		t.Error(err)
	}
	if v := c.get(); v.ExitCode != startErrorCode || !strings.Contains(v.Message, cause.Error()) {
		t.Errorf("the container is %+v", v)
	}
}

func TestTargetOfThePIDNamespace(t *testing.T) {
	m := newMachine(t, Options{})
	sb, other := m.sandbox(t, ""), m.sandbox(t, "")
	target, ended, foreign := m.container(t, sb), m.container(t, sb), m.container(t, other)
	for _, c := range []*container{target, foreign} {
		if err := m.changeContainer(c, func(r *containerRecord) { r.Pid = 4711 }); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.changeContainer(ended, func(r *containerRecord) { r.Phase = exited }); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name, target string
		refused      func(error) bool
	}{
		{"a running one", target.rec.ID, func(err error) bool { return err == nil }},
		{"an ended one", ended.rec.ID, errdefs.IsFailedPrecondition},
		{"one of another pod", foreign.rec.ID, errdefs.IsInvalidArgument},
		{"an absent one", newID(), errdefs.IsNotFound},
	}
	for _, tt := range tests {
		c := m.container(t, sb)
		c.rec.Config.Linux = &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: tt.target}}}
		ns, err := m.containerNamespaces(sb, c)
		if !tt.refused(err) {
			t.Errorf("%s: %v", tt.name, err)
		}
		if err == nil && ns.PID != "/proc/4711/ns/pid" {
			t.Errorf("%s: the namespace is %q, and \"\" is the node's", tt.name, ns.PID)
		}
	}
}

func TestStreamsThatCannotBeMade(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "exec")
	if err := os.MkdirAll(filepath.Join(dir, "err"), 0o700); err != nil {
		t.Fatal(err)
	}
	if f, err := newFifos(dir, true, true, true); err == nil || f != nil {
		t.Errorf("got %v, %v", f, err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the others were left: %v", err)
	}
	removed := filepath.Join(t.TempDir(), "bundle")
	if f, err := newFifos(filepath.Join(removed, "exec", "1"), true, true, true); !os.IsNotExist(errors.Unwrap(err)) || f != nil {
		t.Errorf("in a removed bundle: %v, %v", f, err)
	}
}

// A power cut brings back the files of containers that were removed shortly
// before; those of containers that have a record stay.
func TestForgottenFilesGo(t *testing.T) {
	m := newMachine(t, Options{})
	kept := m.container(t, m.sandbox(t, "")).rec.ID
	left := map[string]bool{newID(): false, kept: true}
	for id := range left {
		dir := filepath.Join(m.o.Root, "images", "rootfs", "r-"+id)
		if err := os.MkdirAll(filepath.Join(dir, "fs"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "about.json"), []byte(`{"base":"gone","boot":"another"}`), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	images := m.o.Images
	if err := images.Close(); err != nil {
		t.Fatal(err)
	}
	var err error
	if m.o.Images, err = image.Open(t.Context(), image.Options{Root: filepath.Join(m.o.Root, "images"), Log: m.o.Log}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.o.Images.Close() })
	m.restart(t)
	keys, err := m.o.Images.Rootfs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for id, stays := range left {
		if slices.Contains(keys, id) != stays {
			t.Errorf("the files of %s are there: %v", id, !stays)
		}
	}
}
