package image

import (
	"context"
	"sync"

	"github.com/distribution/reference"
)

// flights are the pulls under way.
type flights struct {
	mu   sync.Mutex
	byID map[flightID]*flight
}

type flightID struct {
	name, snapshotter, platform, labels string
	auth                                Auth
}

// flight is one pull and those who wait for it. image and err are set before
// done is closed.
type flight struct {
	cancel  context.CancelFunc
	waiters int // guarded by flights.mu
	track   *tracker

	done  chan struct{}
	image Image
	err   error
}

// join takes part in an equal pull under way, or starts one. The caller leaves
// in the end; when nobody is left the pull is cancelled, and a later caller
// starts a new one.
func (s *Store) join(name reference.Named, req PullRequest) (*flight, func(), error) {
	id := flightKey(name, req)
	s.flights.mu.Lock()
	defer s.flights.mu.Unlock()
	if s.isClosing() {
		return nil, nil, errClosing
	}
	f := s.flights.byID[id]
	if f == nil {
		if s.flights.byID == nil {
			s.flights.byID = make(map[flightID]*flight)
		}
		f = s.launch(id, name, req)
		s.flights.byID[id] = f
		s.arrivals.announce(id.name, f)
	}
	f.waiters++
	return f, func() {
		s.flights.mu.Lock()
		defer s.flights.mu.Unlock()
		if f.waiters--; f.waiters == 0 {
			f.cancel()
			s.forget(id, f)
		}
	}, nil
}

// forget removes a flight, unless a later one has its place. flights.mu is held.
func (s *Store) forget(id flightID, f *flight) {
	if s.flights.byID[id] == f {
		delete(s.flights.byID, id)
	}
}

func (s *Store) launch(id flightID, name reference.Named, req PullRequest) *flight {
	ctx, cancel := context.WithCancel(s.ctx)
	f := &flight{cancel: cancel, track: newTracker(name.String()), done: make(chan struct{})}
	s.wg.Go(func() {
		defer cancel()
		reported := make(chan struct{})
		go func() {
			defer close(reported)
			f.track.report(ctx, f.done)
		}()
		f.image, f.err = s.attempt(ctx, name, req, f.track)
		s.flights.mu.Lock()
		s.forget(id, f)
		s.flights.mu.Unlock()
		f.track.flush()
		close(f.done)
		<-reported
	})
	return f
}
