package plugin

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"cloister.dev/internal/tee"
)

// Restarts kubelet, plugin and backend at random while containers are
// allocated, for CHAOS_TIME (make race: a minute), and then everything works.
func TestChaos(t *testing.T) {
	length := 3 * time.Second
	if s := os.Getenv("CHAOS_TIME"); s != "" {
		var err error
		if length, err = time.ParseDuration(s); err != nil {
			t.Fatal(err)
		}
	}
	b := newBed(t, memory(200), Options{})
	b.stop() // this test runs plugins of its own
	ctx, cancel := context.WithTimeout(context.Background(), length)
	defer cancel()
	b.kubelet.start(t)
	var all sync.WaitGroup
	counts := map[string]int{}
	loop := func(name string, longest time.Duration, step func(ctx context.Context)) {
		seed := rand.New(rand.NewPCG(uint64(len(name)), 1))
		n := 0
		all.Go(func() {
			for ctx.Err() == nil {
				step(ctx)
				n++
				select {
				case <-ctx.Done():
				case <-time.After(time.Duration(seed.Int64N(int64(longest)))):
				}
			}
			b.f.set(func() { counts[name] = n })
		})
	}
	loop("kubelet restarts", 400*time.Millisecond, func(context.Context) {
		b.kubelet.stop()
		if err := b.tryStart(); err != nil {
			t.Error(err)
		}
	})
	loop("plugin restarts", 10*time.Millisecond, func(ctx context.Context) {
		life, end := context.WithTimeout(ctx, 100*time.Millisecond+time.Duration(rand.Int64N(int64(900*time.Millisecond))))
		defer end()
		inv := tee.New([]tee.Backend{b.f}, tee.Options{Interval: 5 * time.Millisecond, Recheck: 5 * time.Millisecond})
		p := New(inv, Options{Dir: b.dir, CDIDir: b.cdi})
		var both sync.WaitGroup
		both.Go(func() { inv.Run(life) })
		both.Go(func() { p.Run(life) })
		both.Go(func() {
			for life.Err() == nil {
				p.Status()
			}
		})
		both.Wait()
	})
	loop("backend changes", 30*time.Millisecond, func(context.Context) {
		b.f.set(func() {
			b.f.err, b.f.ailments, b.f.resources = nil, nil, memory(100+rand.IntN(100))
			switch rand.IntN(4) {
			case 0:
				b.f.err = errors.New("the daemon of the TEE is restarting")
			case 1:
				b.f.ailments = []tee.Ailment{{Resource: ram, Part: tee.AllParts, Reason: "unplugged"}}
			case 2:
				b.f.resources = nil
			}
		})
	})
	allocated := 0
	loop("allocations", time.Millisecond, func(ctx context.Context) {
		call, end := context.WithTimeout(ctx, 5*time.Second)
		defer end()
		if _, err := b.allocate(call, ram, "1", "2"); err == nil {
			allocated++
		}
	})
	all.Wait()
	b.f.set(func() { b.f.err, b.f.ailments, b.f.resources = nil, nil, memory(50) })
	life, end := context.WithCancel(context.Background())
	inv := tee.New([]tee.Backend{b.f}, tee.Options{Interval: 5 * time.Millisecond})
	var both sync.WaitGroup
	both.Go(func() { inv.Run(life) })
	both.Go(func() { New(inv, Options{Dir: b.dir, CDIDir: b.cdi}).Run(life) })
	b.offered(t, ram, 50)
	if _, err := b.allocate(t.Context(), ram, "1"); err != nil {
		t.Error(err)
	}
	end()
	both.Wait()
	t.Logf("in %v: %v, %d registrations, %d allocations succeeded", length, counts, b.registers, allocated)
}
