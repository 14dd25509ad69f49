package pod

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/image"
)

// plant writes bytes as a record, as a broken disk would.
func (m *machine) plant(t *testing.T, bucket, id string, data []byte) {
	t.Helper()
	err := m.store.db.Update(func(tx *bolt.Tx) error { return tx.Bucket([]byte(bucket)).Put([]byte(id), data) })
	if err != nil {
		t.Fatal(err)
	}
}

func TestARecordThatCannotBeReadIsSetAside(t *testing.T) {
	m := newMachine(t, Options{})
	healthy := m.sandbox(t, "").rec.ID
	sb := m.sandbox(t, "")
	kept := m.container(t, sb)
	end := make(chan struct{})
	m.shim.mu.Lock()
	m.shim.ends = map[string]chan struct{}{kept.rec.ID: end}
	m.shim.mu.Unlock()
	changed := func(change func(*sandboxRecord)) []byte {
		rec := sb.rec
		change(&rec)
		data, err := json.Marshal(rec)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	whole := changed(func(*sandboxRecord) {})
	for name, data := range map[string][]byte{
		"zeroes": make([]byte, 100), "cut off": whole[:len(whole)/2], "another form": []byte(`[1,2]`), "null": []byte("null"), "hollow": []byte("{}"),
		"another's": changed(func(r *sandboxRecord) { r.ID = healthy }), "no such phase": changed(func(r *sandboxRecord) { r.Phase = "magic" }),
		"no metadata": changed(func(r *sandboxRecord) { r.Config = &runtimeapi.PodSandboxConfig{} }),
	} {
		t.Run(name, func(t *testing.T) {
			m.plant(t, sandboxBucket, sb.rec.ID, data)
			m.restart(t)
			m.settled(t, healthy)
			if _, err := m.index.sandbox(sb.rec.ID); err == nil {
				t.Error("it is served")
			}
			// Its container goes on, and can be looked after.
			c := m.recovered(t, kept.rec.ID)
			if err := c.op.lock(t.Context()); err != nil {
				t.Fatal(err)
			}
			c.op.unlock()
			if v := c.get(); v.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
				t.Errorf("its container is %v", v.State)
			}
		})
	}
	lost := newID()
	m.plant(t, containerBucket, lost, []byte("rubbish"))
	m.restart(t)
	m.restart(t) // what was set aside once is not forgotten
	records := func(repair bool) []string {
		t.Helper()
		found, err := m.Fsck(t.Context(), repair)
		if err != nil {
			t.Fatal(err)
		}
		var ids []string
		for _, f := range found {
			if f.Kind == "record" && strings.Contains(f.Detail, "set aside") && f.Repaired == repair {
				ids = append(ids, f.ID)
			}
		}
		slices.Sort(ids)
		return ids
	}
	want := []string{lost, sb.rec.ID}
	slices.Sort(want)
	for _, repair := range []bool{false, true} {
		if repair {
			close(end) // as its shim does that is told to kill it
		}
		if got := records(repair); !slices.Equal(got, want) {
			t.Errorf("fsck, repair %v: set aside are %v, want %v", repair, got, want)
		}
	}
	if got := records(false); len(got) > 0 {
		t.Errorf("after the repair there are %v", got)
	}
	if _, err := m.index.container(kept.rec.ID); err == nil {
		t.Error("the repair left the container of the lost pod")
	}
	if _, err := os.Stat(m.podDir(sb.rec.ID)); !os.IsNotExist(err) {
		t.Errorf("the repair left the folder of the lost pod: %v", err)
	}
}

// A file that cannot be removed for a while keeps a half-made container's
// things and its record, until it can.
func TestAHalfMadeContainerIsCleanedUpLater(t *testing.T) {
	m := newMachine(t, Options{})
	sb := m.sandbox(t, "")
	id := newID()
	stuck := filepath.Join(m.volumeDir(id), "stuck")
	if err := os.MkdirAll(m.volumeDir(id), 0o700); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(stuck)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const immutable = 0x10
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, immutable); err != nil {
		t.Skipf("files cannot be made immutable here: %v", err)
	}
	t.Cleanup(func() { _ = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, 0) })
	cfg := &runtimeapi.ContainerConfig{Metadata: &runtimeapi.ContainerMetadata{Name: "c"}, Linux: &runtimeapi.LinuxContainerConfig{
		SecurityContext: &runtimeapi.LinuxContainerSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{
			Pid: runtimeapi.NamespaceMode_TARGET, TargetId: newID()}}}}
	c := m.newContainer(sb, id, "h", cfg, image.Image{})
	if err := m.makeContainer(t.Context(), sb, image.Image{}, c, func(string) {}); err == nil || !strings.Contains(err.Error(), "stuck") {
		t.Fatalf("the error does not tell what is left: %v", err)
	}
	known, err := m.knownIDs()
	if err != nil || !known[id] {
		t.Errorf("while its things are there its record is not: %v", err)
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, 0); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for !c.removed() {
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			t.Fatal("nobody cleans up after it")
		}
	}
	keys, err := m.o.Images.Rootfs(t.Context())
	if err != nil || len(keys) != 0 {
		t.Errorf("snapshots left: %v, %v", keys, err)
	}
	for _, path := range []string{m.volumeDir(id), m.containerDir(id)} {
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
}
