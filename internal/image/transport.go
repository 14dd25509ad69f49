package image

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/textproto"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
)

// guard is the transport of a pull. It meters traffic, bounds every answer
// that is not a blob (blobs are bounded by their descriptors), and keeps a
// redirect to another host from carrying anything that was meant for the
// registry.
type guard struct {
	next    http.RoundTripper
	session *session
}

// CloseIdleConnections lets http.Client reach the transport below.
func (g *guard) CloseIdleConnections() {
	if c, ok := g.next.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}

func (g *guard) RoundTrip(req *http.Request) (*http.Response, error) {
	first := req
	for first.Response != nil && first.Response.Request != nil {
		first = first.Response.Request
	}
	if first != req && !sameOrigin(first, req) && !g.session.configured(req.URL.Host) {
		req = req.Clone(req.Context())
		strip(req.Header)
	}
	done := g.session.meter.begin()
	resp, err := g.next.RoundTrip(req)
	if err != nil {
		done()
		return nil, err
	}
	g.session.meter.moved()
	if strings.Contains(first.URL.Path, "/manifests/") && resp.ContentLength > docker.MaxManifestSize {
		done()
		_ = resp.Body.Close()
		return nil, fmt.Errorf("manifest of %d bytes, the limit is %d: %w", resp.ContentLength, docker.MaxManifestSize, errdefs.ErrResourceExhausted)
	}
	body := &meteredBody{ReadCloser: resp.Body, meter: g.session.meter, done: done, left: -1}
	if !strings.Contains(first.URL.Path, "/blobs/") {
		body.left = maxDocument
	}
	resp.Body = body
	return resp, nil
}

func sameOrigin(a, b *http.Request) bool {
	return strings.EqualFold(a.URL.Host, b.URL.Host) && (a.URL.Scheme == b.URL.Scheme || b.URL.Scheme == "https")
}

// strip leaves the headers that a blob store needs. net/http drops only some,
// and only between unrelated host names: not between ports, nor towards a
// subdomain.
func strip(h http.Header) {
	for name := range h {
		switch textproto.CanonicalMIMEHeaderKey(name) {
		case "Accept", "Accept-Encoding", "Range", "User-Agent":
		default:
			h.Del(name)
		}
	}
}

// meter knows when a byte last moved and whether any request is open.
type meter struct {
	mu   sync.Mutex
	open int
	last time.Time
}

func newMeter() *meter { return &meter{last: time.Now()} }

// begin counts a request in; the function it returns counts it out, once.
func (m *meter) begin() func() {
	m.mu.Lock()
	if m.open == 0 {
		m.last = time.Now()
	}
	m.open++
	m.mu.Unlock()
	return sync.OnceFunc(func() {
		m.mu.Lock()
		m.open--
		m.mu.Unlock()
	})
}

func (m *meter) moved() {
	m.mu.Lock()
	m.last = time.Now()
	m.mu.Unlock()
}

// stalledFor is how long no byte has moved while a request was open.
func (m *meter) stalledFor(now time.Time) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.open == 0 {
		return 0
	}
	return now.Sub(m.last)
}

// watch cancels the pull when nothing moves for timeout.
func (m *meter) watch(ctx context.Context, timeout time.Duration, cancel context.CancelCauseFunc) {
	t := time.NewTimer(timeout)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			idle := m.stalledFor(now)
			if idle >= timeout {
				cancel(fmt.Errorf("no byte moved for %v, the progress timeout: %w", timeout, context.DeadlineExceeded))
				return
			}
			t.Reset(timeout - idle)
		}
	}
}

type meteredBody struct {
	io.ReadCloser
	meter *meter
	done  func()
	left  int64 // negative: unbounded
}

func (b *meteredBody) Read(p []byte) (int, error) {
	if b.left == 0 {
		var one [1]byte
		if n, err := b.ReadCloser.Read(one[:]); n == 0 {
			return 0, err
		}
		return 0, fmt.Errorf("answer of the registry is longer than %d bytes: %w", maxDocument, errdefs.ErrResourceExhausted)
	}
	if b.left > 0 && int64(len(p)) > b.left {
		p = p[:b.left]
	}
	n, err := b.ReadCloser.Read(p)
	if n > 0 {
		b.meter.moved()
		if b.left > 0 {
			b.left -= int64(n)
		}
	}
	if err != nil {
		b.done()
	}
	return n, err
}

func (b *meteredBody) Close() error {
	b.done()
	return b.ReadCloser.Close()
}
