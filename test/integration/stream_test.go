package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/client-go/util/exec"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// executors are the two protocols that kubelet passes on.
var executors = map[string]func(address string) (remotecommand.Executor, error){
	"SPDY": func(address string) (remotecommand.Executor, error) {
		u, err := url.Parse(address)
		if err != nil {
			return nil, err
		}
		return remotecommand.NewSPDYExecutor(&rest.Config{}, http.MethodPost, u)
	},
	"WebSocket": func(address string) (remotecommand.Executor, error) {
		return remotecommand.NewWebSocketExecutor(&rest.Config{}, http.MethodGet, address)
	},
}

// stream talks to the address over one of the protocols until the other side
// ends it.
func stream(ctx context.Context, protocol, address string, o remotecommand.StreamOptions) error {
	e, err := executors[protocol](address)
	if err != nil {
		return err
	}
	return e.StreamWithContext(ctx, o)
}

func (c *container) execURL(req *cri.ExecRequest) string {
	c.pod.t.Helper()
	req.ContainerId = c.id
	r, err := c.pod.n.Runtime.Exec(c.pod.t.Context(), req)
	if err != nil {
		c.pod.t.Fatalf("exec: %v", err)
	}
	return r.Url
}

func (c *container) attachURL(req *cri.AttachRequest) string {
	c.pod.t.Helper()
	req.ContainerId = c.id
	r, err := c.pod.n.Runtime.Attach(c.pod.t.Context(), req)
	if err != nil {
		c.pod.t.Fatalf("attach: %v", err)
	}
	return r.Url
}

// output is a buffer that may be read while it is written.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

func (o *output) wait(t *testing.T, text string) {
	t.Helper()
	eventually(t, 15*time.Second, fmt.Sprintf("the stream says %q", text), func() bool { return strings.Contains(o.String(), text) })
}

func TestExecStreams(t *testing.T) { execStreams(t, runPod(t, shared(t))) }

func execStreams(t *testing.T, p *pod) {
	c := p.idle()
	for protocol := range executors {
		t.Run(protocol, func(t *testing.T) {
			var out, problems output
			u := c.execURL(&cri.ExecRequest{Cmd: []string{"sh", "-c", "cat; echo oops >&2; exit 42"}, Stdin: true, Stdout: true, Stderr: true})
			large := strings.Repeat("0123456789abcdef\n", 1<<14)
			err := stream(t.Context(), protocol, u, remotecommand.StreamOptions{Stdin: strings.NewReader(large), Stdout: &out, Stderr: &problems})
			var code exec.CodeExitError
			if !errors.As(err, &code) || code.Code != 42 {
				t.Errorf("ended with %v, not with code 42", err)
			}
			if out.String() != large || problems.String() != "oops\n" {
				t.Errorf("%d bytes came back of %d, and on stderr %q", len(out.String()), len(large), problems.String())
			}
			if err := stream(t.Context(), protocol, u, remotecommand.StreamOptions{Stdout: &out}); err == nil {
				t.Error("an address is good for a second use")
			}
		})
	}
}

// sizes is a terminal that changes its size once.
type sizes chan remotecommand.TerminalSize

func (s sizes) Next() *remotecommand.TerminalSize {
	size, ok := <-s
	if !ok {
		return nil
	}
	return &size
}

func TestExecTerminalIsResized(t *testing.T) { execTerminalIsResized(t, runPod(t, shared(t))) }

func execTerminalIsResized(t *testing.T, p *pod) {
	c := p.idle()
	for protocol := range executors {
		t.Run(protocol, func(t *testing.T) {
			var out output
			in, keys := io.Pipe()
			size := make(sizes, 2)
			size <- remotecommand.TerminalSize{Width: 123, Height: 45}
			u := c.execURL(&cri.ExecRequest{Cmd: []string{"sh", "-c", "while ! read -t 1 x; do stty size; done; exit 3"}, Tty: true, Stdin: true, Stdout: true})
			done := make(chan error, 1)
			go func() {
				done <- stream(t.Context(), protocol, u, remotecommand.StreamOptions{Tty: true, Stdin: in, Stdout: &out, TerminalSizeQueue: size})
			}()
			out.wait(t, "45 123")
			size <- remotecommand.TerminalSize{Width: 99, Height: 33}
			out.wait(t, "33 99")
			close(size)
			if _, err := keys.Write([]byte("\r")); err != nil {
				t.Fatal(err)
			}
			var code exec.CodeExitError
			if err := <-done; !errors.As(err, &code) || code.Code != 3 {
				t.Errorf("ended with %v, not with code 3", err)
			}
		})
	}
}

