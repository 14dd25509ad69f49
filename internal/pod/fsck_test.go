package pod

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/oci"
)

// litter puts onto the machine what a sandbox and a container leave when their
// records are lost, and gives the kinds of findings that this makes.
func (m *machine) litter(t *testing.T) (id string, kinds []string) {
	t.Helper()
	id = newID()
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	// A pod's folder with a pinned namespace.
	dir := m.podDir(id)
	do(mountFolder(dir, 0))
	do(namespaces{dir: filepath.Join(dir, "ns"), net: true}.pin())
	// A container's bundle with a mounted root file system.
	rootfs := filepath.Join(m.containerDir(id), "rootfs")
	do(os.MkdirAll(rootfs, 0o700))
	data := filepath.Join(m.o.Root, "precious")
	do(os.MkdirAll(data, 0o700))
	do(os.WriteFile(filepath.Join(data, "file"), []byte("x"), 0o600))
	do(unix.Mount(data, rootfs, "", unix.MS_BIND, ""))
	do(os.MkdirAll(filepath.Join(m.volumeDir(id), "0"), 0o700))
	m.rootfs(t, id)
	m.rootfs(t, imageVolumeKey(id, 3))
	m.net.mu.Lock()
	m.net.holds[id] = true
	m.net.mu.Unlock()
	for _, kind := range []string{"tasks", "sandboxes", "pumps"} {
		do(os.MkdirAll(filepath.Join(m.shim.dir, kind, id), 0o700))
	}
	kinds = []string{"bundle", "netns", "network", "shim", "shim", "shim", "snapshot", "snapshot", "volume"}
	if !cgroupRoot().unified {
		group := cgroupRoot().dir("memory", filepath.Join(oci.DefaultCgroup, id, "inner"))
		do(os.MkdirAll(group, 0o755))
		t.Cleanup(func() { removeCgroup(filepath.Dir(group)) })
		kinds = append(kinds, "cgroup")
	}
	slices.Sort(kinds)
	return id, kinds
}

// of picks the findings about one id.
func of(found []Finding, id string) (kinds []string, picked []Finding) {
	for _, f := range found {
		if strings.HasPrefix(f.ID, id) {
			kinds, picked = append(kinds, f.Kind), append(picked, f)
		}
	}
	slices.Sort(kinds)
	return kinds, picked
}

