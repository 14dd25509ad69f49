package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
)

// exitError is an error that carries an exit code, as the server expects it.
type exitError int

func (e exitError) Error() string   { return fmt.Sprintf("exited with %d", int(e)) }
func (e exitError) String() string  { return e.Error() }
func (e exitError) Exited() bool    { return true }
func (e exitError) ExitStatus() int { return int(e) }

// fakeRuntime is what the public streaming server runs commands with.
type fakeRuntime struct {
	run func(in io.Reader, out, errOut io.WriteCloser, resize <-chan remotecommand.TerminalSize) error
}

func (f fakeRuntime) Exec(_ context.Context, _ string, _ []string, in io.Reader, out, errOut io.WriteCloser, _ bool, resize <-chan remotecommand.TerminalSize) error {
	return f.run(in, out, errOut, resize)
}

func (f fakeRuntime) Attach(_ context.Context, _ string, in io.Reader, out, errOut io.WriteCloser, _ bool, resize <-chan remotecommand.TerminalSize) error {
	return f.run(in, out, errOut, resize)
}

func (f fakeRuntime) PortForward(context.Context, string, int32, io.ReadWriteCloser) error {
	return errors.New("not here")
}

// execURL serves one exec of a runtime and gives its URL.
func execURL(t *testing.T, f fakeRuntime, tty, stdin bool) string {
	t.Helper()
	config := streaming.DefaultConfig
	config.SupportedRemoteCommandProtocols = []string{remotecommand.StreamProtocolV4Name}
	s, err := streaming.NewServer(config, f)
	if err != nil {
		t.Fatal(err)
	}
	h := httptest.NewServer(s)
	t.Cleanup(h.Close)
	r, err := s.GetExec(&runtimeapi.ExecRequest{ContainerId: "c", Cmd: []string{"x"}, Stdin: stdin, Stdout: true, Stderr: !tty, Tty: tty})
	if err != nil {
		t.Fatal(err)
	}
	_, path, _ := strings.Cut(strings.TrimPrefix(r.GetUrl(), "http://"), "/")
	return h.URL + "/" + path
}

func TestStreamCarriesBothWays(t *testing.T) {
	echo := fakeRuntime{func(in io.Reader, out, errOut io.WriteCloser, _ <-chan remotecommand.TerminalSize) error {
		fmt.Fprint(errOut, "to stderr")
		_, err := io.Copy(out, in)
		return err
	}}
	text := strings.Repeat("0123456789", 100_000)
	var out, errOut bytes.Buffer
	err := Stream(deadline(t), execURL(t, echo, false, true), Streams{Stdin: strings.NewReader(text), Stdout: &out, Stderr: &errOut})
	if err != nil || out.String() != text || errOut.String() != "to stderr" {
		t.Errorf("got %d bytes, %q, %v", out.Len(), errOut.String(), err)
	}
}

func TestStreamTellsExitCode(t *testing.T) {
	for _, code := range []int{1, 42, 137} {
		f := fakeRuntime{func(_ io.Reader, out, _ io.WriteCloser, _ <-chan remotecommand.TerminalSize) error {
			fmt.Fprint(out, "last words")
			return exitError(code)
		}}
		var out, errOut bytes.Buffer
		err := Stream(deadline(t), execURL(t, f, false, false), Streams{Stdout: &out, Stderr: &errOut})
		var exit *ExitError
		if !errors.As(err, &exit) || exit.Code != code || out.String() != "last words" {
			t.Errorf("got %v, %q; want exit code %d", err, out.String(), code)
		}
	}
}

func TestStreamTellsFailure(t *testing.T) {
	f := fakeRuntime{func(io.Reader, io.WriteCloser, io.WriteCloser, <-chan remotecommand.TerminalSize) error {
		return errors.New("the container has just died")
	}}
	var out, errOut bytes.Buffer
	err := Stream(deadline(t), execURL(t, f, false, false), Streams{Stdout: &out, Stderr: &errOut})
	if err == nil || !strings.Contains(err.Error(), "just died") {
		t.Errorf("got %v", err)
	}
}

func TestStreamSendsSizes(t *testing.T) {
	f := fakeRuntime{func(_ io.Reader, out, _ io.WriteCloser, resize <-chan remotecommand.TerminalSize) error {
		size := <-resize
		fmt.Fprintf(out, "%dx%d", size.Width, size.Height)
		return nil
	}}
	sizes := make(chan Size, 1)
	sizes <- Size{80, 24}
	var out bytes.Buffer
	err := Stream(deadline(t), execURL(t, f, true, false), Streams{Stdout: &out, Resize: sizes})
	if err != nil || out.String() != "80x24" {
		t.Errorf("got %q, %v", out.String(), err)
	}
}

func TestStreamEndsWithContext(t *testing.T) {
	ended := make(chan struct{})
	f := fakeRuntime{func(in io.Reader, out, _ io.WriteCloser, _ <-chan remotecommand.TerminalSize) error {
		defer close(ended)
		fmt.Fprint(out, "ready")
		_, err := io.Copy(io.Discard, in)
		return err
	}}
	ctx, cancel := context.WithCancel(deadline(t))
	r, w := io.Pipe()
	defer w.Close()
	out := &signalWriter{}
	result := make(chan error, 1)
	out.expect(t, "ready", func() {
		url := execURL(t, f, false, true)
		go func() { result <- Stream(ctx, url, Streams{Stdin: r, Stdout: out, Stderr: out}) }()
	})
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	<-ended
}

func TestStreamURLWorksOnce(t *testing.T) {
	f := fakeRuntime{func(io.Reader, io.WriteCloser, io.WriteCloser, <-chan remotecommand.TerminalSize) error { return nil }}
	url := execURL(t, f, false, false)
	var out, errOut bytes.Buffer
	if err := Stream(deadline(t), url, Streams{Stdout: &out, Stderr: &errOut}); err != nil {
		t.Fatal(err)
	}
	if err := Stream(deadline(t), url, Streams{Stdout: &out, Stderr: &errOut}); err == nil {
		t.Error("the second use worked")
	}
}

func deadline(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func FuzzVerdict(f *testing.F) {
	f.Add([]byte(`{"status":"Failure","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"3"}]}}`))
	f.Add([]byte(`{"status":"Success"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var exit *ExitError
		if err := parseVerdict(b); errors.As(err, &exit) && !bytes.Contains(b, []byte("ExitCode")) {
			t.Errorf("an exit code out of %q", b)
		}
	})
}
