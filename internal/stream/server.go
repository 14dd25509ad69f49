package stream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// headerTimeout bounds how long a client may take over its request's head.
const headerTimeout = 30 * time.Second

// Server hands out URLs and serves them.
type Server struct {
	o      Options
	rt     runtime
	tokens *tokens
	linger time.Duration
	http   *http.Server
	end    context.CancelFunc // ends all requests

	mu       sync.Mutex // guards conns, base, closed and adding to work
	conns    *connSet
	base     *url.URL // nil until Start
	closed   bool
	work     sync.WaitGroup // the accept loop and running requests
	serveErr error          // of the accept loop; read after work is done
}

// New makes a server that streams to rt. It does not listen before Start.
func New(o Options, rt Runtime) (*Server, error) {
	o.setDefaults()
	if o.IdleTimeout < 0 || o.CreationTimeout < 0 || o.TokenLife < 0 {
		return nil, fmt.Errorf("streaming server: time-outs must not be negative: %w", errdefs.ErrInvalidArgument)
	}
	config, err := o.TLS.config(o.Address)
	if err != nil {
		return nil, err
	}
	s := &Server{o: o, tokens: newTokens(o.TokenLife), linger: lingerTime}
	s.rt = runtime{rt: rt, log: o.Log}
	ctx, cancel := context.WithCancel(context.Background())
	s.end = cancel
	s.http = &http.Server{
		Handler:           s.handler(),
		TLSConfig:         config,
		TLSNextProto:      map[string]func(*http.Server, *tls.Conn, http.Handler){}, // HTTP/2 cannot be upgraded
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       time.Minute,
		ErrorLog:          slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext:       withConn,
		ConnState: func(nc net.Conn, state http.ConnState) {
			if c := under(nc); c != nil && state == http.StateHijacked {
				c.upgraded.Store(true)
			}
		},
	}
	return s, nil
}

// Start listens, and serves in the background until Close.
func (s *Server) Start() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.base != nil {
		return fmt.Errorf("the streaming server was started before: %w", errdefs.ErrFailedPrecondition)
	}
	network := "tcp"
	if ip, err := netip.ParseAddr(s.o.Address); err == nil && ip.Is4() {
		network = "tcp4" // otherwise 0.0.0.0 would take IPv6 in
	}
	l, err := net.Listen(network, net.JoinHostPort(s.o.Address, s.o.Port))
	if err != nil {
		return fmt.Errorf("listen for exec, attach and port-forward: %w", err)
	}
	s.conns = newConnSet(l, s.linger)
	s.base = &url.URL{Scheme: "http", Host: reachable(l.Addr())}
	var serve net.Listener = s.conns
	if s.o.TLS.Enable {
		s.base.Scheme = "https"
		serve = tls.NewListener(s.conns, s.http.TLSConfig)
	}
	s.work.Go(func() {
		if err := s.http.Serve(serve); !errors.Is(err, http.ErrServerClosed) {
			s.serveErr = err
			s.o.Log.Error("the streaming server ended", "error", err)
		}
	})
	s.o.Log.Info("streaming server listens", "address", l.Addr().String(), "tls", s.o.TLS.Enable)
	return nil
}

// reachable is the listener's address as a client on this machine dials it.
func reachable(a net.Addr) string {
	t, ok := a.(*net.TCPAddr)
	if !ok || !t.IP.IsUnspecified() {
		return a.String()
	}
	// A wildcard of IPv6 may or may not take IPv4 in; its own family always works.
	host := "127.0.0.1"
	if t.IP.To4() == nil {
		host = "::1"
	}
	return net.JoinHostPort(host, fmt.Sprint(t.Port))
}

// Close ends all streams and waits for them until ctx is done.
func (s *Server) Close(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	conns := s.conns
	s.mu.Unlock()
	s.end()
	if conns == nil {
		return nil
	}
	s.http.Close()
	done := make(chan struct{})
	go func() {
		s.work.Wait()
		close(done)
	}()
	// Streams end on their own now, with a status for the client; those that
	// do not lose their connection.
	grace := time.NewTimer(time.Second)
	defer grace.Stop()
	select {
	case <-done:
	case <-grace.C:
	case <-ctx.Done():
	}
	conns.closeAll()
	select {
	case <-done:
		return s.serveErr
	case <-ctx.Done():
		return fmt.Errorf("wait for the streams to end: %w", ctx.Err())
	}
}

// begin counts a request as running, unless the server is closing.
func (s *Server) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.work.Add(1)
	return true
}
