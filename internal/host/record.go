package host

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/proc"
)

// phase is how far the creation of a process has come. The phases that end in
// "ing" are intents: they are on disk before the act.
type phase string

const (
	phaseCreating phase = "creating"
	phaseCreated  phase = "created" // with RunOnStart: nothing exists yet
	phaseStarting phase = "starting"
	phaseStarted  phase = "started"
)

// taskRecord is a task on disk.
type taskRecord struct {
	Spec      backend.TaskSpec `json:"spec"`
	IO        ioSpec           `json:"io"`
	Phase     phase            `json:"phase"`
	Init      backend.Process  `json:"init"`
	Exit      *proc.Exit       `json:"exit,omitempty"`
	Settled   bool             `json:"settled,omitempty"` // what follows an exit was done
	OOM       bool             `json:"oom,omitempty"`
	Paused    bool             `json:"paused,omitempty"`
	CreatedAt time.Time        `json:"createdAt"`
}

// execRecord is one more process of a task on disk.
type execRecord struct {
	ID      string          `json:"id"`
	Process json.RawMessage `json:"process"`
	IO      clientIO        `json:"io"`
	Phase   phase           `json:"phase"`
	Init    backend.Process `json:"init"`
	Exit    *proc.Exit      `json:"exit,omitempty"`
}

// sandboxRecord is a sandbox on disk.
type sandboxRecord struct {
	Spec      backend.SandboxSpec `json:"spec"`
	Phase     phase               `json:"phase"`
	Holder    backend.Process     `json:"holder"`
	CreatedAt time.Time           `json:"createdAt"`
	Exit      *proc.Exit          `json:"exit,omitempty"` // also set by StopSandbox
}

// A record's file is a list of its versions, one a line, and the last whole one
// holds: a line added costs a tenth of a file replaced, which on a disk waits
// for the data. Records need not outlive a reboot, only this program.

// maxVersions is the size in bytes at which a file is begun anew.
const maxVersions = 64 << 10

// save writes a record so that a reader sees the old or the new one, whole.
func save(path string, record any) error {
	b, err := json.Marshal(record)
	if err != nil {
		return fmt.Errorf("encode %s: %w", filepath.Base(path), err)
	}
	// The line before may be half a version, left by a crash.
	b = slices.Concat([]byte("\n"), b, []byte("\n"))
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("write a record: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("write a record: %w", err)
	}
	if st.Size() > maxVersions {
		return replace(path, b)
	}
	if _, err := f.Write(b); err != nil {
		// What the next one is added to must not be half of this one.
		return errors.Join(fmt.Errorf("write a record: %w", err), f.Truncate(st.Size()))
	}
	return nil
}

func replace(path string, b []byte) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("write a record: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("write a record: %w", err)
	}
	return nil
}

// load reads the newest version of a record.
func load(path string, record any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	versions := bytes.Split(bytes.TrimRight(b, "\n"), []byte("\n"))
	newest := versions[len(versions)-1]
	for _, v := range slices.Backward(versions) {
		if json.Valid(v) { // and not the beginning of one
			newest = v
			break
		}
	}
	if err := json.Unmarshal(newest, record); err != nil {
		return fmt.Errorf("read the record %s: %w", path, err)
	}
	return nil
}

// maxID bounds names that become file names.
const maxID = 200

// checkID refuses names that could leave their folder.
func checkID(what, id string) error {
	ok := id != "" && len(id) <= maxID && id[0] != '.' && id[0] != '-'
	for i := 0; ok && i < len(id); i++ {
		c := id[i]
		ok = c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("_.-", c) >= 0
	}
	if !ok {
		if len(id) > 64 {
			id = id[:64] + "…"
		}
		return fmt.Errorf("%s %q: want 1 to %d letters, digits, '_', '.' or '-', not beginning with '.' or '-': %w", what, id, maxID, errdefs.ErrInvalidArgument)
	}
	return nil
}

// folders lists the names under dir, none when dir does not exist.
func folders(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}
