package tee

import (
	"context"
	"path/filepath"

	"github.com/fsnotify/fsnotify"
)

// watchFiles begins to watch the files that backends named, and gives what asks
// for a check whenever one comes or goes, until its context ends. It watches
// folders: a file that is not there yet cannot be watched.
func (i *Inventory) watchFiles() func(context.Context) {
	nothing := func(context.Context) {}
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
		return nothing
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		i.o.Log.Warn("watch device nodes; a loss is noticed at the next check only", "err", err)
		return nothing
	}
	for dir := range folders {
		if err := w.Add(dir); err != nil {
			i.o.Log.Debug("watch folder; what happens there is noticed at the next check only", "folder", dir, "err", err)
		}
	}
	return func(ctx context.Context) { i.follow(ctx, w, wanted) }
}

// follow asks for checks of the backends that want a path, and closes w.
func (i *Inventory) follow(ctx context.Context, w *fsnotify.Watcher, wanted map[string][]string) {
	defer w.Close()
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
