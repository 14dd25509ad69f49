package integration

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"k8s.io/client-go/tools/remotecommand"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// Clients that leave in the middle of a stream, or give up on a command, cost
// nothing for good: no goroutine, no file, no process.
func TestAbortedStreamsLeaveNothing(t *testing.T) {
	n := own(t, testnode.Options{})
	p := runPod(t, n)
	c := p.sh("while :; do read x; echo $x; done", func(c *cri.ContainerConfig) { c.Tty, c.Stdin = true, true })
	abort := func() {
		var all sync.WaitGroup
		for i := range 12 {
			protocol := []string{"SPDY", "WebSocket"}[i%2]
			all.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(20+40*i)*time.Millisecond)
				defer cancel()
				in, keys := io.Pipe()
				defer keys.Close()
				size := make(sizes, 1)
				size <- remotecommand.TerminalSize{Width: uint16(10 + i), Height: 5}
				defer close(size)
				o := remotecommand.StreamOptions{Tty: true, Stdin: in, Stdout: io.Discard, TerminalSizeQueue: size}
				u := c.attachURL(&cri.AttachRequest{Tty: true, Stdin: true, Stdout: true})
				if i%3 != 0 {
					u = c.execURL(&cri.ExecRequest{Cmd: []string{"sleep", "1000"}, Tty: true, Stdin: true, Stdout: true})
				}
				_ = stream(ctx, protocol, u, o) // it is cut off
			})
			all.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(5+20*i)*time.Millisecond)
				defer cancel()
				_, err := n.Runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: c.id, Cmd: []string{"sleep", "1000"}})
				wantOneOf(t, err, []codes.Code{codes.DeadlineExceeded, codes.Canceled})
			})
			c.execURL(&cri.ExecRequest{Cmd: []string{"true"}, Stdout: true}) // nobody asks for it
		}
		all.Wait()
	}
	count := func() map[string]int {
		r, err := n.Runtime.Status(t.Context(), &cri.StatusRequest{Verbose: true})
		if err != nil {
			t.Fatal(err)
		}
		g, err := strconv.Atoi(r.Info["goroutines"])
		if err != nil {
			t.Fatal(err)
		}
		now := map[string]int{"goroutines": g, "processes": processesIn(cgroupOf(t, c, "pids"))}
		for _, pid := range n.Processes() {
			now["files"] += entries(fmt.Sprintf("/proc/%d/fd", pid))
		}
		return now
	}
	abort()
	var before map[string]int
	eventually(t, 30*time.Second, "the first ones are over", func() bool {
		before = count()
		return before["processes"] == 1
	})
	for range 4 {
		abort()
	}
	allowed := map[string]int{"goroutines": 8, "files": 8}
	var after map[string]int
	defer func() {
		if t.Failed() {
			t.Logf("before %v, after %v", before, after)
		}
	}()
	eventually(t, 30*time.Second, "there are no more than before", func() bool {
		after = count()
		for what, was := range before {
			if after[what] > was+allowed[what] {
				return false
			}
		}
		return true
	})
	if out := c.run("echo alive"); out != "alive" {
		t.Errorf("exec says %q", out)
	}
}
