package pod

import (
	"testing"
	"time"
)

func TestWritableLayerNeverHoldsUpItsCaller(t *testing.T) {
	m := newMachine(t, Options{})
	id := newID()
	m.rootfs(t, id)
	var release []func() // as long as these are held, no walk begins
	for range layerWidth {
		r, err := m.stats.walks.acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		release = append(release, r)
	}
	begin := time.Now()
	if _, ok := m.layerSize(t.Context(), id, begin.Add(20*time.Millisecond)); ok {
		t.Error("a size came from nowhere")
	}
	if took := time.Since(begin); took < 20*time.Millisecond || took > 5*time.Second {
		t.Errorf("the first call waited %v", took)
	}
	l := &m.stats.container(id).layer
	old := layerSize{at: time.Now().Add(-time.Hour), bytes: 42}
	l.mu.Lock()
	l.size, l.known = old, true
	walked := l.walked
	l.mu.Unlock()
	if size, ok := m.layerSize(t.Context(), id, time.Now().Add(time.Hour)); !ok || size != old {
		t.Errorf("while it is measured again: %+v", size)
	}
	for _, r := range release {
		r()
	}
	<-walked
	if size, ok := m.layerSize(t.Context(), id, time.Now()); !ok || size.bytes == 42 || time.Since(size.at) > time.Minute {
		t.Errorf("after the walk: %+v", size)
	}
}