func TestFsckFindsAndRemovesOrphans(t *testing.T) {
	m := newMachine(t, Options{})
	id, want := m.litter(t)
	keep := m.sandbox(t, "")
	kept := m.container(t, keep)
	m.rootfs(t, kept.rec.ID)
	m.net.holds[keep.rec.ID] = true
	if err := os.MkdirAll(filepath.Join(m.volumeDir(kept.rec.ID), "0"), 0o700); err != nil {
		t.Fatal(err)
	}

	found, err := m.Fsck(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	kinds, picked := of(found, id)
	if !slices.Equal(kinds, want) {
		t.Errorf("found %v, want %v", kinds, want)
	}
	for _, f := range picked {
		if f.Repaired || f.Err != "" || f.Detail == "" || f.Path == "" && f.Kind != "snapshot" && f.Kind != "network" {
			t.Errorf("a listing gives %+v", f)
		}
	}
	if !mountRoot(m.podDir(id)) || !mountRoot(filepath.Join(m.containerDir(id), "rootfs")) || !m.net.holds[id] {
		t.Error("a listing removed something")
	}

	if found, err = m.Fsck(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	kinds, picked = of(found, id)
	if !slices.Equal(kinds, want) {
		t.Errorf("repaired %v, want %v", kinds, want)
	}
	for _, f := range picked {
		if !f.Repaired || f.Err != "" {
			t.Errorf("not repaired: %+v", f)
		}
	}
	for _, gone := range []string{m.podDir(id), m.containerDir(id), m.volumeDir(id)} {
		if _, err := os.Lstat(gone); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", gone, err)
		}
	}
	if _, err := os.Stat(filepath.Join(m.o.Root, "precious", "file")); err != nil {
		t.Errorf("the repair reached through a mount: %v", err)
	}
	keys, err := m.o.Images.Rootfs(t.Context())
	if err != nil || !slices.Equal(keys, []string{kept.rec.ID}) {
		t.Errorf("snapshots %v, %v", keys, err)
	}

	found, err = m.Fsck(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	if kinds, _ := of(found, id); len(kinds) > 0 {
		t.Errorf("found again: %v", kinds)
	}
	for _, k := range []string{keep.rec.ID, kept.rec.ID} {
		if kinds, picked := of(found, k); len(kinds) > 0 {
			t.Errorf("found what belongs to somebody: %+v", picked)
		}
	}
	if _, err := os.Stat(filepath.Join(m.volumeDir(kept.rec.ID), "0")); err != nil || !mountRoot(m.podDir(keep.rec.ID)) || !m.net.holds[keep.rec.ID] {
		t.Errorf("somebody's things were removed: %v", err)
	}
}

func TestFsckLeavesWhatIsBeingMade(t *testing.T) {
	m := newMachine(t, Options{})
	making, finish := make(chan string), make(chan struct{})
	done := make(chan error, 1)
	go func() {
		_, err := m.create(context.Background(), "pod", "n", "h", func(_ context.Context, id string, _ func(string)) error {
			if err := mountFolder(m.podDir(id), 0); err != nil {
				return err
			}
			m.net.mu.Lock()
			m.net.holds[id] = true
			m.net.mu.Unlock()
			making <- id
			<-finish
			return removeTree(m.podDir(id))
		})
		done <- err
	}()
	id := <-making
	found, err := m.Fsck(t.Context(), true)
	if err != nil {
		t.Error(err)
	}
	if _, picked := of(found, id); len(picked) > 0 || !mountRoot(m.podDir(id)) || !m.net.holds[id] {
		t.Errorf("an attempt was disturbed: %+v", picked)
	}
	close(finish)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestFsckKeepsLiveBundlesAndForeignNames(t *testing.T) {
	m := newMachine(t, Options{})
	id := newID()
	group := "/cltest-" + id[:8]
	inCgroup(t, group+"/"+id)
	dir := m.containerDir(id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"ociVersion":"1.0.0","linux":{"cgroupsPath":"`+group+"/"+id+`"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	foreign := filepath.Join(m.o.State, "containers", "somebody-elses")
	if err := os.MkdirAll(foreign, 0o700); err != nil {
		t.Fatal(err)
	}
	found, err := m.Fsck(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	_, picked := of(found, id)
	if len(picked) != 1 || picked[0].Repaired || !strings.Contains(picked[0].Err, "1 processes") {
		t.Errorf("%+v", picked)
	}
	for _, d := range []string{dir, foreign} {
		if _, err := os.Stat(d); err != nil {
			t.Errorf("%s was removed: %v", d, err)
		}
	}
}

func TestFsckRecords(t *testing.T) {
	m := newMachine(t, Options{})
	healthy := m.sandbox(t, "")
	lost := m.sandbox(t, "") // its folder was unmounted
	unpinned := m.sandbox(t, "")
	created := m.container(t, healthy) // without a bundle
	if err := m.changeContainer(created, func(r *containerRecord) { r.Phase = ready }); err != nil {
		t.Fatal(err)
	}
	ghost := m.container(t, healthy) // its shim has forgotten it, and nobody watches
	m.shim.set(&m.shim.gone, ghost.rec.ID, true)
	running := m.container(t, healthy)
	if err := removeTree(m.podDir(lost.rec.ID)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(unpinned.rec.NetNS, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{lost.rec.ID: true, unpinned.rec.ID: true, created.rec.ID: true, ghost.rec.ID: true}
	check := func(repair bool) map[string]Finding {
		t.Helper()
		found, err := m.Fsck(t.Context(), repair)
		if err != nil {
			t.Fatal(err)
		}
		byID := map[string]Finding{}
		for _, f := range found {
			if f.Kind == "record" {
				byID[f.ID] = f
			}
		}
		return byID
	}
	byID := check(false)
	for id := range want {
		if f, ok := byID[id]; !ok || f.Repaired || f.Detail == "" {
			t.Errorf("%s: %+v", id, f)
		}
	}
	if len(byID) != len(want) {
		t.Errorf("found %+v; healthy are %s and %s", byID, healthy.rec.ID, running.rec.ID)
	}
	time.AfterFunc(100*time.Millisecond, func() { ghost.ended.pass() }) // as its watcher does
	for id, f := range check(true) {
		if !f.Repaired || !want[id] {
			t.Errorf("%+v", f)
		}
	}
	if lost.phase() != stopped || unpinned.phase() != stopped || healthy.phase() != ready {
		t.Errorf("pods are %s, %s and %s", lost.phase(), unpinned.phase(), healthy.phase())
	}
	if v := created.get(); v.State != runtimeapi.ContainerState_CONTAINER_EXITED || v.Reason != "StartError" {
		t.Errorf("the container without a bundle is %+v", v)
	}
}

func TestFsckEndsWithItsCaller(t *testing.T) {
	m := newMachine(t, Options{})
	m.litter(t)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	begin := time.Now()
	if _, err := m.Fsck(ctx, false); err == nil {
		t.Error("a check that was cut off has a result")
	}
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
	if _, err := m.Fsck(t.Context(), true); err != nil {
		t.Error(err)
	}
}

func TestSnapshotOwner(t *testing.T) {
	id := newID()
	for key, want := range map[string]string{
		id: id, imageVolumeKey(id, 0): id, imageVolumeKey(id, 12): id,
		id + "-image-": "", id + "-image-1x": "", id + "x": "", id[1:]: "", "sweep": "", "": "", strings.ToUpper(id) + "A": "",
	} {
		if got := snapshotOwner(key); got != want {
			t.Errorf("%q belongs to %q, want %q", key, got, want)
		}
	}
}

func TestRemoveCgroupRefusesLiveOnes(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes cgroups")
	}
	group := "/cltest-" + newID()
	inCgroup(t, group)
	dir := cgroupRoot().dir("pids", group)
	if !populated(dir) {
		t.Error("a group with a process counts as empty")
	}
	if err := removeCgroup(dir); err == nil {
		t.Error("a group with a process was removed")
	}
	if err := removeCgroup(dir + "-absent"); err != nil {
		t.Error(err)
	}
}
