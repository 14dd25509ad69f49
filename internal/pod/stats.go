package pod

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// statsTime bounds one measurement: a shim that hangs is left out.
	statsTime = 5 * time.Second
	// statsWidth is how many things one call measures at the same time.
	statsWidth = 8
)

// stats keeps the last measurements of containers and sandboxes. Callers that
// come within Options.StatsPeriod get them, and callers that come while
// something is being measured share the result. Its zero value is empty.
type stats struct {
	mu         sync.Mutex // leaf lock
	containers map[string]*containerStats
	sandboxes  map[string]*sandboxStats
	used       time.Time // when somebody last asked
	sampling   bool      // the sampler runs
	walks      turnstile // of writable layers
}

// containerStats are the measurements of one container.
type containerStats struct {
	usage cell[sample]
	layer layer
	procs cell[processes]
}

// sandboxStats are the measurements of what belongs to no single container.
type sandboxStats struct {
	usage cell[sample] // of the pod's own cgroup
	net   cell[[]iface]
}

func (s *stats) container(id string) *containerStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return entry(&s.containers, id)
}

func (s *stats) sandbox(id string) *sandboxStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return entry(&s.sandboxes, id)
}

func entry[E any](m *map[string]*E, id string) *E {
	if *m == nil {
		*m = map[string]*E{}
	}
	e := (*m)[id]
	if e == nil {
		e = new(E)
		(*m)[id] = e
	}
	return e
}

func (s *stats) forgetContainer(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.containers, id)
}

func (s *stats) forgetSandbox(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sandboxes, id)
}

// statsPeriod is the age up to which a measurement is given again.
func (s *Service) statsPeriod() time.Duration {
	if s.o.StatsPeriod <= 0 {
		return time.Second
	}
	return s.o.StatsPeriod
}

// ContainerStats measures the running containers among ids, or all running
// ones when ids is nil. Containers that do not run, or that end meanwhile, are
// left out.
func (s *Service) ContainerStats(ctx context.Context, ids []string) ([]*runtimeapi.ContainerStats, error) {
	s.statsUsed()
	wait := time.Now().Add(layerWait)
	cs := s.running(ids)
	out := make([]*runtimeapi.ContainerStats, len(cs))
	err := s.measureEach(ctx, len(cs), func(ctx context.Context, i int) error {
		st, err := s.containerStats(ctx, cs[i], wait)
		out[i] = st
		return s.leftOut(ctx, cs[i], err)
	})
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(out, func(st *runtimeapi.ContainerStats) bool { return st == nil }), nil
}

// SandboxStats measures the ready sandboxes among ids, or all ready ones when
// ids is nil, each with its running containers.
func (s *Service) SandboxStats(ctx context.Context, ids []string) ([]*runtimeapi.PodSandboxStats, error) {
	s.statsUsed()
	wait := time.Now().Add(layerWait)
	sbs := s.readySandboxes(ids)
	byPod := s.runningByPod()
	out := make([]*runtimeapi.PodSandboxStats, len(sbs))
	err := s.measureEach(ctx, len(sbs), func(ctx context.Context, i int) (err error) {
		out[i], err = s.sandboxStats(ctx, sbs[i], byPod[sbs[i].get().ID], wait)
		return err
	})
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(out, func(st *runtimeapi.PodSandboxStats) bool { return st == nil }), nil
}

// measureEach calls f for 0 ≤ i < n, a few at a time, until one fails.
func (s *Service) measureEach(ctx context.Context, n int, f func(ctx context.Context, i int) error) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(statsWidth)
	for i := range n {
		g.Go(func() error { return f(gctx, i) })
	}
	if err := g.Wait(); err != nil {
		return fmt.Errorf("measure: %w", err)
	}
	return nil
}

// leftOut decides what an unmeasurable container does to the whole answer:
// only the end of the caller's patience ends it.
func (s *Service) leftOut(ctx context.Context, c *container, err error) error {
	if err == nil || ctx.Err() != nil {
		return ctx.Err()
	}
	if !errdefs.IsNotFound(err) && c.phase() == running {
		s.log.Warn("container left out of statistics", "container", c.get().ID, "err", err)
	}
	return nil
}

// running gives the running containers among ids, nil meaning all.
func (s *Service) running(ids []string) []*container {
	var cs []*container
	if ids == nil {
		cs = s.index.allContainers()
	}
	for _, id := range ids {
		if c, err := s.index.container(id); err == nil {
			cs = append(cs, c)
		}
	}
	return slices.DeleteFunc(cs, func(c *container) bool {
		return c.handler == nil || c.get().State != runtimeapi.ContainerState_CONTAINER_RUNNING
	})
}

// runningByPod sorts the running containers by their sandbox, in one pass.
func (s *Service) runningByPod() map[string][]*container {
	byPod := map[string][]*container{}
	for _, c := range s.running(nil) {
		pod := c.get().SandboxID
		byPod[pod] = append(byPod[pod], c)
	}
	return byPod
}

func (s *Service) readySandboxes(ids []string) []*sandbox {
	var sbs []*sandbox
	if ids == nil {
		sbs = s.index.allSandboxes()
	}
	for _, id := range ids {
		if sb, err := s.index.sandbox(id); err == nil {
			sbs = append(sbs, sb)
		}
	}
	return slices.DeleteFunc(sbs, func(sb *sandbox) bool {
		return sb.get().State != runtimeapi.PodSandboxState_SANDBOX_READY
	})
}
