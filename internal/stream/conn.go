package stream

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// lingerTime is how long a connection stays after its request was served, so
// that the last frames reach the client before the socket is closed.
const lingerTime = 10 * time.Second

// conn is a client's connection. The HTTP server stops to watch a connection
// that was upgraded; SPDY and WebSocket keep reading it, so the end of reading
// is how the client's leaving is noticed.
type conn struct {
	net.Conn
	set      *connSet
	gone     context.CancelFunc // the client left; set before the first read
	upgraded atomic.Bool
	closed   atomic.Bool
	linger   atomic.Pointer[time.Timer]
}

func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	// A deadline in the past is how net/http ends its own read on upgrade.
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.gone()
	}
	return n, err
}

// Close may be repeated: the protocols, the server and the linger timer all
// close, each for its own reason.
func (c *conn) Close() error {
	if c.closed.Swap(true) {
		return nil
	}
	c.gone()
	if t := c.linger.Load(); t != nil {
		t.Stop()
	}
	c.set.remove(c)
	return c.Conn.Close()
}

// served notes that the request of an upgraded connection is over. The
// protocols close the connection themselves, but not on all of their error
// paths.
func (c *conn) served() {
	if c.upgraded.Load() && !c.closed.Load() {
		c.linger.Store(time.AfterFunc(c.set.linger, func() { c.Close() }))
	}
}

// connSet is a listener that knows the open connections it accepted.
type connSet struct {
	net.Listener
	linger time.Duration
	mu     sync.Mutex
	open   map[*conn]struct{}
}

func newConnSet(l net.Listener, linger time.Duration) *connSet {
	return &connSet{Listener: l, linger: linger, open: map[*conn]struct{}{}}
}

func (s *connSet) Accept() (net.Conn, error) {
	nc, err := s.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &conn{Conn: nc, set: s, gone: func() {}}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open[c] = struct{}{}
	return c, nil
}

func (s *connSet) remove(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, c)
}

func (s *connSet) closeAll() {
	s.mu.Lock()
	open := make([]*conn, 0, len(s.open))
	for c := range s.open {
		open = append(open, c)
	}
	s.mu.Unlock()
	for _, c := range open {
		c.Close()
	}
}

type connKey struct{}

// under finds our connection below a TLS one.
func under(nc net.Conn) *conn {
	if t, ok := nc.(interface{ NetConn() net.Conn }); ok {
		nc = t.NetConn()
	}
	c, _ := nc.(*conn)
	return c
}

// withConn is the context of all requests on nc; it ends when the client goes.
func withConn(ctx context.Context, nc net.Conn) context.Context {
	c := under(nc)
	if c == nil {
		return ctx
	}
	ctx, c.gone = context.WithCancel(ctx)
	return context.WithValue(ctx, connKey{}, c)
}
