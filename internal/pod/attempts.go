package pod

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// attempts lets a creation outlive the caller that gave up on it: the work
// goes on, and a repeat of the same request finds it running or done. The
// reservation of a name lasts as long as its sandbox or container.
type attempts struct {
	mu     sync.Mutex // leaf lock; never held across I/O
	byName map[string]*attempt
}

type attempt struct {
	hash  string
	id    string
	stage string        // what it is doing, for errors; guarded by attempts.mu
	done  chan struct{} // closed when err is final
	err   error
}

// createTime bounds a creation that nobody waits for any more.
const createTime = 4 * time.Minute

func (a *attempts) init() { a.byName = map[string]*attempt{} }

// reserve notes a name that a recovered record holds.
func (a *attempts) reserve(name, hash, id string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	done := make(chan struct{})
	close(done)
	a.byName[name] = &attempt{hash: hash, id: id, done: done, stage: "made"}
}

// release forgets the name, if it is still the one of id.
func (a *attempts) release(name, id string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if at := a.byName[name]; at != nil && at.id == id {
		delete(a.byName, name)
	}
}

// create joins the attempt that is making, or has made, name from an equal
// request, or starts one with work. The answer is the id of the thing made.
func (s *Service) create(ctx context.Context, what, name, hash string, work func(ctx context.Context, id string, stage func(string)) error) (string, error) {
	at, err := s.join(ctx, what, name, hash, work)
	if err != nil {
		return "", err
	}
	select {
	case <-at.done:
		return at.id, at.err
	case <-ctx.Done():
		return "", fmt.Errorf("%s %s is still being made (%s); repeat the request to get it: %w", what, name, s.attempts.stageOf(at), ctx.Err())
	}
}

func (a *attempts) stageOf(at *attempt) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return at.stage
}

// sandboxObject is what create calls a sandbox.
const sandboxObject = "pod sandbox"

func (s *Service) join(caller context.Context, what, name, hash string, work func(context.Context, string, func(string)) error) (*attempt, error) {
	a := &s.attempts
	a.mu.Lock()
	defer a.mu.Unlock()
	if at := a.byName[name]; at != nil {
		if at.hash != hash {
			return nil, fmt.Errorf("%s %s exists with another configuration (id %.13s, %s); remove that one or raise the attempt number: %w",
				what, name, at.id, at.stage, errdefs.ErrAlreadyExists)
		}
		return at, nil
	}
	if s.ctx.Err() != nil {
		return nil, errClosing
	}
	at := &attempt{hash: hash, id: newID(), stage: "starting", done: make(chan struct{})}
	a.byName[name] = at
	s.work.Go(func() {
		ctx, cancel := context.WithTimeout(s.ctx, createTime)
		defer cancel()
		st := s.o.Observer.follow(ctx, caller, what, at.stage)
		at.err = work(st.ctx, at.id, func(stage string) {
			a.mu.Lock()
			ended := at.stage
			at.stage = stage
			a.mu.Unlock()
			s.log.Debug("stage of a creation ended", "id", at.id, "stage", ended, "took", st.next(ended, stage))
		})
		st.end(at.err)
		if at.err != nil {
			a.release(name, at.id)
		}
		close(at.done)
	})
	return at, nil
}
