package host

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRecordVersions(t *testing.T) {
	path := filepath.Join(t.TempDir(), "task.json")
	var got execRecord
	if err := load(path, &got); !os.IsNotExist(err) {
		t.Errorf("load of an absent record: %v, want that it does not exist", err)
	}
	for _, id := range []string{"a", "b", "c"} {
		if err := save(path, &execRecord{ID: id}); err != nil {
			t.Fatal(err)
		}
	}
	if err := load(path, &got); err != nil || got.ID != "c" {
		t.Errorf("load = %q, %v; want the newest version c", got.ID, err)
	}

	// What a full disk or a crash may leave of a version does not count.
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(`{"id":"torn","pro`); err != nil {
		t.Fatal(err)
	}
	f.Close()
	got = execRecord{}
	if err := load(path, &got); err != nil || got.ID != "c" {
		t.Errorf("load after a torn write = %q, %v; want c", got.ID, err)
	}
	if err := save(path, &execRecord{ID: "d"}); err != nil {
		t.Fatal(err)
	}
	if err := load(path, &got); err != nil || got.ID != "d" {
		t.Errorf("load of what followed a torn write = %q, %v; want d", got.ID, err)
	}
}

func TestRecordIsBegunAnew(t *testing.T) {
	path := filepath.Join(t.TempDir(), "task.json")
	big := strings.Repeat("x", 1000)
	var last string
	for i := range 200 {
		last = big + string(rune('a'+i%26))
		if err := save(path, &execRecord{ID: last}); err != nil {
			t.Fatal(err)
		}
	}
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if st.Size() > maxVersions+2000 {
		t.Errorf("200 versions of 1 kB take %d bytes, want about %d at most", st.Size(), maxVersions)
	}
	var got execRecord
	if err := load(path, &got); err != nil || got.ID != last {
		t.Errorf("load = …%q, %v; want the last version", got.ID[max(0, len(got.ID)-1):], err)
	}
}

func TestRecordDamaged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "task.json")
	for _, content := range []string{"", "\n\n", "rubbish\n", `{"id":7}` + "\n"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		var got execRecord
		if err := load(path, &got); err == nil {
			t.Errorf("load of %q succeeded", content)
		}
	}
}
