package cni

import (
	"path/filepath"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
)

// settleTime lets whoever writes files into the folder finish.
const settleTime = 50 * time.Millisecond

// watcher calls reload after changes in a folder, which may appear, disappear
// and be replaced.
type watcher struct {
	dir    string
	fs     *fsnotify.Watcher
	reload func()
	wg     sync.WaitGroup
}

func watch(dir string, reload func()) (*watcher, error) {
	fs, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, err
	}
	w := &watcher{dir: filepath.Clean(dir), fs: fs, reload: reload}
	w.follow()
	w.wg.Go(w.run)
	return w, nil
}

// follow watches the folder, and the nearest folder above it that is there,
// where it would appear or be replaced.
func (w *watcher) follow() {
	_ = w.fs.Add(w.dir) // absent is fine, and twice is
	for up := filepath.Dir(w.dir); ; up = filepath.Dir(up) {
		if w.fs.Add(up) == nil || up == filepath.Dir(up) {
			return
		}
	}
}

func (w *watcher) run() {
	timer := time.NewTimer(0)
	<-timer.C
	for {
		select {
		case e, ok := <-w.fs.Events:
			if !ok {
				return
			}
			if w.concerns(e.Name) {
				timer.Reset(settleTime)
			}
		case _, ok := <-w.fs.Errors:
			if !ok {
				return
			}
			timer.Reset(settleTime) // events may be lost
		case <-timer.C:
			w.follow()
			w.reload()
		}
	}
}

// concerns tells changes in the folder and on the way to it from those beside
// it.
func (w *watcher) concerns(name string) bool {
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

func (w *watcher) close() error {
	err := w.fs.Close()
	w.wg.Wait()
	return err
}
