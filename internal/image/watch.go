package image

import (
	"context"
	"sync"
)

// arrivals tells watchers of a name when its pull begins.
type arrivals struct {
	mu     sync.Mutex
	byName map[string][]chan *flight
}

func (a *arrivals) announce(name string, f *flight) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, ch := range a.byName[name] {
		ch <- f // holds one; its watcher takes no second
	}
	delete(a.byName, name)
}

func (a *arrivals) expect(name string) (<-chan *flight, func()) {
	ch := make(chan *flight, 1)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.byName == nil {
		a.byName = make(map[string][]chan *flight)
	}
	a.byName[name] = append(a.byName[name], ch)
	return ch, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		for i, c := range a.byName[name] {
			if c == ch {
				a.byName[name] = append(a.byName[name][:i:i], a.byName[name][i+1:]...)
				break
			}
		}
		if len(a.byName[name]) == 0 {
			delete(a.byName, name)
		}
	}
}

// Watch follows the pull of ref that is under way, or the next one that
// begins, and returns when that has ended in whatever way or ctx is done.
// tell is called as PullRequest.Progress is.
func (s *Store) Watch(ctx context.Context, ref string, tell func(Progress)) error {
	name, err := parseName(ref)
	if err != nil {
		return err
	}
	begins, forget := s.arrivals.expect(name.String())
	defer forget()
	f := s.underWay(name.String())
	if f == nil {
		select {
		case f = <-begins:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	unsubscribe := f.track.subscribe(tell)
	defer unsubscribe()
	select {
	case <-f.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *Store) underWay(name string) *flight {
	s.flights.mu.Lock()
	defer s.flights.mu.Unlock()
	for id, f := range s.flights.byID {
		if id.name == name {
			return f
		}
	}
	return nil
}
