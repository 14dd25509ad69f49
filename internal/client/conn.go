// Package client is what the command line needs of a running daemon: the
// connection to its socket, names resolved to ids, pulls with progress, log
// files, streams, exits, and a private daemon where none is running. It
// promises that an error is one sentence that names the thing, the cause and,
// where there is one, the remedy.
//
// It speaks CRI (and api/debug) and nothing else: it may not know how the
// daemon is made, and imports nothing of it. What it returns is data; tables
// and bars are in client/display.
package client

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	debugv1 "cloister.dev/api/debug/v1"
)

// Conn is a connection to a daemon, safe for concurrent use.
type Conn struct {
	Runtime runtimeapi.RuntimeServiceClient
	Images  runtimeapi.ImageServiceClient
	Debug   debugv1.DebugClient
	// Address is the path of the socket.
	Address string

	grpc *grpc.ClientConn
}

// ErrNoDaemon is in the chain of Dial's error when nobody serves the socket.
var ErrNoDaemon = errors.New("no daemon is running there")

const (
	dialTime        = 5 * time.Second
	maxMessageBytes = 16 << 20
)

// Dial connects to the daemon at address, a path or unix://PATH.
func Dial(ctx context.Context, address string) (*Conn, error) {
	path, err := socketPath(address)
	if err != nil {
		return nil, err
	}
	if err := probe(ctx, path); err != nil {
		return nil, err
	}
	cc, err := grpc.NewClient("passthrough:///"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessageBytes)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		}))
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", path, err)
	}
	return &Conn{
		Runtime: runtimeapi.NewRuntimeServiceClient(cc),
		Images:  runtimeapi.NewImageServiceClient(cc),
		Debug:   debugv1.NewDebugClient(cc),
		Address: path,
		grpc:    cc,
	}, nil
}

// Close ends the connection and every call on it.
func (c *Conn) Close() error { return c.grpc.Close() }

func socketPath(address string) (string, error) {
	path := strings.TrimPrefix(address, "unix://")
	if !strings.HasPrefix(path, "/") {
		return "", fmt.Errorf("address %q: it has to be an absolute path or unix:///PATH", address)
	}
	return path, nil
}

// probe connects once, so that the usual causes get words of their own
// instead of a time-out.
func probe(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		return conn.Close()
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%s: %w: start one with \"cloister daemon\" as root, or name another socket with --address", path, ErrNoDaemon)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s: permission denied: the socket belongs to root, so run the command as root", path)
	}
	return fmt.Errorf("connect to %s: %w", path, err)
}

// Sentence is what an error says to a person: without the dressing that gRPC
// puts around a message, with the remedy that a code alone can tell.
func Sentence(err error) string {
	msg := err.Error()
	if before, rest, ok := strings.Cut(msg, "rpc error: code = "); ok {
		if _, desc, ok := strings.Cut(rest, " desc = "); ok {
			msg = before + desc
		}
	}
	if status.Code(err) == codes.Unimplemented {
		msg += " (this daemon does not have it)"
	}
	return strings.TrimSpace(msg)
}

func hasCode(err error, want codes.Code) bool {
	return err != nil && status.Code(err) == want
}
