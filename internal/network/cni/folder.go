package cni

import (
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/osutil/watch"
)

// Folder is a configuration folder.
type Folder struct {
	Dir string
	// MaxConfNum is how many files of it are used, by name; 0: all.
	MaxConfNum int
}

// folder follows a configuration folder.
type folder struct {
	Folder
	log   *slog.Logger
	watch *watch.Watcher

	mu       sync.Mutex
	networks []confNetwork // replaced, never changed
	loadErr  error

	status statusCache
}

func openFolder(at Folder, log *slog.Logger) *folder {
	f := &folder{Folder: at, log: log}
	f.reload()
	var err error
	if f.watch, err = watch.Folder(f.Dir, f.reload); err != nil {
		// Without it the folder is read when there is need.
		log.Warn("changes of the cni config folder will not be noticed", "dir", f.Dir, "err", err)
	}
	return f
}

func (f *folder) close() error {
	if f.watch == nil {
		return nil
	}
	return f.watch.Close()
}

func (f *folder) reload() {
	networks, err := loadFolder(f.Dir, f.MaxConfNum)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.loadErr = err
	if err != nil {
		f.log.Error("cni config not loaded", "dir", f.Dir, "in_force", len(f.networks), "err", err)
		return
	}
	if !slices.EqualFunc(networks, f.networks, func(x, y confNetwork) bool { return x.file == y.file && string(x.raw) == string(y.raw) }) {
		var files []string
		for _, n := range networks {
			files = append(files, n.file)
		}
		f.log.Info("cni config loaded", "files", files)
	}
	f.networks = networks
	f.status.forget()
}

// get returns what is in force, and why something newer is not.
func (f *folder) get() ([]confNetwork, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.networks, f.loadErr
}

// inForce returns the networks, reading the folder again while there are none.
func (f *folder) inForce() ([]confNetwork, error) {
	networks, err := f.get()
	if len(networks) == 0 {
		f.reload()
		networks, err = f.get()
	}
	switch {
	case len(networks) > 0:
		return networks, nil
	case err != nil:
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	return nil, fmt.Errorf("cni config not found in %s: put a .conflist there or set network = \"builtin\": %w", f.Dir, errdefs.ErrUnavailable)
}

// allInForce returns the networks of all folders that have any.
func (s *setup) allInForce() ([]confNetwork, error) {
	all, err := s.main.inForce()
	for _, f := range s.allFolders()[1:] {
		more, moreErr := f.inForce()
		all = append(all, more...)
		if moreErr == nil {
			err = nil
		}
	}
	if len(all) > 0 {
		return all, nil
	}
	return nil, err
}
