package client

import (
	"context"
	"fmt"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// pollTime is between two looks at a container when the daemon's events
// cannot be had.
const pollTime = 500 * time.Millisecond

// ContainerStatus asks for one container.
func (c *Conn) ContainerStatus(ctx context.Context, id string) (*runtimeapi.ContainerStatus, error) {
	r, err := c.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		return nil, fmt.Errorf("status of container %s: %w", ShortID(id), err)
	}
	return r.GetStatus(), nil
}

// WaitExit waits until the container has ended and gives its last status.
func (c *Conn) WaitExit(ctx context.Context, id string) (*runtimeapi.ContainerStatus, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stopped := make(chan struct{}, 1)
	listened := make(chan struct{})
	go func() {
		defer close(listened)
		c.notifyStopped(ctx, id, stopped)
	}()
	defer func() { cancel(); <-listened }()

	tick := time.NewTicker(pollTime)
	defer tick.Stop()
	for {
		st, err := c.ContainerStatus(ctx, id)
		if err != nil {
			return nil, err
		}
		if st.GetState() == runtimeapi.ContainerState_CONTAINER_EXITED {
			return st, nil
		}
		select {
		case <-stopped:
		case <-tick.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// notifyStopped tells of the container's end while the daemon sends events;
// that it cannot is no error, since the caller looks by itself too.
func (c *Conn) notifyStopped(ctx context.Context, id string, stopped chan<- struct{}) {
	events, err := c.Runtime.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	if err != nil {
		return
	}
	for {
		e, err := events.Recv()
		if err != nil {
			return
		}
		if e.GetContainerId() != id || e.GetContainerEventType() != runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT {
			continue
		}
		select {
		case stopped <- struct{}{}:
		default:
		}
	}
}
