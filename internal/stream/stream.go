// Package stream serves exec, attach and port-forward to kubelet and crictl
// over SPDY and WebSocket. A request is prepared by the CRI server and gets a
// URL with a token that works once and for a minute.
//
// It promises that a client that goes away cancels what it started, that a
// connection nobody uses ends after the idle time-out, and that Close waits
// for every stream. A panic below it ends one stream, not the program.
//
// It knows nothing of pods: what it streams to is the Runtime it was given.
package stream

import (
	"context"
	"io"
	"log/slog"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
)

// Runtime is what the streams end at. Its methods return when the command or
// connection ended or ctx is done, whichever comes first; they may be called
// concurrently. The ids are those of the request that was prepared.
type Runtime interface {
	// Exec runs cmd in a container and gives its exit code. err is set only
	// when the command could not be run to its end.
	Exec(ctx context.Context, id string, cmd []string, st Streams, tty bool, resize <-chan Size) (exit int32, err error)
	// Attach connects the streams to the main process of a container.
	Attach(ctx context.Context, id string, st Streams, tty bool, resize <-chan Size) error
	// PortForward connects conn to a port inside the sandbox's network.
	PortForward(ctx context.Context, sandboxID string, port int32, conn io.ReadWriteCloser) error
}

// Streams are the client's ends; nil ones are not wanted.
type Streams struct {
	In       io.Reader
	Out, Err io.WriteCloser
}

// Size is a terminal's size in characters. A channel of sizes is closed, or
// never sends again, when the client is gone; it is nil for clients whose
// protocol cannot resize.
type Size = remotecommand.TerminalSize

// Options configure a Server. Zero values mean the defaults named here.
type Options struct {
	Address string // IP address or host name to listen on; 127.0.0.1
	Port    string // "0", any free one

	IdleTimeout     time.Duration // a connection without traffic ends; 4 h
	CreationTimeout time.Duration // a SPDY client has this long to create its streams; 30 s
	TokenLife       time.Duration // a URL that nobody used is void; 1 min

	TLS TLS
	Log *slog.Logger
}

// TLS says whether and with what the server speaks HTTPS. With both files
// empty it makes a certificate of its own. Files are read again when they
// change.
type TLS struct {
	Enable            bool
	CertFile, KeyFile string
}

func (o *Options) setDefaults() {
	if o.Address == "" {
		o.Address = "127.0.0.1"
	}
	if o.Port == "" {
		o.Port = "0"
	}
	if o.IdleTimeout == 0 {
		o.IdleTimeout = 4 * time.Hour
	}
	if o.CreationTimeout == 0 {
		o.CreationTimeout = remotecommand.DefaultStreamCreationTimeout
	}
	if o.TokenLife == 0 {
		o.TokenLife = time.Minute
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
}
