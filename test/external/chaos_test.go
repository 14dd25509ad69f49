package external

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// TestChaos kills the daemon and external shims in the middle of whatever
// impatient clients just ask for, for CHAOS_TIME (make fault). Afterwards every
// pod can be removed, and nothing is left of any.
func TestChaos(t *testing.T) {
	length, err := time.ParseDuration(os.Getenv("CHAOS_TIME"))
	if err != nil {
		t.Skip("takes long: CHAOS_TIME says for how long, as in 40s")
	}
	m := start(t, "")
	before := m.held(t)
	until := time.Now().Add(length)
	var clients sync.WaitGroup
	for i := range 5 {
		clients.Go(func() {
			for round := 0; time.Now().Before(until); round++ {
				c := impatient{m, time.Duration(1+rand.IntN(400)) * 5 * time.Millisecond}
				c.pod(m.podConfig(fmt.Sprintf("chaos-%d-%d", i, round)))
			}
		})
	}
	kills := 0
	for ; time.Now().Before(until) && !t.Failed(); kills++ {
		time.Sleep(time.Duration(200+rand.IntN(1500)) * time.Millisecond)
		if rand.IntN(3) == 0 {
			if err := errors.Join(m.Kill(t.Context()), m.Run(t.Context())); err != nil {
				t.Error(err)
			}
		} else if pids := m.shims(""); len(pids) > 0 {
			_ = syscall.Kill(pids[rand.IntN(len(pids))], syscall.SIGKILL) // it may just have gone
		}
	}
	clients.Wait()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	r, err := m.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range r.Items {
		if err := (pod{m: m, id: s.Id}).remove(ctx); err != nil {
			t.Error(err)
		}
	}
	m.nothingLeft(t, before)
	t.Logf("%d kills", kills)
}

// impatient is a client that waits for an answer no longer than patience.
type impatient struct {
	m        machine
	patience time.Duration
}

// try asks once or twice again, and tells whether there was an answer.
func (i impatient) try(call func(context.Context) error) bool {
	for range 3 {
		ctx, cancel := context.WithTimeout(context.Background(), i.patience)
		err := call(ctx)
		cancel()
		if err == nil {
			return true
		}
	}
	return false
}

// pod goes through a pod's life, as far as it comes.
func (i impatient) pod(cfg *cri.PodSandboxConfig) {
	cfg.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode(rand.IntN(2))
	var p pod
	if !i.try(func(ctx context.Context) (err error) { p, err = i.m.run(ctx, cfg); return err }) {
		return
	}
	c := script("c", "i=0; while :; do i=$((i+1)); echo line $i; sleep 0.05; done")
	c.Linux.SecurityContext.NamespaceOptions = cfg.Linux.SecurityContext.NamespaceOptions
	var id string
	if i.try(func(ctx context.Context) error {
		r, err := i.m.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: p.id, SandboxConfig: cfg, Config: c})
		id = r.GetContainerId()
		return err
	}) {
		i.container(id)
	}
	if rand.IntN(3) > 0 { // else it is left for the end
		i.try(p.remove)
	}
}

// container asks for things of a container side by side.
func (i impatient) container(id string) {
	h := testnode.Hurry{Exec: []string{"sleep", "1000"}, Spread: 100 * time.Millisecond, Patience: i.patience}
	h.Container(context.Background(), i.m.Runtime, id)
}
