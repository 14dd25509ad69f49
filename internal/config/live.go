package config

import (
	"errors"
	"log/slog"
	"path/filepath"
	"reflect"
	"slices"
	"sync"
	"time"

	"cloister.dev/internal/osutil/watch"
)

// Follow says what a Live does.
type Follow struct {
	// Load reads the files, and whatever wins over them.
	Load func() (Config, error)
	// Apply puts what is live of a configuration into force, all of it or, with
	// an error, nothing.
	Apply func(Config) error
	Log   *slog.Logger
}

// Live keeps a configuration as its files are: it reads them again when they
// change and when it is told to. What is refused changes nothing.
type Live struct {
	f     Follow
	boot  Config
	asked chan struct{} // reload, even if nothing has changed
	saw   chan struct{} // a file may have changed
	done  chan struct{}
	wg    sync.WaitGroup

	watchers map[string]*watch.Watcher // by folder; of run alone

	mu    sync.Mutex // guards state
	state LiveState
}

// LiveState is what is in force, and what is not.
type LiveState struct {
	Config Config
	// Generation counts the configurations that came into force.
	Generation int
	// Since is when the last one did.
	Since time.Time
	// Refused is why the files, as they are now, are not in force; or nil.
	Refused error
	// Waiting are keys that were changed and act when the daemon starts again.
	Waiting []string
}

// NewLive follows the files of a configuration that is in force.
func NewLive(boot Config, f Follow) *Live {
	l := &Live{f: f, boot: boot, asked: make(chan struct{}, 1), saw: make(chan struct{}, 1), done: make(chan struct{}),
		watchers: map[string]*watch.Watcher{}, state: LiveState{Config: boot, Generation: 1, Since: time.Now()}}
	l.follow(boot.Folders)
	l.wg.Go(l.run)
	return l
}

// Close ends it. A reload that is under way is finished.
func (l *Live) Close() error {
	close(l.done)
	l.wg.Wait()
	var errs []error
	for _, w := range l.watchers {
		errs = append(errs, w.Close())
	}
	return errors.Join(errs...)
}

// Reload has the files read again soon.
func (l *Live) Reload() { wake(l.asked) }

// State is the state now.
func (l *Live) State() LiveState {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state
}

func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // it will be, already
	}
}

func (l *Live) run() {
	for {
		select {
		case <-l.done:
			return
		case <-l.asked:
			l.reload(true)
		case <-l.saw:
			l.reload(false)
		}
	}
}

// reload reads the files and puts them into force, if told to or if they say
// something new.
func (l *Live) reload(told bool) {
	next, err := l.f.Load()
	old := l.State()
	if err == nil && !told && reflect.DeepEqual(next, old.Config) {
		l.note(old, nil)
		return
	}
	if err == nil {
		err = l.f.Apply(next)
	}
	if err != nil {
		l.note(old, err)
		return
	}
	l.follow(next.Folders)
	s := LiveState{Config: next, Generation: old.Generation + 1, Since: time.Now(), Waiting: waiting(l.boot, next)}
	l.mu.Lock()
	l.state = s
	l.mu.Unlock()
	l.f.Log.Info("configuration reloaded", "generation", s.Generation, "files", next.Files)
	for _, w := range next.Warnings {
		if !slices.Contains(old.Config.Warnings, w) {
			l.f.Log.Warn("configuration", "where", w.Where, "key", w.Key, "message", w.Message)
		}
	}
	if len(s.Waiting) > 0 && !slices.Equal(s.Waiting, old.Waiting) {
		l.f.Log.Warn("changed keys act when the daemon starts again", "keys", s.Waiting)
	}
}

// note tells of files that are not in force, or are again.
func (l *Live) note(old LiveState, refused error) {
	switch {
	case refused != nil && (old.Refused == nil || old.Refused.Error() != refused.Error()):
		l.f.Log.Error("configuration refused; the one before stays in force", "err", refused)
	case refused == nil && old.Refused != nil:
		l.f.Log.Info("configuration is again what is in force")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.state.Refused = refused
}

// follow watches the folders of a configuration's files.
func (l *Live) follow(folders []string) {
	for dir, w := range l.watchers {
		if !slices.Contains(folders, dir) {
			if err := w.Close(); err != nil {
				l.f.Log.Warn("stop watching a folder", "dir", dir, "err", err)
			}
			delete(l.watchers, dir)
		}
	}
	for _, dir := range folders {
		if l.watchers[dir] != nil {
			continue
		}
		w, err := watch.Folder(dir, func() { wake(l.saw) })
		if err != nil {
			l.f.Log.Warn("changes of the configuration are noticed on SIGHUP alone", "dir", dir, "err", err)
			continue
		}
		l.watchers[dir] = w
	}
}

// waiting lists the keys that differ and are not live.
func waiting(a, b Config) []string {
	var keys []string
	compare := func(x, y Config) {
		other := reflect.ValueOf(documentOf(&y))
		walkValues(reflect.ValueOf(documentOf(&x)), nil, false, func(e element) {
			_, idle := idle(e.path)
			if idle || isLive(e.path) || e.path.equals("imports") || slices.Contains(keys, e.path.String()) {
				return
			}
			if !reflect.DeepEqual(valueAt(reflect.ValueOf(documentOf(&x)), e.path), valueAt(other, e.path)) {
				keys = append(keys, e.path.String())
			}
		})
	}
	compare(a, b)
	compare(b, a) // what only one of them has
	slices.Sort(keys)
	return keys
}

// foldersOf are the folders of files and patterns.
func foldersOf(paths []string) []string {
	var dirs []string
	for _, p := range paths {
		if abs, err := filepath.Abs(filepath.Dir(p)); err == nil && !slices.Contains(dirs, abs) {
			dirs = append(dirs, abs)
		}
	}
	return dirs
}

// Deprecated gives the warnings of keys that act and were replaced, but for
// those that the configuration has told to ignore.
func (c Config) Deprecated() []Warning {
	ignored := c.Runtime.IgnoreDeprecationWarnings
	return slices.DeleteFunc(slices.Clone(c.Warnings), func(w Warning) bool {
		return !w.Deprecated || slices.Contains(ignored, "*") || slices.Contains(ignored, w.Key)
	})
}
