package pod

import (
	"context"
	"errors"
	"sync"
	"time"
)

// cell keeps the newest value of a repeated measurement. Its zero value holds
// none.
type cell[T any] struct {
	mu      sync.Mutex // leaf lock, never held while measuring
	at      time.Time  // zero: no value yet
	value   T
	current *flight[T] // the measurement under way
}

type flight[T any] struct {
	done  chan struct{} // closed when value and err are final
	value T
	err   error
}

// get gives a value that is younger than maxAge, measuring when there is none;
// measure gets the last one. Who comes meanwhile waits for the same result.
func (c *cell[T]) get(ctx context.Context, maxAge time.Duration, measure func(context.Context, T) (T, error)) (T, error) {
	for {
		c.mu.Lock()
		if c.fresh(maxAge) {
			defer c.mu.Unlock()
			return c.value, nil
		}
		f := c.current
		if f == nil {
			f = &flight[T]{done: make(chan struct{})}
			c.current = f
			last := c.value
			c.mu.Unlock()
			return c.measure(ctx, f, last, measure)
		}
		c.mu.Unlock()
		select {
		case <-f.done:
		case <-ctx.Done():
			var none T
			return none, ctx.Err()
		}
		// The caller who measured may have been less patient than we are.
		if !errors.Is(f.err, context.Canceled) && !errors.Is(f.err, context.DeadlineExceeded) || ctx.Err() != nil {
			return f.value, f.err
		}
	}
}

func (c *cell[T]) fresh(maxAge time.Duration) bool {
	return !c.at.IsZero() && time.Since(c.at) < maxAge
}

func (c *cell[T]) measure(ctx context.Context, f *flight[T], last T, measure func(context.Context, T) (T, error)) (T, error) {
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if f.err == nil {
			c.value, c.at = f.value, time.Now()
		}
		c.current = nil
		close(f.done)
	}()
	f.err = errUnmeasured // what others see if measure panics
	f.value, f.err = measure(ctx, last)
	return f.value, f.err
}

var errUnmeasured = errors.New("the measurement was cut off")

// last gives the last value and its age, whatever that is.
func (c *cell[T]) last() (v T, age time.Duration, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.value, time.Since(c.at), !c.at.IsZero()
}
