package pod

import (
	"context"
	"errors"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestSubscriptionKeepsEveryEventInOrder(t *testing.T) {
	s := &Service{hub: newHub()}
	sub := s.Subscribe()
	defer sub.Close()
	for i := range eventBacklog {
		s.hub.publish(&runtimeapi.ContainerEventResponse{CreatedAt: int64(i)})
	}
	for i := range eventBacklog {
		e, err := sub.Next(t.Context())
		if err != nil || e.CreatedAt != int64(i) {
			t.Fatalf("event %d: %v, %v", i, e, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := sub.Next(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("a reader that gives up gets %v", err)
	}
}

func TestLaggingReaderIsTold(t *testing.T) {
	s := &Service{hub: newHub()}
	slow, fast := s.Subscribe(), s.Subscribe()
	defer slow.Close()
	defer fast.Close()
	for i := range eventBacklog + 1 {
		s.hub.publish(&runtimeapi.ContainerEventResponse{CreatedAt: int64(i)})
		if _, err := fast.Next(t.Context()); err != nil {
			t.Fatalf("a reader that keeps up lost event %d: %v", i, err)
		}
	}
	if _, err := slow.Next(t.Context()); !errors.Is(err, ErrLagged) {
		t.Errorf("a reader that lagged behind got %v", err)
	}
	s.hub.close()
	if _, err := fast.Next(t.Context()); err == nil {
		t.Error("the stream of a stopped daemon goes on")
	}
}
