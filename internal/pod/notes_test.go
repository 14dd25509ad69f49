package pod

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func noteRecord(t testing.TB, at phase, rev uint64) *containerRecord {
	t.Helper()
	return &containerRecord{Phase: at, Rev: rev, Container: Container{ID: newID(), SandboxID: "s", Bundle: "/b",
		Config: &runtimeapi.ContainerConfig{Metadata: &runtimeapi.ContainerMetadata{Name: "c"}}}}
}

// A record is the newer one of the database's and the note's, whatever a crash
// left of either.
func TestNotesAndTheStore(t *testing.T) {
	for name, c := range map[string]struct {
		stored phase // "" for none, of revision 2
		noted  phase
		rev    uint64
		broken bool
		want   phase // "" for no record
		stays  bool  // the note
		kept   phase // what is in the database then
	}{
		"being made":            {noted: creating, rev: 1, want: creating, stays: true},
		"made":                  {stored: ready, noted: creating, rev: 1, want: ready, kept: ready},
		"started":               {stored: ready, noted: running, rev: 3, want: running, kept: running},
		"exited":                {stored: exited, noted: running, rev: 1, want: exited, kept: exited},
		"being removed":         {stored: exited, noted: removing, rev: 3, want: removing, stays: true, kept: exited},
		"removed":               {noted: removing, rev: 3},
		"started and removed":   {noted: running, rev: 3},
		"half noted":            {stored: ready, noted: running, rev: 3, broken: true, want: ready, kept: ready},
		"being made, not noted": {noted: creating, rev: 1, broken: true},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := openStore(filepath.Join(t.TempDir(), "pods.db"), t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			defer s.close()
			rec := noteRecord(t, c.stored, 2)
			if c.stored != "" {
				if err := s.put(containerBucket, rec.ID, rec); err != nil {
					t.Fatal(err)
				}
			}
			rec.Phase, rec.Rev = c.noted, c.rev
			if err := s.note(rec); err != nil {
				t.Fatal(err)
			}
			if c.broken {
				if err := os.Truncate(s.notePath(rec.ID), 20); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.WriteFile(s.notePath(newID()), []byte("{"), 0o600); err != nil {
				t.Fatal(err)
			}
			all, bad, err := s.containers()
			if err != nil || len(bad) > 0 {
				t.Fatal(err, bad)
			}
			var got phase
			if len(all) > 0 {
				got = all[0].Phase
			}
			if got != c.want || len(all) > 1 {
				t.Errorf("records are %v, want one in phase %q", all, c.want)
			}
			notes, err := s.noted()
			if err != nil || c.stays != slices.Contains(notes, rec.ID) || len(notes) > 1 {
				t.Errorf("notes left: %v, %v", notes, err)
			}
			all, _, err = load[containerRecord](s, containerBucket)
			var kept phase
			if len(all) > 0 {
				kept = all[0].Phase
			}
			if err != nil || kept != c.kept {
				t.Errorf("the database has %q, %v, want %q", kept, err, c.kept)
			}
		})
	}
}

// The database follows the notes, also when it could not be written for a
// while, and an end that comes first is not overtaken.
func TestTheStoreFollowsTheNotes(t *testing.T) {
	m := newMachine(t, Options{})
	sb := m.sandbox(t, "")
	started, ended, removed := m.container(t, sb), m.container(t, sb), m.container(t, sb)
	for _, c := range []*container{started, ended, removed} {
		if err := m.keepChange(c, func(r *containerRecord) { r.Phase, r.Pid = running, 7 }, m.noteRecord); err != nil {
			t.Fatal(err)
		}
		if v := c.get(); v.Pid != 7 || v.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
			t.Errorf("readers see %+v", v)
		}
	}
	if err := m.changeContainer(ended, func(r *containerRecord) { r.Phase, r.ExitCode = exited, 3 }); err != nil {
		t.Fatal(err)
	}
	if err := m.deleteContainer(removed); err != nil {
		t.Fatal(err)
	}
	broken, err := openStore(filepath.Join(t.TempDir(), "pods.db"), m.store.notes)
	if err != nil {
		t.Fatal(err)
	}
	if err := broken.close(); err != nil {
		t.Fatal(err)
	}
	working := m.store
	m.store = broken
	if err := m.storeNoted([]*container{started, ended, removed}); err == nil {
		t.Error("a database that is closed was written")
	}
	m.store = working
	if notes, err := m.store.noted(); err != nil || !slices.Equal(notes, []string{started.rec.ID}) {
		t.Errorf("notes are %v, %v", notes, err)
	}
	m.behind.add(started, started, ended, removed)
	deadline := time.Now().Add(time.Minute)
	for notes, err := m.store.noted(); err != nil || len(notes) > 0; notes, err = m.store.noted() {
		if time.Now().After(deadline) {
			t.Fatalf("still noted: %v, %v", notes, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
	all, _, err := load[containerRecord](m.store, containerBucket)
	if err != nil || len(all) != 2 {
		t.Fatalf("records are %v, %v", all, err)
	}
	for _, rec := range all {
		want := map[string]phase{started.rec.ID: running, ended.rec.ID: exited}[rec.ID]
		if rec.Phase != want {
			t.Errorf("%s is stored as %s, want %s", rec.ID, rec.Phase, want)
		}
	}
}

// After a power cut there may be files of containers that have no record. Those
// with a bundle are of this boot, and fsck's to judge.
func TestFilesThatAPowerCutLeft(t *testing.T) {
	m := newMachine(t, Options{})
	known := m.container(t, m.sandbox(t, "")).rec.ID
	cut, lost, present := newID(), newID(), newID()
	for _, id := range []string{known, cut, lost, present} {
		m.rootfs(t, id)
		if err := os.MkdirAll(filepath.Join(m.volumeDir(id), "0"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(m.containerDir(present), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := m.dropForgotten(map[string]bool{lost: true}); err != nil {
		t.Fatal(err)
	}
	keys, err := m.o.Images.Rootfs(t.Context())
	want := []string{known, lost, present}
	slices.Sort(want)
	if err != nil || !slices.Equal(keys, want) {
		t.Errorf("root file systems are %v, %v, want %v", keys, err, want)
	}
	for _, id := range []string{known, cut, lost, present} {
		if _, err := os.Stat(m.volumeDir(id)); os.IsNotExist(err) != (id == cut) {
			t.Errorf("volumes of %s: %v", id, err)
		}
	}
	for _, id := range want {
		if err := m.o.Images.RemoveRootfs(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
}

// Notes of older records have no number.
func TestRecordsWithoutARevision(t *testing.T) {
	rec := noteRecord(t, ready, 5)
	data, err := json.Marshal(rec)
	if err != nil {
		t.Fatal(err)
	}
	var fields map[string]any
	if err := json.Unmarshal(data, &fields); err != nil {
		t.Fatal(err)
	}
	delete(fields, "Rev")
	if data, err = json.Marshal(fields); err != nil {
		t.Fatal(err)
	}
	got := &containerRecord{}
	if err := json.Unmarshal(data, got); err != nil || got.Rev != 0 || got.check(rec.ID) != nil {
		t.Errorf("read as %+v, %v", got, err)
	}
}
