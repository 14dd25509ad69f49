package pod

import (
	"context"
	"fmt"
	"math"
	"time"
)

// sample is a usage with the speed at which CPU time was used before it.
type sample struct {
	at    time.Time
	usage usage
	cores amount // nanocores, unknown until two marks lie apart

	older, newer mark
}

// mark is a CPU reading that later ones are compared with.
type mark struct {
	at  time.Time
	cpu uint64
}

const (
	minWindow = time.Second // shorter ones measure the noise of the clock tick
	maxWindow = time.Minute // longer ones tell nothing of now
)

// next is the sample that follows s. Marks lie at least minWindow apart, so
// that frequent samples neither divide by nothing nor widen the window.
func (s sample) next(u usage, at time.Time) sample {
	n := sample{at: at, usage: u, older: s.older, newer: s.newer}
	if !u.cpu.known {
		return n
	}
	now := mark{at, u.cpu.n}
	switch {
	case s.newer.at.IsZero():
		n.newer = now
	case at.Sub(s.newer.at) >= minWindow:
		n.cores = cores(s.newer, now)
		n.older, n.newer = s.newer, now
	case !s.older.at.IsZero():
		n.cores = cores(s.older, now)
	}
	return n
}

func cores(from, to mark) amount {
	window := to.at.Sub(from.at)
	if window < minWindow || window > maxWindow || to.cpu < from.cpu {
		return amount{}
	}
	return known(uint64(math.Round(float64(to.cpu-from.cpu) / window.Seconds())))
}

// measureContainer gives a sample of the container that is younger than maxAge.
func (s *Service) measureContainer(ctx context.Context, c *container, maxAge time.Duration) (sample, error) {
	id := c.get().ID
	ctx, cancel := context.WithTimeout(ctx, statsTime)
	defer cancel()
	return s.stats.container(id).usage.get(ctx, maxAge, func(ctx context.Context, last sample) (sample, error) {
		a, err := c.task(s).Stats(ctx)
		if err != nil {
			return sample{}, fmt.Errorf("statistics of container %.13s from its shim: %w", id, err)
		}
		u, err := usageOf(a)
		if err != nil {
			return sample{}, err
		}
		return last.next(u, time.Now()), nil
	})
}

// measurePod gives a sample of the pod's own cgroup; ok is false when it has
// none or the cgroup is not there.
func (s *Service) measurePod(ctx context.Context, sb *sandbox, maxAge time.Duration) (v sample, ok bool, err error) {
	group := podCgroup(sb)
	if group == "" {
		return sample{}, false, nil
	}
	v, err = s.stats.sandbox(sb.get().ID).usage.get(ctx, maxAge, func(_ context.Context, last sample) (sample, error) {
		u, err := cgroupRoot().usage(group)
		if err != nil {
			return sample{}, err
		}
		return last.next(u, time.Now()), nil
	})
	return v, err == nil, err
}

const (
	samplerPeriod = 10 * time.Second // of everything, when nobody asks in between
	samplerRest   = 2 * time.Minute  // after which nobody is taken to be interested
)

// statsUsed notes that somebody asks for statistics and has the sampler run
// for some time, so that the next answer has rates.
func (s *Service) statsUsed() {
	st := &s.stats
	st.mu.Lock()
	defer st.mu.Unlock()
	st.used = time.Now()
	if st.sampling || s.ctx.Err() != nil {
		return
	}
	st.sampling = true
	s.work.Go(s.runSampler)
}

// runSampler measures what is new a second time, for its rate, and the rest
// now and then, until nobody asks any more.
func (s *Service) runSampler() {
	tick := time.NewTicker(minWindow)
	defer tick.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-tick.C:
		}
		if s.samplerDone() {
			return
		}
		s.sampleDue()
	}
}

// samplerDone ends the sampler when nobody has asked for long.
func (s *Service) samplerDone() bool {
	st := &s.stats
	st.mu.Lock()
	defer st.mu.Unlock()
	if time.Since(st.used) < samplerRest {
		return false
	}
	st.sampling = false
	return true
}

// due tells whether the sampler should measure the holder of the sample: only
// what somebody asked for once, and what misses its rate at once.
func due(v sample, age time.Duration, ok bool) bool {
	return ok && (age >= samplerPeriod || !v.cores.known && age >= minWindow)
}

func (s *Service) sampleDue() {
	var cs []*container
	for _, c := range s.running(nil) {
		if due(s.stats.container(c.get().ID).usage.last()) {
			cs = append(cs, c)
		}
	}
	var sbs []*sandbox
	for _, sb := range s.readySandboxes(nil) {
		if due(s.stats.sandbox(sb.get().ID).usage.last()) {
			sbs = append(sbs, sb)
		}
	}
	// Errors are no news here: who asks next gets them.
	_ = s.measureEach(s.ctx, len(cs)+len(sbs), func(ctx context.Context, i int) error {
		if i < len(cs) {
			_, _ = s.measureContainer(ctx, cs[i], minWindow)
		} else {
			_, _, _ = s.measurePod(ctx, sbs[i-len(cs)], minWindow)
		}
		return nil
	})
	s.stats.prune(s)
}

// prune drops entries of what was removed while it was being measured.
func (st *stats) prune(s *Service) {
	containers, sandboxes := map[string]bool{}, map[string]bool{}
	for _, c := range s.index.allContainers() {
		containers[c.get().ID] = true
	}
	for _, sb := range s.index.allSandboxes() {
		sandboxes[sb.get().ID] = true
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	for id := range st.containers {
		if !containers[id] {
			delete(st.containers, id)
		}
	}
	for id := range st.sandboxes {
		if !sandboxes[id] {
			delete(st.sandboxes, id)
		}
	}
}
