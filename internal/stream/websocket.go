package stream

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream/wsstream"
	"k8s.io/utils/exec"
)

// v5Conn is a WebSocket connection of protocol v5.channel.k8s.io. Version 5 is
// what clients of today ask for; it lets them close stdin alone. cri-streaming
// serves the versions before it.
type v5Conn struct {
	in       io.Reader
	out, err io.WriteCloser
	sizes    <-chan Size
}

func (s *Server) serveV5(w http.ResponseWriter, r *http.Request, opts *remotecommand.Options, run func(*v5Conn) error) {
	channels := []wsstream.ChannelType{
		remotecommand.StreamStdIn:  wsstream.IgnoreChannel,
		remotecommand.StreamStdOut: wsstream.IgnoreChannel,
		remotecommand.StreamStdErr: wsstream.IgnoreChannel,
		remotecommand.StreamErr:    wsstream.WriteChannel,
		remotecommand.StreamResize: wsstream.ReadChannel,
	}
	greet := remotecommand.StreamErr // the channel that tells the client that we are there
	if opts.Stdin {
		channels[remotecommand.StreamStdIn] = wsstream.ReadChannel
	}
	if opts.Stderr {
		channels[remotecommand.StreamStdErr], greet = wsstream.WriteChannel, remotecommand.StreamStdErr
	}
	if opts.Stdout {
		channels[remotecommand.StreamStdOut], greet = wsstream.WriteChannel, remotecommand.StreamStdOut
	}
	ws := wsstream.NewConn(map[string]wsstream.ChannelProtocolConfig{
		remotecommand.StreamProtocolV5Name: {Binary: true, Channels: channels},
	})
	ws.SetIdleTimeout(s.o.IdleTimeout)
	_, streams, err := ws.Open(w, r)
	if err != nil {
		s.o.Log.Debug("WebSocket upgrade failed", "error", err)
		return
	}
	defer ws.Close()
	if _, err := streams[greet].Write(nil); err != nil {
		return
	}
	sizes := make(chan Size)
	go readSizes(r, streams[remotecommand.StreamResize], sizes)
	err = run(&v5Conn{
		in:  streams[remotecommand.StreamStdIn],
		out: streams[remotecommand.StreamStdOut], err: streams[remotecommand.StreamStdErr],
		sizes: sizes,
	})
	if err := json.NewEncoder(streams[remotecommand.StreamErr]).Encode(statusOf(err)); err != nil {
		s.o.Log.Debug("the client did not get the status of its stream", "error", err)
	}
}

// readSizes passes on what the client says of its terminal until it is gone.
func readSizes(r *http.Request, from io.Reader, to chan<- Size) {
	defer close(to)
	for d := json.NewDecoder(from); ; {
		var size Size
		if d.Decode(&size) != nil {
			return
		}
		select {
		case to <- size:
		case <-r.Context().Done():
			return
		}
	}
}

// status is the part of Kubernetes' metav1.Status that remote command clients read.
type status struct {
	Status  string   `json:"status"`
	Message string   `json:"message,omitempty"`
	Reason  string   `json:"reason,omitempty"`
	Details *details `json:"details,omitempty"`
	Code    int      `json:"code,omitempty"`
}

type details struct {
	Causes []cause `json:"causes"`
}

type cause struct {
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

func statusOf(err error) status {
	var exit exec.ExitError
	switch {
	case err == nil:
		return status{Status: "Success"}
	case errors.As(err, &exit) && exit.Exited():
		return status{
			Status:  "Failure",
			Reason:  remotecommand.NonZeroExitCodeReason,
			Message: "command terminated with " + exit.Error(),
			Details: &details{[]cause{{remotecommand.ExitCodeCauseType, strconv.Itoa(exit.ExitStatus())}}},
		}
	default:
		return status{Status: "Failure", Reason: "InternalError", Message: err.Error(), Code: http.StatusInternalServerError}
	}
}
