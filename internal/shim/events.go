package shim

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	eventtypes "github.com/containerd/containerd/api/events"
	events "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/emptypb"
)

// EventServer takes the events that external shims publish. Ends of tasks are
// learnt from Wait, which cannot be missed; of the events only TaskOOM says
// something that no call tells.
type EventServer struct {
	server *ttrpc.Server
	lis    net.Listener
	done   chan error

	mu  sync.Mutex
	oom map[string]bool // by container id
}

// ServeEvents listens at path, a socket that only root reaches.
func ServeEvents(path string) (*EventServer, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove the old events socket: %w", err)
	}
	lis, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen for shim events: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		lis.Close()
		return nil, err
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		lis.Close()
		return nil, err
	}
	s := &EventServer{server: server, lis: lis, oom: map[string]bool{}, done: make(chan error, 1)}
	events.RegisterTTRPCEventsService(server, s)
	go func() { s.done <- server.Serve(context.Background(), lis) }()
	return s, nil
}

// Forward implements containerd's events service.
func (s *EventServer) Forward(_ context.Context, r *events.ForwardRequest) (*emptypb.Empty, error) {
	v, err := typeurl.UnmarshalAny(r.GetEnvelope().GetEvent())
	if e, ok := v.(*eventtypes.TaskOOM); err == nil && ok {
		s.mu.Lock()
		s.oom[e.ContainerID] = true
		s.mu.Unlock()
	}
	return &emptypb.Empty{}, nil
}

// takeOOM tells once whether the container's shim reported a lack of memory.
func (s *EventServer) takeOOM(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	oom := s.oom[id]
	delete(s.oom, id)
	return oom
}

// Close stops serving.
func (s *EventServer) Close() error {
	err := s.server.Close()
	if e := <-s.done; !errors.Is(e, ttrpc.ErrServerClosed) {
		err = errors.Join(err, e)
	}
	return err
}
