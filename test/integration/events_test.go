package integration

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// Two readers, one of which reads only when all is over, see every event of 50
// containers, each container's in order.
func TestEventsOfFiftyContainers(t *testing.T) {
	n := own(t, testnode.Options{})
	const count = 50
	var streams []cri.RuntimeService_GetContainerEventsClient
	for range 2 {
		s, err := n.Runtime.GetContainerEvents(t.Context(), &cri.GetEventsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		streams = append(streams, s)
	}
	// The subscriptions are there when an event arrives.
	probe := runPod(t, n)
	first := make(chan error, 1)
	for _, s := range streams {
		go func() {
			_, err := s.Recv()
			first <- err
		}()
	}
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for arrived := 0; arrived < len(streams); {
		select {
		case err := <-first:
			if err != nil {
				t.Fatal(err)
			}
			arrived++
		case <-tick.C:
			probe.create(busybox, []string{"true"}).remove()
		}
	}
	ids := make([]string, count)
	p := runPod(t, n)
	var wg sync.WaitGroup
	slot := make(chan struct{}, 4)
	for i := range count {
		slot <- struct{}{}
		wg.Go(func() {
			defer func() { <-slot }()
			c, err := p.tryCreate(t.Context(), containerConfig(busybox, []string{"sleep", "1000"}))
			if err != nil {
				t.Error(err)
				return
			}
			ids[i] = c.id
			if err := c.tryStart(); err != nil {
				t.Error(err)
			}
			if _, err := n.Runtime.StopContainer(t.Context(), &cri.StopContainerRequest{ContainerId: c.id}); err != nil {
				t.Error(err)
			}
			if _, err := n.Runtime.RemoveContainer(t.Context(), &cri.RemoveContainerRequest{ContainerId: c.id}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	for i, s := range streams {
		if err := wantLives(s, ids); err != nil {
			t.Errorf("reader %d: %v", i, err)
		}
	}
}

// wantLives reads until it knows the whole life of every container.
func wantLives(s cri.RuntimeService_GetContainerEventsClient, ids []string) error {
	lives := map[string][]cri.ContainerEventType{}
	for _, id := range ids {
		lives[id] = nil
	}
	last := int64(0)
	for missing := len(ids) * 4; missing > 0; {
		e, err := s.Recv()
		if err != nil {
			return fmt.Errorf("with %d events missing: %w", missing, err)
		}
		if e.CreatedAt < last-int64(time.Second) {
			return fmt.Errorf("an event of %d comes after one of %d", e.CreatedAt, last)
		}
		last = e.CreatedAt
		if _, ours := lives[e.ContainerId]; !ours {
			continue
		}
		lives[e.ContainerId] = append(lives[e.ContainerId], e.ContainerEventType)
		missing--
		if e.PodSandboxStatus == nil {
			return fmt.Errorf("an event %v without its pod", e.ContainerEventType)
		}
	}
	want := []cri.ContainerEventType{
		cri.ContainerEventType_CONTAINER_CREATED_EVENT, cri.ContainerEventType_CONTAINER_STARTED_EVENT,
		cri.ContainerEventType_CONTAINER_STOPPED_EVENT, cri.ContainerEventType_CONTAINER_DELETED_EVENT,
	}
	for id, life := range lives {
		if !slices.Equal(life, want) {
			return fmt.Errorf("container %s: %v", id, life)
		}
	}
	return nil
}
