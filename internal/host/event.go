package host

import "sync"

// event happens once, and stays so.
type event struct {
	once sync.Once
	c    chan struct{}
}

func newEvent() *event { return &event{c: make(chan struct{})} }

func (e *event) happen() { e.once.Do(func() { close(e.c) }) }

// happened is closed from then on.
func (e *event) happened() <-chan struct{} { return e.c }

// has tells whether it happened.
func (e *event) has() bool {
	select {
	case <-e.c:
		return true
	default:
		return false
	}
}
