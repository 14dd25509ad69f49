package stream

import (
	"context"
	"net/http"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream/wsstream"
)

func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	for _, method := range []string{http.MethodGet, http.MethodPost} {
		mux.HandleFunc(method+" /exec/{token}", serve(s, s.exec))
		mux.HandleFunc(method+" /attach/{token}", serve(s, s.attach))
		mux.HandleFunc(method+" /portforward/{token}", serve(s, s.portForward))
	}
	return mux
}

// serve finds the prepared request of the URL, which must be of the URL's kind.
func serve[R any](s *Server, do func(http.ResponseWriter, *http.Request, R)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if !s.begin() {
			http.Error(w, "the streaming server is stopping", http.StatusServiceUnavailable)
			return
		}
		defer s.work.Done()
		prepared, ok := s.tokens.take(r.PathValue("token"))
		req, is := prepared.(R)
		if !ok || !is {
			http.Error(w, "this URL was used before, is older than its time, or was never handed out", http.StatusNotFound)
			return
		}
		if c, ok := r.Context().Value(connKey{}).(*conn); ok {
			defer c.served()
		}
		do(w, r, req)
	}
}

func (s *Server) exec(w http.ResponseWriter, r *http.Request, req *runtimeapi.ExecRequest) {
	opts := &remotecommand.Options{Stdin: req.Stdin, Stdout: req.Stdout, Stderr: req.Stderr, TTY: req.Tty}
	e := executor{rt: s.rt, opts: opts}
	if wsstream.IsWebSocketRequestWithStreamCloseProtocol(r) {
		s.serveV5(w, r, opts, func(c *v5Conn) error {
			return e.ExecInContainer(r.Context(), "", "", req.ContainerId, req.Cmd, c.in, c.out, c.err, req.Tty, c.sizes, 0)
		})
		return
	}
	remotecommand.ServeExec(w, r, e, "", "", req.ContainerId, req.Cmd, opts,
		s.o.IdleTimeout, s.o.CreationTimeout, remotecommand.SupportedStreamingProtocols)
}

func (s *Server) attach(w http.ResponseWriter, r *http.Request, req *runtimeapi.AttachRequest) {
	opts := &remotecommand.Options{Stdin: req.Stdin, Stdout: req.Stdout, Stderr: req.Stderr, TTY: req.Tty}
	e := executor{rt: s.rt, opts: opts}
	if wsstream.IsWebSocketRequestWithStreamCloseProtocol(r) {
		s.serveV5(w, r, opts, func(c *v5Conn) error {
			return e.AttachContainer(r.Context(), "", "", req.ContainerId, c.in, c.out, c.err, req.Tty, c.sizes)
		})
		return
	}
	remotecommand.ServeAttach(w, r, e, "", "", req.ContainerId, opts,
		s.o.IdleTimeout, s.o.CreationTimeout, remotecommand.SupportedStreamingProtocols)
}

func (s *Server) portForward(w http.ResponseWriter, r *http.Request, req *runtimeapi.PortForwardRequest) {
	ctx, cancel := context.WithCancel(r.Context())
	forward := &forwarder{ctx: ctx, rt: s.rt}
	// SPDY serves each connection in a goroutine of its own and does not wait.
	defer forward.wait()
	defer cancel()
	if wsstream.IsWebSocketRequestWithTunnelingProtocol(r) {
		s.serveTunnel(w, r, req.PodSandboxId, forward)
		return
	}
	portforward.ServePortForward(w, r, forward, req.PodSandboxId, "", &portforward.V4Options{Ports: req.Port},
		s.o.IdleTimeout, s.o.CreationTimeout, portforward.SupportedProtocols)
}
