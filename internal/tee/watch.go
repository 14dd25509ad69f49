package tee

import (
	"context"
	"path/filepath"

	"github.com/fsnotify/fsnotify"
)

// watchFiles asks for a check whenever a file that a backend named comes or
// goes. It watches folders: a file that is not there yet cannot be watched.
func (i *Inventory) watchFiles(ctx context.Context) {
	wanted := map[string][]string{} // path → backends
	folders := map[string]bool{}
	for _, b := range i.backends {
		w, ok := b.(Watcher)
		if !ok {
			continue
		}
		for _, p := range w.WatchPaths() {
			p = filepath.Clean(p)
			wanted[p] = append(wanted[p], b.Name())
			folders[filepath.Dir(p)] = true
		}
	}
	if len(folders) == 0 {
		return
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		i.o.Log.Warn("watch device nodes; a loss is noticed at the next check only", "err", err)
		return
	}
	defer w.Close()
	for dir := range folders {
		if err := w.Add(dir); err != nil {
			i.o.Log.Debug("watch folder; what happens there is noticed at the next check only", "folder", dir, "err", err)
		}
	}
	for {
		select {
		case <-ctx.Done():
			return
		case e, ok := <-w.Events:
			if !ok {
				return
			}
			if !e.Has(fsnotify.Create) && !e.Has(fsnotify.Remove) && !e.Has(fsnotify.Rename) {
				continue
			}
			for _, backend := range wanted[filepath.Clean(e.Name)] {
				i.Check(backend)
			}
		case err, ok := <-w.Errors:
			if !ok {
				return
			}
			i.o.Log.Warn("watch device nodes", "err", err)
		}
	}
}
