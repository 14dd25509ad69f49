package vm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/host/vm/machine"
	"cloister.dev/internal/host/vm/share"
)

// leftovers finds the machines of probes that an earlier life of this program
// did not end: the folders of machines that belong to no sandbox. Nothing
// of this life runs yet.
func (b *Backend) leftovers() []string {
	dirs, err := os.ReadDir(filepath.Join(b.dir, machinesDir))
	if err != nil || len(dirs) == 0 {
		return nil // there has been no machine yet
	}
	sandboxes, err := os.ReadDir(filepath.Join(b.dir, sandboxesDir))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		b.log.Error("sandboxes not listed, machines of probes may be left", "err", err)
		return nil
	}
	used := map[string]bool{}
	for _, s := range sandboxes {
		if id := s.Name(); !strings.HasPrefix(id, probePrefix) {
			used[b.shortDir(id)] = true
		}
	}
	var left []string
	for _, d := range dirs {
		if dir := filepath.Join(b.dir, machinesDir, d.Name()); !used[dir] {
			left = append(left, dir)
		}
	}
	return left
}

// clear ends the machines of folders and removes these.
func (b *Backend) clear(dirs []string) {
	for _, dir := range dirs {
		if err := b.end(dir); err != nil {
			b.log.Error("machine of a probe is left", "dir", dir, "err", err)
			continue
		}
		b.log.Info("machine of an earlier probe ended", "dir", dir)
	}
}

func (b *Backend) end(dir string) error {
	ctx, cancel := context.WithTimeout(b.ctx, stopTime)
	defer cancel()
	m, err := machine.Attach(ctx, b.reaper, machine.State{ID: probePrefix + filepath.Base(dir), Dir: dir}, nil)
	if err == nil {
		err = m.Kill(ctx)
		m.Close()
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	if err := share.Attach(b.reaper, share.State{Dir: dir}).Stop(ctx); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}
