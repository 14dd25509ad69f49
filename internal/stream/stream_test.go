package stream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"
	"k8s.io/utils/exec"
)

// fake is a Runtime whose commands are its behaviours.
type fake struct {
	started chan string // gets the first word of each command that waits
	ended   chan error  // gets the context's error of each command that waited
}

func newFake() *fake { return &fake{started: make(chan string, 10), ended: make(chan error, 10)} }

func (f *fake) Exec(ctx context.Context, id string, cmd []string, st Streams, tty bool, resize <-chan Size) (int32, error) {
	switch cmd[0] {
	case "echo":
		fmt.Fprintf(st.Out, "%s in %s", strings.Join(cmd[1:], " "), id)
		if st.Err != nil {
			fmt.Fprint(st.Err, "to stderr")
		}
		return 0, nil
	case "cat":
		_, err := io.Copy(st.Out, st.In)
		return 0, err
	case "exit":
		return 42, nil
	case "which":
		fmt.Fprintf(st.Out, "in=%t out=%t err=%t", st.In != nil, st.Out != nil, st.Err != nil)
		return 0, nil
	case "size":
		size, ok := <-resize
		fmt.Fprintf(st.Out, "%dx%d tty=%t %t", size.Width, size.Height, tty, ok)
		return 0, nil
	case "panic":
		panic("of a test")
	case "fail":
		return 0, errors.New("no such program")
	case "wait":
		return 0, f.wait(ctx, "wait")
	}
	return 0, fmt.Errorf("unknown behaviour %q", cmd[0])
}

func (f *fake) wait(ctx context.Context, what string) error {
	f.started <- what
	<-ctx.Done()
	f.ended <- ctx.Err()
	return ctx.Err()
}

func (f *fake) Attach(ctx context.Context, id string, st Streams, _ bool, _ <-chan Size) error {
	if st.In == nil {
		return f.wait(ctx, "attach")
	}
	_, err := io.Copy(st.Out, st.In)
	return err
}

func (f *fake) PortForward(ctx context.Context, id string, port int32, conn io.ReadWriteCloser) error {
	switch port {
	case 7: // echo
		_, err := io.Copy(conn, conn)
		return err
	case 9: // discard
		return f.wait(ctx, "portforward")
	case 13:
		panic("of a test")
	}
	return fmt.Errorf("nobody listens on port %d", port)
}

func start(t *testing.T, f *fake, o Options) *Server {
	t.Helper()
	o.Log = slog.New(slog.NewTextHandler(testWriter{t}, nil))
	s, err := New(o, f)
	if err != nil {
		t.Fatal(err)
	}
	s.linger = 50 * time.Millisecond
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Close(ctx); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", p)
	return len(p), nil
}

// TestMain silences what the protocol libraries log.
func TestMain(m *testing.M) {
	klog.SetSlogLogger(slog.New(slog.DiscardHandler))
	os.Exit(m.Run())
}

// noLeak fails the test when goroutines stay. Those of the test's own clients
// do not count: client-go's heartbeat ends at its next beat only, and its
// readers are not told that the connection broke.
func noLeak(t *testing.T) {
	t.Helper()
	opts := []goleak.Option{goleak.IgnoreCurrent()}
	for _, f := range []string{
		"(*heartbeat).start", "watchErrorStream.func1", "(*wsStreamExecutor).StreamWithContext.func1",
		"(*streamProtocolV2).copyStdout.func1", "(*streamProtocolV2).copyStderr.func1",
	} {
		opts = append(opts, goleak.IgnoreAnyFunction("k8s.io/client-go/tools/remotecommand."+f))
	}
	t.Cleanup(func() {
		deadline := time.Now().Add(10 * time.Second)
		for {
			err := goleak.Find(opts...) // waits a little by itself
			if err == nil {
				return
			}
			if time.Now().After(deadline) {
				t.Error(err)
				return
			}
		}
	})
}

// transports are the ways in which clients connect.
var transports = map[string]func(url string) (remotecommand.Executor, error){
	"spdy": func(u string) (remotecommand.Executor, error) {
		parsed, err := url.Parse(u)
		if err != nil {
			return nil, err
		}
		return remotecommand.NewSPDYExecutor(clientConfig(), http.MethodPost, parsed)
	},
	"websocket v5": func(u string) (remotecommand.Executor, error) {
		return remotecommand.NewWebSocketExecutor(clientConfig(), http.MethodGet, u)
	},
	"websocket v4": func(u string) (remotecommand.Executor, error) {
		return remotecommand.NewWebSocketExecutorForProtocols(clientConfig(), http.MethodGet, u, "v4.channel.k8s.io")
	},
}

