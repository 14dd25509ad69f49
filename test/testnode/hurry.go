package testnode

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Hurry is an impatient client of one container.
type Hurry struct {
	Exec     []string      // a command that does not end
	Spread   time.Duration // of the first call's moment; each further one has that much more
	Patience time.Duration // with each call
	More     []func(context.Context) error
}

// Container asks for all things of a created container side by side, in
// another order each time. Whether a call can succeed is up to the others.
func (h Hurry) Container(ctx context.Context, r cri.RuntimeServiceClient, id string) {
	calls := append([]func(context.Context) error{
		func(ctx context.Context) error {
			_, err := r.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: id})
			return err
		},
		func(ctx context.Context) error {
			_, err := r.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: id, Cmd: h.Exec, Timeout: 1})
			return err
		},
		func(ctx context.Context) error {
			_, err := r.ReopenContainerLog(ctx, &cri.ReopenContainerLogRequest{ContainerId: id})
			return err
		},
		func(ctx context.Context) error {
			_, err := r.ContainerStats(ctx, &cri.ContainerStatsRequest{ContainerId: id})
			return err
		},
	}, h.More...)
	calls = append(calls,
		func(ctx context.Context) error {
			_, err := r.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: id, Timeout: 1})
			return err
		},
		func(ctx context.Context) error {
			_, err := r.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: id})
			return err
		})
	var all sync.WaitGroup
	for n, call := range calls {
		all.Go(func() {
			select { // so that the order differs
			case <-time.After(rand.N(h.Spread * time.Duration(n+1))):
			case <-ctx.Done():
				return
			}
			ctx, cancel := context.WithTimeout(ctx, h.Patience)
			defer cancel()
			_ = call(ctx)
		})
	}
	all.Wait()
}
