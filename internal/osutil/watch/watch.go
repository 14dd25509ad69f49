// Package watch follows folders: it tells of changes of the files in one, also
// when the folder itself appears, disappears or is replaced. It promises that a
// change is told after it, and knows nothing of what the files are.
package watch

import (
	"path/filepath"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
)

// settleTime lets whoever writes files into the folder finish, if that ever
// happens within patience.
const (
	settleTime = 50 * time.Millisecond
	patience   = 500 * time.Millisecond
)

// Watcher follows one folder.
type Watcher struct {
	dir     string
	fs      *fsnotify.Watcher
	changed func()
	wg      sync.WaitGroup
}

// Folder calls changed, on one goroutine, after changes in a folder, which may
// be absent for now.
func Folder(dir string, changed func()) (*Watcher, error) {
	fs, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, err
	}
	w := &Watcher{dir: filepath.Clean(dir), fs: fs, changed: changed}
	w.follow()
	w.wg.Go(w.run)
	return w, nil
}

// follow watches the folder, and the nearest folder above it that is there,
// where it would appear or be replaced.
func (w *Watcher) follow() {
	_ = w.fs.Add(w.dir) // absent is fine, and twice is
	for up := filepath.Dir(w.dir); ; up = filepath.Dir(up) {
		if w.fs.Add(up) == nil || up == filepath.Dir(up) {
			return
		}
	}
}

func (w *Watcher) run() {
	timer := time.NewTimer(0)
	<-timer.C
	var first time.Time // of the changes that were not told yet
	note := func() {
		if first.IsZero() {
			first = time.Now()
		}
		timer.Reset(min(settleTime, time.Until(first.Add(patience))))
	}
	for {
		select {
		case e, ok := <-w.fs.Events:
			if !ok {
				return
			}
			if w.concerns(e.Name) {
				note()
			}
		case _, ok := <-w.fs.Errors:
			if !ok {
				return
			}
			note() // events may be lost
		case <-timer.C:
			first = time.Time{}
			w.follow()
			w.changed()
		}
	}
}

// concerns tells changes in the folder and on the way to it from those beside
// it.
func (w *Watcher) concerns(name string) bool {
	name = filepath.Clean(name)
	if filepath.Dir(name) == w.dir {
		return true
	}
	for p := w.dir; p != filepath.Dir(p); p = filepath.Dir(p) {
		if p == name {
			return true
		}
	}
	return false
}

// Close ends it, and waits for a call of changed that is under way.
func (w *Watcher) Close() error {
	err := w.fs.Close()
	w.wg.Wait()
	return err
}