func TestExecSync(t *testing.T) {
	p := runPod(t, shared(t))
	c := p.idle()
	r, err := c.execSync(10, "sh", "-c", "echo out; echo err >&2; exit 9")
	if err != nil || string(r.Stdout) != "out\n" || string(r.Stderr) != "err\n" || r.ExitCode != 9 {
		t.Errorf("%v %v", r, err)
	}
	began := time.Now()
	_, err = c.execSync(1, "sh", "-c", "echo $$ >/tmp/pid; exec sleep 777")
	wantError(t, err, codes.DeadlineExceeded)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("an exec with one second took %v", took)
	}
	if out := c.run(`kill -0 $(cat /tmp/pid) 2>/dev/null && echo lives || echo gone`); out != "gone" {
		t.Errorf("the process of an exec beyond its time %s", out)
	}
	// What is beyond the message that kubelet takes is dropped, and the command
	// goes on to its end.
	r, err = c.execSync(60, "sh", "-c", "head -c 20000000 /dev/zero; head -c 18000000 /dev/zero >&2; exit 5")
	if size := proto.Size(r); err != nil || size > 16<<20 || size < 15<<20 || r.ExitCode != 5 {
		t.Errorf("%d bytes, code %d: %v", size, r.GetExitCode(), err)
	}
	_, err = c.execSync(10, "no-such-program")
	if err == nil || !strings.Contains(err.Error(), "no-such-program") {
		t.Errorf("exec of nothing: %v", err)
	}
	// A child in the background holds the output open after the command.
	began = time.Now()
	r, err = c.execSync(30, "sh", "-c", "sleep 100 & echo done")
	if err != nil || string(r.Stdout) != "done\n" {
		t.Errorf("%v %v", r, err)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("a child in the background held the answer for %v", took)
	}
	c.stop(0)
	_, err = c.execSync(10, "true")
	wantError(t, err, codes.FailedPrecondition, c.id[:13])
}

func TestAttachOfSeveralClients(t *testing.T) {
	for protocol := range executors {
		t.Run(protocol, func(t *testing.T) {
			c := runPod(t, shared(t)).sh(`while read x; do echo "got $x"; [ "$x" = end ] && exit 4; done; exit 5`, func(c *cri.ContainerConfig) { c.Stdin = true })
			type client struct {
				out  output
				keys *io.PipeWriter
				done chan error
				stop context.CancelFunc
			}
			attach := func(stdin bool) *client {
				cl := &client{done: make(chan error, 1)}
				o := remotecommand.StreamOptions{Stdout: &cl.out}
				if stdin {
					o.Stdin, cl.keys = io.Pipe()
				}
				u := c.attachURL(&cri.AttachRequest{Stdin: stdin, Stdout: true})
				ctx, stop := context.WithCancel(t.Context())
				cl.stop = stop
				go func() { cl.done <- stream(ctx, protocol, u, o) }()
				return cl
			}
			a, b := attach(true), attach(false)
			say := func(c *client, line string) {
				t.Helper()
				if _, err := fmt.Fprintln(c.keys, line); err != nil {
					t.Fatal(err)
				}
			}
			// A client sees what is written from when it is attached.
			tick := 0
			eventually(t, 10*time.Second, "both clients are attached", func() bool {
				tick++
				say(a, fmt.Sprint("hello ", tick))
				return strings.Contains(a.out.String(), "got hello") && strings.Contains(b.out.String(), "got hello")
			})
			b.stop()
			<-b.done
			say(a, "one")
			a.out.wait(t, "got one\n")
			a.stop()
			<-a.done
			d := attach(true) // without stdin_once the next client goes on
			eventually(t, 10*time.Second, "the next client is attached", func() bool {
				tick++
				say(d, fmt.Sprint("again ", tick))
				return strings.Contains(d.out.String(), "got again")
			})
			say(d, "end")
			if st := c.ended(); st.ExitCode != 4 {
				t.Errorf("exit code %d, not 4", st.ExitCode)
			}
			select {
			case <-d.done:
			case <-time.After(10 * time.Second):
				t.Error("the container ended, the stream did not")
			}
			if log := c.log(); !strings.Contains(log, "got one\n") || !strings.Contains(log, "got end\n") {
				t.Errorf("the log lacks lines: %q", log)
			}
			d.stop()
		})
	}
}

