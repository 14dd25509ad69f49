package pod

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
)

func newAttempts(t *testing.T) *Service {
	s := &Service{log: slog.New(slog.DiscardHandler)}
	s.attempts.init()
	s.ctx, s.cancel = context.WithCancel(context.Background())
	t.Cleanup(func() { s.cancel(); s.work.Wait() })
	return s
}

func TestRepeatJoinsTheRunningAttempt(t *testing.T) {
	s := newAttempts(t)
	var made atomic.Int32
	release := make(chan struct{})
	work := func(ctx context.Context, id string, stage func(string)) error {
		made.Add(1)
		stage("waiting for the test")
		<-release
		return nil
	}
	impatient, cancel := context.WithCancel(t.Context())
	first := make(chan error)
	go func() {
		_, err := s.create(impatient, "pod", "n", "h", work)
		first <- err
	}()
	for made.Load() == 0 {
		if err := t.Context().Err(); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Fatalf("the caller that gave up got %v", err)
	}
	if _, err := s.create(t.Context(), "pod", "n", "other", work); !errdefs.IsAlreadyExists(err) {
		t.Errorf("another configuration under the same name: %v, want already exists", err)
	}
	ids := make([]string, 3)
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() {
			var err error
			if ids[i], err = s.create(t.Context(), "pod", "n", "h", work); err != nil {
				t.Error(err)
			}
		})
	}
	close(release)
	wg.Wait()
	if ids[0] == "" || ids[0] != ids[1] || ids[1] != ids[2] || made.Load() != 1 {
		t.Errorf("repeats got %v from %d attempts", ids, made.Load())
	}
}

func TestFailedAttemptFreesTheName(t *testing.T) {
	s := newAttempts(t)
	boom := errors.New("boom")
	if _, err := s.create(t.Context(), "pod", "n", "h", func(context.Context, string, func(string)) error { return boom }); !errors.Is(err, boom) {
		t.Fatal(err)
	}
	id, err := s.create(t.Context(), "pod", "n", "h", func(context.Context, string, func(string)) error { return nil })
	if err != nil || id == "" {
		t.Fatalf("after a failure the name cannot be used: %v", err)
	}
	s.attempts.release("n", "another id")
	if again, err := s.create(t.Context(), "pod", "n", "h", nil); err != nil || again != id {
		t.Errorf("a repeat after success got %q, %v; want %q", again, err, id)
	}
}