func clientConfig() *rest.Config {
	return &rest.Config{TLSClientConfig: rest.TLSClientConfig{Insecure: true}}
}

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// run executes over one transport and gives outputs and the client's error.
func run(t *testing.T, s *Server, transport string, req *runtimeapi.ExecRequest, o remotecommand.StreamOptions) (string, string, error) {
	t.Helper()
	resp, err := s.GetExec(req)
	if err != nil {
		t.Fatal(err)
	}
	return stream(t, transport, resp.Url, req.Stdout, req.Stderr, o)
}

func stream(t *testing.T, transport, url string, wantOut, wantErr bool, o remotecommand.StreamOptions) (string, string, error) {
	t.Helper()
	client, err := transports[transport](url)
	if err != nil {
		t.Fatal(err)
	}
	var out, errOut bytes.Buffer
	if wantOut {
		o.Stdout = &out
	}
	if wantErr {
		o.Stderr = &errOut
	}
	err = client.StreamWithContext(within(t), o)
	return out.String(), errOut.String(), err
}

func TestExec(t *testing.T) {
	for transport := range transports {
		t.Run(transport, func(t *testing.T) {
			noLeak(t)
			s := start(t, newFake(), Options{})
			t.Run("outputs", func(t *testing.T) {
				req := &runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"echo", "hello"}, Stdout: true, Stderr: true}
				out, errOut, err := run(t, s, transport, req, remotecommand.StreamOptions{})
				if err != nil || out != "hello in c1" || errOut != "to stderr" {
					t.Fatalf("got %q, %q, %v", out, errOut, err)
				}
			})
			t.Run("only what was asked for", func(t *testing.T) {
				req := &runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"which"}, Stdout: true}
				if out, _, err := run(t, s, transport, req, remotecommand.StreamOptions{}); err != nil || out != "in=false out=true err=false" {
					t.Fatalf("got %q, %v", out, err)
				}
			})
			t.Run("exit code", func(t *testing.T) {
				req := &runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"exit"}, Stdout: true}
				_, _, err := run(t, s, transport, req, remotecommand.StreamOptions{})
				var exit exec.ExitError
				if !errors.As(err, &exit) || exit.ExitStatus() != 42 {
					t.Fatalf("want exit status 42, got %v", err)
				}
			})
			for _, cmd := range []string{"fail", "panic"} {
				t.Run(cmd, func(t *testing.T) {
					req := &runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{cmd}, Stdout: true}
					_, _, err := run(t, s, transport, req, remotecommand.StreamOptions{})
					var exit exec.ExitError
					if err == nil || errors.As(err, &exit) {
						t.Fatalf("want an error that is no exit code, got %v", err)
					}
				})
			}
			t.Run("size", func(t *testing.T) {
				req := &runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"size"}, Stdin: true, Stdout: true, Tty: true}
				in, w := io.Pipe()
				defer w.Close()
				out, _, err := run(t, s, transport, req, remotecommand.StreamOptions{Tty: true, Stdin: in, TerminalSizeQueue: &oneSize{}})
				if err != nil || out != "80x25 tty=true true" {
					t.Fatalf("got %q, %v", out, err)
				}
			})
		})
	}
}

type oneSize struct{ told bool }

func (q *oneSize) Next() *remotecommand.TerminalSize {
	if q.told {
		return nil
	}
	q.told = true
	return &remotecommand.TerminalSize{Width: 80, Height: 25}
}

func TestStdinReachesItsEnd(t *testing.T) {
	// Version 4 over WebSocket cannot tell the end of stdin.
	for _, transport := range []string{"spdy", "websocket v5"} {
		t.Run(transport, func(t *testing.T) {
			noLeak(t)
			s := start(t, newFake(), Options{})
			in := strings.Repeat("0123456789abcdef", 64<<10)
			req := &runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"cat"}, Stdin: true, Stdout: true}
			out, _, err := run(t, s, transport, req, remotecommand.StreamOptions{Stdin: strings.NewReader(in)})
			if err != nil || out != in {
				t.Fatalf("exec: %d of %d bytes came back, %v", len(out), len(in), err)
			}
			resp, err := s.GetAttach(&runtimeapi.AttachRequest{ContainerId: "c1", Stdin: true, Stdout: true})
			if err != nil {
				t.Fatal(err)
			}
			out, _, err = stream(t, transport, resp.Url, true, false, remotecommand.StreamOptions{Stdin: strings.NewReader(in)})
			if err != nil || out != in {
				t.Fatalf("attach: %d of %d bytes came back, %v", len(out), len(in), err)
			}
		})
	}
}

