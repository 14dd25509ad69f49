package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"

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
	Spec      TaskSpec   `json:"spec"`
	IO        ioSpec     `json:"io"`
	Phase     phase      `json:"phase"`
	Init      Process    `json:"init"`
	Exit      *proc.Exit `json:"exit,omitempty"`
	Settled   bool       `json:"settled,omitempty"` // what follows an exit was done
	OOM       bool       `json:"oom,omitempty"`
	Paused    bool       `json:"paused,omitempty"`
	CreatedAt time.Time  `json:"createdAt"`
}

// execRecord is one more process of a task on disk.
type execRecord struct {
	ID      string          `json:"id"`
	Process json.RawMessage `json:"process"`
	IO      clientIO        `json:"io"`
	Phase   phase           `json:"phase"`
	Init    Process         `json:"init"`
	Exit    *proc.Exit      `json:"exit,omitempty"`
}

// sandboxRecord is a sandbox on disk.
type sandboxRecord struct {
	Spec      SandboxSpec `json:"spec"`
	Phase     phase       `json:"phase"`
	Holder    Process     `json:"holder"`
	CreatedAt time.Time   `json:"createdAt"`
	Exit      *proc.Exit  `json:"exit,omitempty"` // also set by StopSandbox
}

// save writes a record so that a reader sees the old or the new one, whole.
func save(path string, record any) error {
	b, err := json.Marshal(record)
	if err != nil {
		return fmt.Errorf("encode %s: %w", filepath.Base(path), err)
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("write a record: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("write a record: %w", err)
	}
	return nil
}

func load(path string, record any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, record); err != nil {
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
