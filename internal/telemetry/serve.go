package telemetry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Health gives why the daemon is not healthy; nothing means that it is.
type Health func(context.Context) []string

// healthTime bounds an answer about health.
const healthTime = 5 * time.Second

// Server serves metrics and health over HTTP.
type Server struct {
	http *http.Server
	done chan struct{}
}

// Serve listens on address, HOST:PORT, and serves until Close.
func Serve(address string, m *Metrics, health Health, log *slog.Logger) (*Server, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("serve metrics: %w", err)
	}
	mux := http.NewServeMux()
	metrics := promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{Registry: m.registry, Timeout: healthTime})
	mux.Handle("GET /metrics", metrics)
	mux.Handle("GET /v1/metrics", metrics) // where containerd has them
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), healthTime)
		defer cancel()
		if reasons := health(ctx); len(reasons) > 0 {
			http.Error(w, strings.Join(reasons, "\n"), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "ok\n") // the client went away
	})
	s := &Server{done: make(chan struct{}), http: &http.Server{
		Handler: mux, ReadHeaderTimeout: healthTime, ReadTimeout: healthTime, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}}
	go func() {
		defer close(s.done)
		if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.Error("the metrics server ended", "err", err)
		}
	}()
	log.Info("metrics server listens", "address", l.Addr().String())
	return s, nil
}

// Close ends the server and its connections.
func (s *Server) Close() error {
	err := s.http.Close()
	<-s.done
	return err
}