func TestStdinOnceEndsWithItsClient(t *testing.T) {
	stdinOnceEndsWithItsClient(t, runPod(t, shared(t)))
}

func stdinOnceEndsWithItsClient(t *testing.T, p *pod) {
	c := p.sh("cat; echo end; exit 8", func(c *cri.ContainerConfig) { c.Stdin, c.StdinOnce = true, true })
	u := c.attachURL(&cri.AttachRequest{Stdin: true, Stdout: true, Stderr: true})
	var out, problems output
	if err := stream(t.Context(), "SPDY", u, remotecommand.StreamOptions{Stdin: strings.NewReader("hello\n"), Stdout: &out, Stderr: &problems}); err != nil {
		t.Errorf("attach: %v", err)
	}
	if st := c.ended(); st.ExitCode != 8 {
		t.Errorf("exit code %d, not 8", st.ExitCode)
	}
	if got := c.log(); got != "hello\nend\n" || out.String() != got {
		t.Errorf("log %q, stream %q", got, out.String())
	}
}

func TestAttachToATerminal(t *testing.T) { attachToATerminal(t, runPod(t, shared(t))) }

func attachToATerminal(t *testing.T, p *pod) {
	c := p.sh("echo the beginning; while :; do read x; stty size; done", func(c *cri.ContainerConfig) { c.Tty, c.Stdin = true, true })
	c.waitLog("the beginning")
	var out output
	in, keys := io.Pipe()
	size := make(sizes, 1)
	size <- remotecommand.TerminalSize{Width: 77, Height: 22}
	defer close(size)
	u := c.attachURL(&cri.AttachRequest{Tty: true, Stdin: true, Stdout: true})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- stream(ctx, "SPDY", u, remotecommand.StreamOptions{Tty: true, Stdin: in, Stdout: &out, TerminalSizeQueue: size})
	}()
	eventually(t, 10*time.Second, "the terminal has its size", func() bool {
		_, err := keys.Write([]byte("\r"))
		return err == nil && strings.Contains(out.String(), "22 77")
	})
	if !strings.Contains(out.String(), "the beginning") {
		t.Errorf("what was written before the client came is lost: %q", out.String())
	}
	cancel()
	<-done
	if st := c.status(); st.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("after its client left the container is %v", st.State)
	}
}

func TestPortForward(t *testing.T) { portForward(t, runPod(t, shared(t))) }

func portForward(t *testing.T, p *pod) {
	p.demo("-http", ":8080", "-n", "1").waitLog("serving")
	port, end := p.forward(8080)
	defer end()
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if err := healthy(fmt.Sprintf("127.0.0.1:%d", port)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// healthy asks a demo program that serves HTTP at the address.
func healthy(address string) error {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 30 * time.Second}
	resp, err := client.Get("http://" + address + "/healthz")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "ok\n" {
		return fmt.Errorf("%s answers %q, %w", address, body, err)
	}
	return nil
}

// forward serves a port of the pod on the node's loopback address until end,
// which fails the test when there were problems.
func (p *pod) forward(port int32) (local uint16, end func()) {
	t := p.t
	t.Helper()
	r, err := p.n.Runtime.PortForward(t.Context(), &cri.PortForwardRequest{PodSandboxId: p.id, Port: []int32{port}})
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(r.Url)
	if err != nil {
		t.Fatal(err)
	}
	transport, upgrader, err := spdy.RoundTripperFor(&rest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	stop, ready := make(chan struct{}), make(chan struct{})
	var problems output
	f, err := portforward.New(spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, u), []string{fmt.Sprintf("0:%d", port)}, stop, ready, io.Discard, &problems)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- f.ForwardPorts() }()
	select {
	case <-ready:
	case err := <-done:
		t.Fatal(err)
	}
	ports, err := f.GetPorts()
	if err != nil {
		t.Fatal(err)
	}
	return ports[0].Local, func() {
		close(stop)
		if err := <-done; err != nil {
			t.Error(err)
		}
		if s := problems.String(); s != "" {
			t.Error(s)
		}
	}
}
