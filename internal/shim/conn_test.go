package shim

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
)

// newDialer gives one whose connections are made by connect, and lead nowhere.
func newDialer(connect func() error) *dialer {
	return &dialer{connect: func(context.Context) (*conn, error) {
		if err := connect(); err != nil {
			return nil, err
		}
		return &conn{closed: make(chan struct{})}, nil
	}}
}

func TestCall(t *testing.T) {
	refused := errors.New("connection refused")
	tests := []struct {
		name       string
		repeatable bool
		connect    error
		answers    []error // of the calls in turn, the last one again and again
		want       func(error) bool
		asked      int // 0: many times
	}{
		{"fine", false, nil, []error{nil}, nil, 1},
		{"an answer is an answer", true, nil, []error{errgrpc.ToGRPC(fmt.Errorf("no x: %w", errdefs.ErrNotFound))}, errdefs.IsNotFound, 1},
		{"broken once", true, nil, []error{ttrpc.ErrClosed, nil}, nil, 2},
		{"broken, and what it did is unknown", false, nil, []error{ttrpc.ErrClosed, nil}, errdefs.IsUnavailable, 1},
		{"broken for ever", true, nil, []error{ttrpc.ErrClosed}, errdefs.IsUnavailable, 0},
		{"nobody there", true, refused, nil, errdefs.IsUnavailable, 0},
		{"it has ended", true, fmt.Errorf("dial: %w", errGone), nil, errdefs.IsNotFound, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				asked := 0
				began := time.Now()
				err := newDialer(func() error { return tt.connect }).call(t.Context(), tt.repeatable, func(context.Context, *conn) error {
					asked++
					return tt.answers[min(asked, len(tt.answers))-1]
				})
				if tt.want == nil && err != nil || tt.want != nil && !tt.want(err) {
					t.Errorf("got %v", err)
				}
				if tt.asked != 0 && asked != tt.asked {
					t.Errorf("asked %d times, want %d", asked, tt.asked)
				}
				if took := time.Since(began); took > repeatTime+2*time.Second || errors.Is(err, errGone) && took != 0 {
					t.Errorf("it took %v", took)
				}
			})
		})
	}
}

// A Wait may break after hours, with the shim that is being started again.
func TestALongCallGetsTheWholeTimeToRepeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const wait, away = time.Hour, repeatTime / 2
		began := time.Now()
		err := newDialer(func() error { return nil }).call(t.Context(), true, func(context.Context, *conn) error {
			switch since := time.Since(began); {
			case since == 0:
				time.Sleep(wait)
				return ttrpc.ErrClosed
			case since < wait+away:
				return ttrpc.ErrClosed
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
}

func TestCallEndsWithItsCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := newDialer(func() error { return nil }).call(ctx, true, func(context.Context, *conn) error { return ttrpc.ErrClosed })
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}

// While nobody answers, every caller waits as long as it wants to and no
// longer, and one attempt serves all.
func TestCallersOfAShimThatHangsWaitOnTheirOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		attempts, answer := 0, make(chan struct{})
		d := &dialer{connect: func(ctx context.Context) (*conn, error) {
			attempts++
			select {
			case <-answer:
				return &conn{closed: make(chan struct{})}, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}}
		began := time.Now()
		fine := func(context.Context, *conn) error { return nil }
		patient := make(chan error, 1)
		go func() { patient <- d.call(t.Context(), true, fine) }()
		for range 3 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if err := d.call(ctx, true, fine); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v", err)
			}
			cancel()
		}
		if took := time.Since(began); took != 3*time.Second {
			t.Errorf("three callers with a second each took %v", took)
		}
		close(answer)
		if err := <-patient; err != nil || attempts != 1 {
			t.Errorf("got %v after %d attempts", err, attempts)
		}
	})
}

func TestCloseEndsAnAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &dialer{connect: func(ctx context.Context) (*conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}}
		waiting := make(chan error, 1)
		go func() {
			_, err := d.get(t.Context())
			waiting <- err
		}()
		synctest.Wait()
		began := time.Now()
		d.close()
		if err := <-waiting; err == nil || time.Since(began) != 0 {
			t.Errorf("got %v after %v", err, time.Since(began))
		}
		if _, err := d.get(t.Context()); !errdefs.IsUnavailable(err) {
			t.Errorf("after the end: %v", err)
		}
	})
}
