package image

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
)

// progressPeriod is how often callers hear of a pull.
const progressPeriod = 100 * time.Millisecond

var errNoSeek = errors.New("the registry's answer cannot be resumed")

// tracker follows the layers of a pull and tells subscribers.
type tracker struct {
	ref string

	mu    sync.Mutex
	order []digest.Digest
	state map[digest.Digest]*LayerProgress
	dirty bool

	tell sync.Mutex // one report at a time; held while subscribers are called
	subs map[int]func(Progress)
	next int
}

func newTracker(ref string) *tracker {
	return &tracker{ref: ref, state: make(map[digest.Digest]*LayerProgress), subs: make(map[int]func(Progress))}
}

func (t *tracker) subscribe(f func(Progress)) (unsubscribe func()) {
	if f == nil {
		return func() {}
	}
	t.tell.Lock()
	defer t.tell.Unlock()
	id := t.next
	t.next++
	t.subs[id] = f
	return func() {
		t.tell.Lock()
		defer t.tell.Unlock()
		delete(t.subs, id)
	}
}

func (t *tracker) report(ctx context.Context, done <-chan struct{}) {
	tick := time.NewTicker(progressPeriod)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-ctx.Done():
			return
		case <-tick.C:
			t.flush()
		}
	}
}

// flush tells all subscribers the present state, if it changed.
func (t *tracker) flush() {
	t.tell.Lock()
	defer t.tell.Unlock()
	t.mu.Lock()
	if !t.dirty {
		t.mu.Unlock()
		return
	}
	t.dirty = false
	p := Progress{Ref: t.ref, Layers: make([]LayerProgress, 0, len(t.order))}
	for _, d := range t.order {
		p.Layers = append(p.Layers, *t.state[d])
	}
	t.mu.Unlock()
	for _, f := range t.subs {
		f(p)
	}
}

func (t *tracker) layers(list []imagespec.Descriptor) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, d := range list {
		if t.state[d.Digest] == nil {
			t.order = append(t.order, d.Digest)
			t.state[d.Digest] = &LayerProgress{Digest: d.Digest, Total: d.Size, State: LayerWaiting}
		}
	}
	t.dirty = true
}

func (t *tracker) set(d digest.Digest, state LayerState, offset int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if l := t.state[d]; l != nil {
		l.State, l.Offset = state, min(offset, l.Total)
		t.dirty = true
	}
}

func (t *tracker) fetched(d imagespec.Descriptor) { t.set(d.Digest, LayerDownloaded, d.Size) }

func (t *tracker) extracted(d imagespec.Descriptor, offset int64) {
	t.set(d.Digest, LayerExtracting, offset)
}

func (t *tracker) finish() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, l := range t.state {
		l.State, l.Offset = LayerDone, l.Total
	}
	t.dirty = true
}

// tracked is the fetcher with the tracker looking on.
func (p *puller) tracked() remotes.Fetcher {
	return remotes.FetcherFunc(func(ctx context.Context, desc imagespec.Descriptor) (io.ReadCloser, error) {
		fetcher := p.fetcher
		if p.inParts(desc) {
			fetcher = p.parts
		}
		rc, err := fetcher.Fetch(ctx, desc)
		if err != nil {
			return nil, err
		}
		return &trackedReader{ReadCloser: rc, track: p.track, digest: desc.Digest}, nil
	})
}

type trackedReader struct {
	io.ReadCloser
	track  *tracker
	digest digest.Digest
	offset int64
}

func (r *trackedReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	if n > 0 {
		r.offset += int64(n)
		r.track.set(r.digest, LayerDownloading, r.offset)
	}
	return n, err
}

// Seek lets a fetch go on where an earlier one stopped.
func (r *trackedReader) Seek(offset int64, whence int) (int64, error) {
	s, ok := r.ReadCloser.(io.Seeker)
	if !ok {
		return 0, errNoSeek
	}
	n, err := s.Seek(offset, whence)
	if err == nil {
		r.offset = n
	}
	return n, err
}
