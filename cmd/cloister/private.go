package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/internal/client"
)

// nodeLogRoot is where kubelet keeps the logs of pods; ours lie beside them.
const nodeLogRoot = "/var/log/pods"

// endTime bounds the clean-up of a private daemon.
const endTime = 30 * time.Second

// dialOrStart connects to the daemon, or starts a private one where nobody
// said which daemon it should be and none is there.
func (a *app) dialOrStart(ctx context.Context, spec *client.RunSpec) (*client.Conn, *client.Daemon, error) {
	private, err := client.FindPrivate()
	if err != nil {
		return nil, nil, err
	}
	c, err := a.dial(ctx)
	var own *client.Daemon
	if errors.Is(err, client.ErrNoDaemon) && !a.addressSet {
		var self string
		if self, err = os.Executable(); err != nil {
			return nil, nil, fmt.Errorf("find this program: %w", err)
		}
		fmt.Fprintf(a.stderr, "no daemon runs at %s: starting a private one, with its own images and network\n", a.address)
		c, own, err = private.Start(ctx, self)
	}
	if err != nil {
		return nil, nil, err
	}
	spec.LogRoot = nodeLogRoot
	if c.Address == private.Address() {
		spec.LogRoot = private.LogRoot()
	}
	return c, own, nil
}

// endPrivate ends the private daemon that this process started, when asked to
// clean up and no pod is left in it; otherwise it says how.
func (a *app) endPrivate(c *client.Conn, own *client.Daemon, clean bool) error {
	if own == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), endTime)
	defer cancel()
	left, err := c.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if clean && err == nil && len(left.GetItems()) == 0 {
		return own.Stop()
	}
	fmt.Fprintf(a.stderr, "the private daemon goes on; end it with: kill %d\n", own.PID())
	return nil
}