// A command without stdin reads nothing from its client, so its leaving shows
// only on the connection.
func TestClientThatLeavesCancels(t *testing.T) {
	for transport := range transports {
		for _, verb := range []string{"exec", "attach"} {
			t.Run(transport+" "+verb, func(t *testing.T) {
				noLeak(t)
				f := newFake()
				s := start(t, f, Options{})
				var url string
				if verb == "exec" {
					resp, err := s.GetExec(&runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"wait"}, Stdout: true})
					if err != nil {
						t.Fatal(err)
					}
					url = resp.Url
				} else {
					resp, err := s.GetAttach(&runtimeapi.AttachRequest{ContainerId: "c1", Stdout: true})
					if err != nil {
						t.Fatal(err)
					}
					url = resp.Url
				}
				client, err := transports[transport](url)
				if err != nil {
					t.Fatal(err)
				}
				ctx, leave := context.WithCancel(within(t))
				left := make(chan error, 1)
				go func() { left <- client.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: io.Discard}) }()
				receive(t, f.started)
				leave()
				if err := receive(t, f.ended); !errors.Is(err, context.Canceled) {
					t.Fatalf("the command ended with %v", err)
				}
				<-left
			})
		}
	}
}

func receive[T any](t *testing.T, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(10 * time.Second):
		t.Fatal("nothing happened for 10 s")
		panic("unreachable")
	}
}

func TestIdleConnectionEnds(t *testing.T) {
	for transport := range transports {
		t.Run(transport, func(t *testing.T) {
			// On a slow machine a connection may be idle before its command runs.
			for idle := 100 * time.Millisecond; !idleConnectionEnds(t, transport, idle); idle *= 4 {
				if idle > 10*time.Second {
					t.Fatal("the command was never run")
				}
			}
		})
	}
}

// idleConnectionEnds tells whether the command was run at all.
func idleConnectionEnds(t *testing.T, transport string, idle time.Duration) bool {
	t.Helper()
	noLeak(t)
	f := newFake()
	s := start(t, f, Options{IdleTimeout: idle, CreationTimeout: 5 * idle})
	req := &runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"wait"}, Stdout: true}
	// client-go may take the end of the connection for a success.
	if _, _, err := run(t, s, transport, req, remotecommand.StreamOptions{}); err != nil {
		t.Log(err)
	}
	select {
	case <-f.started:
	default:
		return false
	}
	if err := receive(t, f.ended); !errors.Is(err, context.Canceled) {
		t.Fatalf("the command ended with %v", err)
	}
	return true
}

func TestCloseEndsStreams(t *testing.T) {
	noLeak(t)
	f := newFake()
	s := start(t, f, Options{})
	done := make(chan error, len(transports))
	for transport := range transports {
		go func() {
			_, _, err := run(t, s, transport, &runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"wait"}, Stdout: true}, remotecommand.StreamOptions{})
			done <- err
		}()
		receive(t, f.started)
	}
	if err := s.Close(within(t)); err != nil {
		t.Fatal(err)
	}
	for range transports {
		t.Log(receive(t, done))
		if err := receive(t, f.ended); !errors.Is(err, context.Canceled) {
			t.Errorf("a command ended with %v", err)
		}
	}
	if _, err := s.GetExec(&runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"x"}, Stdout: true}); !errdefs.IsUnavailable(err) {
		t.Errorf("want unavailable after Close, got %v", err)
	}
}

// Clients that upgrade and then open no streams must not hold a connection.
func TestClientWithoutStreamsIsCutOff(t *testing.T) {
	noLeak(t)
	s := start(t, newFake(), Options{CreationTimeout: 50 * time.Millisecond})
	resp, err := s.GetExec(&runtimeapi.ExecRequest{ContainerId: "c1", Cmd: []string{"echo"}, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(resp.Url)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", u.Host)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n", u.Path)
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(c)
	if err != nil || !bytes.HasPrefix(answer, []byte("HTTP/1.1 101 ")) {
		t.Fatalf("want an upgrade and then the end, got %q, %v", answer, err)
	}
}
