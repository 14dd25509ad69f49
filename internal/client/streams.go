package client

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"

	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// Streams are the caller's ends of an exec or attach; nil ones are not wanted.
type Streams struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// Resize carries the size of the caller's terminal; nil without one.
	Resize <-chan Size
}

// Size of a terminal in characters.
type Size struct{ Width, Height uint16 }

// ExitError says that the command ran and ended with a status other than 0.
type ExitError struct{ Code int }

func (e *ExitError) Error() string { return fmt.Sprintf("the command exited with status %d", e.Code) }

// protocolV4 is the version of the remote command protocol that tells exit
// codes; all CRI servers speak it over SPDY.
const protocolV4 = "v4.channel.k8s.io"

// Stream connects the caller's ends to a URL that Exec or Attach answered,
// and returns when the command has ended and all its output was written.
func Stream(ctx context.Context, url string, s Streams) error {
	conn, err := upgrade(ctx, url)
	if err != nil {
		return fmt.Errorf("connect to the streaming server: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()

	// The order is that of the protocol: the server counts streams by it.
	status, err := open(conn, "error")
	if err != nil {
		return err
	}
	verdict := make(chan error, 1)
	go func() { verdict <- readVerdict(status) }()
	var outputs sync.WaitGroup
	if err := connect(conn, s, &outputs); err != nil {
		return err
	}
	outputs.Wait()
	select {
	case err = <-verdict:
	case <-conn.CloseChan():
		// The verdict may have come with the last bytes.
		err = <-verdict
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

func upgrade(ctx context.Context, url string) (httpstream.Connection, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set(httpstream.HeaderProtocolVersion, protocolV4)
	// The URL came over a socket that only root can reach and holds a token
	// that works once: the server's certificate proves nothing more, and a
	// self-signed one is the usual case.
	tripper, err := spdy.NewRoundTripperWithConfig(spdy.RoundTripperConfig{
		TLS: &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // see above
	})
	if err != nil {
		return nil, err
	}
	resp, err := tripper.RoundTrip(req) //nolint:bodyclose // the connection owns it from here
	if err != nil {
		return nil, err
	}
	return tripper.NewConnection(resp)
}

func open(conn httpstream.Connection, kind string) (httpstream.Stream, error) {
	s, err := conn.CreateStream(http.Header{"streamType": []string{kind}})
	if err != nil {
		return nil, fmt.Errorf("open the stream %s: %w", kind, err)
	}
	return s, nil
}

// connect opens the wanted streams and starts their pumps. Input pumps end
// with the connection, output pumps with the output.
func connect(conn httpstream.Connection, s Streams, outputs *sync.WaitGroup) error {
	var stdin, stdout, stderr, resize httpstream.Stream
	wanted := []struct {
		kind string
		want bool
		to   *httpstream.Stream
	}{
		{"stdin", s.Stdin != nil, &stdin},
		{"stdout", s.Stdout != nil, &stdout},
		{"stderr", s.Stderr != nil, &stderr},
		{"resize", s.Resize != nil, &resize},
	}
	for _, w := range wanted {
		if !w.want {
			continue
		}
		var err error
		if *w.to, err = open(conn, w.kind); err != nil {
			return err
		}
	}
	if resize != nil {
		go sendSizes(resize, s.Resize, conn.CloseChan())
	}
	if stdin != nil {
		go func() {
			// Its end closes the command's stdin; what went wrong shows in the verdict.
			_, _ = io.Copy(stdin, s.Stdin)
			_ = stdin.Close()
		}()
	}
	pump := func(from httpstream.Stream, to io.Writer) {
		if from == nil {
			return
		}
		outputs.Add(1)
		go func() {
			defer outputs.Done()
			_, _ = io.Copy(to, from)
		}()
	}
	pump(stdout, s.Stdout)
	pump(stderr, s.Stderr)
	return nil
}

func sendSizes(to io.Writer, sizes <-chan Size, closed <-chan bool) {
	enc := json.NewEncoder(to)
	for {
		select {
		case size, ok := <-sizes:
			if !ok || enc.Encode(size) != nil {
				return
			}
		case <-closed:
			return
		}
	}
}

// readVerdict reads how the command ended from the error stream.
func readVerdict(r io.Reader) error {
	const limit = 64 << 10
	b, err := io.ReadAll(io.LimitReader(r, limit))
	if err != nil && len(b) == 0 {
		return fmt.Errorf("the connection broke before the command ended: %w", err)
	}
	if len(b) == 0 {
		return nil
	}
	return parseVerdict(b)
}

func parseVerdict(b []byte) error {
	var status struct {
		Status, Message, Reason string
		Details                 struct {
			Causes []struct{ Reason, Message string }
		}
	}
	if err := json.Unmarshal(b, &status); err != nil {
		return fmt.Errorf("the streaming server said %q", b)
	}
	switch {
	case status.Status == "Success":
		return nil
	case status.Reason != "NonZeroExitCode":
		return errors.New(status.Message)
	}
	for _, c := range status.Details.Causes {
		if code, err := strconv.Atoi(c.Message); err == nil && c.Reason == "ExitCode" {
			return &ExitError{Code: code}
		}
	}
	return fmt.Errorf("the streaming server told no exit code in %q", b)
}
