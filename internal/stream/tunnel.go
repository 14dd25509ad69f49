package stream

import (
	"bufio"
	"net"
	"net/http"
	"slices"
	"strings"

	"golang.org/x/net/websocket"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// tunnelProtocol is how port-forward clients of today speak WebSocket: its
// binary messages carry a plain SPDY connection.
const tunnelProtocol = spdy.HeaderSpdy31 + "+" + portforward.ProtocolV1Name

func (s *Server) serveTunnel(w http.ResponseWriter, r *http.Request, sandboxID string, forward *forwarder) {
	websocket.Server{
		Handshake: func(c *websocket.Config, _ *http.Request) error {
			if !slices.Contains(c.Protocol, tunnelProtocol) {
				return websocket.ErrBadWebSocketProtocol
			}
			c.Protocol = []string{tunnelProtocol}
			return nil
		},
		Handler: func(ws *websocket.Conn) {
			ws.PayloadType = websocket.BinaryFrame
			// To the port-forward protocol this is a SPDY upgrade that has
			// been answered.
			spdyRequest := r.Clone(r.Context())
			for name := range spdyRequest.Header {
				if strings.HasPrefix(name, "Sec-Websocket-") {
					spdyRequest.Header.Del(name)
				}
			}
			spdyRequest.Header.Set(httpstream.HeaderConnection, httpstream.HeaderUpgrade)
			spdyRequest.Header.Set(httpstream.HeaderUpgrade, spdy.HeaderSpdy31)
			spdyRequest.Header.Set(httpstream.HeaderProtocolVersion, portforward.ProtocolV1Name)
			portforward.ServePortForward(&upgradedWriter{conn: tunnel{ws, r}, header: http.Header{}}, spdyRequest, forward,
				sandboxID, "", &portforward.V4Options{}, s.o.IdleTimeout, s.o.CreationTimeout, portforward.SupportedProtocols)
		},
	}.ServeHTTP(w, r)
}

// upgradedWriter is the response to a request whose connection was upgraded
// already: it drops the answer and gives the connection away.
type upgradedWriter struct {
	conn   net.Conn
	header http.Header
}

func (w *upgradedWriter) Header() http.Header         { return w.header }
func (w *upgradedWriter) WriteHeader(int)             {}
func (w *upgradedWriter) Write(p []byte) (int, error) { return len(p), nil }

// Hijack implements http.Hijacker.
func (w *upgradedWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return w.conn, bufio.NewReadWriter(bufio.NewReader(w.conn), bufio.NewWriter(w.conn)), nil
}

// tunnel is a WebSocket connection with addresses of its socket; the
// connection's own are URLs, which may be missing.
type tunnel struct {
	*websocket.Conn
	r *http.Request
}

type remoteAddr string

func (remoteAddr) Network() string  { return "tcp" }
func (a remoteAddr) String() string { return string(a) }

func (t tunnel) RemoteAddr() net.Addr { return remoteAddr(t.r.RemoteAddr) }

func (t tunnel) LocalAddr() net.Addr {
	if a, ok := t.r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
		return a
	}
	return remoteAddr(t.r.Host)
}
