package image

import (
	"context"
	"sync"
)

// keyedLock keeps two pulls from doing the same work at a time: one fetches a
// blob or unpacks a layer, the other waits and finds it done. The zero value is
// ready. It satisfies containerd's unpack.KeyedLocker.
type keyedLock struct {
	mu    sync.Mutex
	locks map[string]*keyed
}

type keyed struct {
	turn  chan struct{}
	users int
}

// Lock waits for the key, or for the end of ctx.
func (l *keyedLock) Lock(ctx context.Context, key string) error {
	l.mu.Lock()
	if l.locks == nil {
		l.locks = make(map[string]*keyed)
	}
	k := l.locks[key]
	if k == nil {
		k = &keyed{turn: make(chan struct{}, 1)}
		l.locks[key] = k
	}
	k.users++
	l.mu.Unlock()
	select {
	case k.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		l.leave(key, k)
		return context.Cause(ctx)
	}
}

// Unlock gives the key to the next one.
func (l *keyedLock) Unlock(key string) {
	l.mu.Lock()
	k := l.locks[key]
	l.mu.Unlock()
	<-k.turn
	l.leave(key, k)
}

func (l *keyedLock) leave(key string, k *keyed) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if k.users--; k.users == 0 {
		delete(l.locks, key)
	}
}
