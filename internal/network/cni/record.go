package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Before the first plugin runs for a sandbox, what will be done is written
// down: the networks with their whole configuration. DEL then does what ADD
// did, even when the folder holds something else by then, or the process died
// in between.

type record struct {
	ID           string          `json:"id"`
	Networks     []recordNetwork `json:"networks"`
	Args         [][2]string     `json:"args"`
	Capabilities map[string]any  `json:"capabilities"`
}

type recordNetwork struct {
	File   string          `json:"file"`
	IfName string          `json:"ifName"`
	List   json.RawMessage `json:"list"`
}

type records struct{ dir string }

func openRecords(dir string) (records, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return records{}, fmt.Errorf("make folder for attachments: %w", err)
	}
	return records{dir}, nil
}

const recordSuffix = ".json"

func (r records) path(id string) string { return filepath.Join(r.dir, id+recordSuffix) }

// create writes a record; fs.ErrExist if there is one.
func (r records) create(rec record) (err error) {
	data, err := json.Marshal(rec)
	if err != nil {
		return fmt.Errorf("encode attachment: %w", err)
	}
	f, err := os.OpenFile(r.path(rec.ID), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("record attachment: %w", err)
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("record attachment: %w", errors.Join(err, os.Remove(r.path(rec.ID))))
	}
	return nil
}

// read returns nil when there is no record, or one that a crash cut off.
func (r records) read(id string) (*record, error) {
	data, err := os.ReadFile(r.path(id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read attachment: %w", err)
	}
	var rec record
	if json.Unmarshal(data, &rec) != nil {
		return nil, nil //nolint:nilerr // see above
	}
	return &rec, nil
}

func (r records) remove(id string) error {
	if err := os.Remove(r.path(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget attachment: %w", err)
	}
	return nil
}

func (r records) ids() ([]string, error) {
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		return nil, fmt.Errorf("list attachments: %w", err)
	}
	var out []string
	for _, e := range entries {
		if id, ok := strings.CutSuffix(e.Name(), recordSuffix); ok {
			out = append(out, id)
		}
	}
	return out, nil
}

// networks parses what was recorded.
func (r *record) networks() ([]confNetwork, error) {
	var out []confNetwork
	for _, n := range r.Networks {
		list, err := parseConf(n.List, true)
		if err != nil {
			return nil, fmt.Errorf("recorded network of %s: %w", n.File, err)
		}
		out = append(out, confNetwork{file: n.File, ifName: n.IfName, list: list, raw: n.List})
	}
	return out, nil
}
