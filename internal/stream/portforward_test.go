package stream

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/websocket"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"
)

// dialers are the ways in which port-forward clients of today connect.
var dialers = map[string]func(u *url.URL) (httpstream.Dialer, error){
	"spdy": func(u *url.URL) (httpstream.Dialer, error) {
		transport, upgrader, err := spdy.RoundTripperFor(clientConfig())
		if err != nil {
			return nil, err
		}
		return spdy.NewDialerForStreaming(upgrader, &http.Client{Transport: transport}, http.MethodPost, u), nil
	},
	"websocket tunnel": func(u *url.URL) (httpstream.Dialer, error) {
		return portforward.NewSPDYOverWebsocketDialerForStreaming(u, clientConfig())
	},
}

func prepareForward(t *testing.T, s *Server, dialer string) httpstream.Dialer {
	t.Helper()
	resp, err := s.GetPortForward(&runtimeapi.PortForwardRequest{PodSandboxId: "p1"})
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(resp.Url)
	if err != nil {
		t.Fatal(err)
	}
	d, err := dialers[dialer](u)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func dial(t *testing.T, s *Server, dialer string) httpstream.Connection {
	t.Helper()
	conn, _, err := prepareForward(t, s, dialer).Dial(portforward.PortForwardProtocolV1Name)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// forward starts a client that forwards a local port to the given one, and
// gives the local address.
func forward(t *testing.T, s *Server, dialer string, port int) (addr string, stop func()) {
	t.Helper()
	d := prepareForward(t, s, dialer)
	stopChan, ready, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	pf, err := portforward.NewOnAddressesForStreaming(d, []string{"127.0.0.1"}, []string{fmt.Sprintf("0:%d", port)}, stopChan, ready, io.Discard, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	go func() { done <- pf.ForwardPorts() }()
	select {
	case <-ready:
	case err := <-done:
		t.Fatalf("forwarding did not start: %v", err)
	}
	ports, err := pf.GetPorts()
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", ports[0].Local), sync.OnceFunc(func() {
		close(stopChan)
		<-done
	})
}

func TestPortForward(t *testing.T) {
	for dialer := range dialers {
		t.Run(dialer, func(t *testing.T) {
			noLeak(t)
			s := start(t, newFake(), Options{})
			addr, stop := forward(t, s, dialer, 7)
			defer stop()
			data := bytes.Repeat([]byte("0123456789abcdef"), 64<<10)
			var clients sync.WaitGroup
			for range 4 {
				clients.Go(func() {
					got, err := roundTrip(addr, data)
					if err != nil || !bytes.Equal(got, data) {
						t.Errorf("%d of %d bytes came back, %v", len(got), len(data), err)
					}
				})
			}
			clients.Wait()
		})
	}
}

func roundTrip(addr string, data []byte) ([]byte, error) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return nil, err
	}
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(data)
		sent <- errors.Join(err, c.(*net.TCPConn).CloseWrite())
	}()
	got, err := io.ReadAll(c)
	return got, errors.Join(err, <-sent)
}

func TestPortForwardTellsWhatFailed(t *testing.T) {
	for name := range dialers {
		t.Run(name, func(t *testing.T) {
			noLeak(t)
			conn := dial(t, start(t, newFake(), Options{}), name)
			defer conn.Close()
			// One connection carries the streams of many forwards.
			for i, want := range map[int]string{1: "nobody listens on port 1", 13: "internal error"} {
				headers := http.Header{}
				headers.Set("requestID", strconv.Itoa(i))
				headers.Set("port", strconv.Itoa(i))
				headers.Set("streamType", "error")
				report, err := conn.CreateStream(headers)
				if err != nil {
					t.Fatal(err)
				}
				headers.Set("streamType", "data")
				// The forward fails, and resets its streams, perhaps before this
				// stream is acknowledged.
				if _, err := conn.CreateStream(headers); err != nil {
					t.Log(err)
				}
				if told, _ := io.ReadAll(report); !strings.Contains(string(told), want) { // ends with a reset
					t.Errorf("port %d: the client was told %q", i, told)
				}
			}
		})
	}
}

func TestPortForwardClientThatLeavesCancels(t *testing.T) {
	for dialer := range dialers {
		t.Run(dialer, func(t *testing.T) {
			noLeak(t)
			f := newFake()
			s := start(t, f, Options{})
			addr, stop := forward(t, s, dialer, 9)
			defer stop()
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			receive(t, f.started)
			stop()
			if err := receive(t, f.ended); !errors.Is(err, context.Canceled) {
				t.Errorf("the forward ended with %v", err)
			}
		})
	}
}

// Before tunnels, WebSocket clients got two channels for each port of the
// request: data and errors, each beginning with the port.
func TestPortForwardOverWebSocketChannels(t *testing.T) {
	noLeak(t)
	s := start(t, newFake(), Options{})
	resp, err := s.GetPortForward(&runtimeapi.PortForwardRequest{PodSandboxId: "p1", Port: []int32{7, 1}})
	if err != nil {
		t.Fatal(err)
	}
	config, err := websocket.NewConfig(strings.Replace(resp.Url, "http://", "ws://", 1), "http://localhost")
	if err != nil {
		t.Fatal(err)
	}
	config.Protocol = []string{"v4.channel.k8s.io"}
	ws, err := websocket.DialConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	defer ws.Close()
	if err := ws.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := websocket.Message.Send(ws, []byte("\x00hello")); err != nil {
		t.Fatal(err)
	}
	got := map[byte]string{}
	for got[0] != "\x07\x00hello" || !strings.Contains(got[3], "nobody listens on port 1") {
		var frame []byte
		if err := websocket.Message.Receive(ws, &frame); err != nil {
			t.Fatalf("%v, after %q", err, got)
		}
		got[frame[0]] += string(frame[1:])
	}
	for channel, port := range map[byte]uint16{0: 7, 1: 7, 2: 1, 3: 1} {
		if n := binary.LittleEndian.Uint16([]byte(got[channel][:2])); n != port {
			t.Errorf("channel %d is for port %d", channel, n)
		}
	}
}

// writePair writes a certificate and its key.
func writePair(t *testing.T) (cert, key string) {
	t.Helper()
	pair, err := selfSigned("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	for path, block := range map[string]*pem.Block{
		cert: {Type: "CERTIFICATE", Bytes: pair.Certificate[0]},
		key:  {Type: "PRIVATE KEY", Bytes: der},
	} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}
