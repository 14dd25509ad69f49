package networktest

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/nftables"

	"cloister.dev/internal/network"
)

// Benchmark measures Attach and Detach one after the other, each with a
// namespace of its own, and reports the median and the 95th percentile.
func Benchmark(b *testing.B, s Subject) {
	RequireNode(b)
	RemoveAfter(b, s.Bridge)
	a := s.Open(b, b.TempDir())
	defer a.Close()
	ctx := context.Background()
	var attach, detach []time.Duration
	for i := 0; b.Loop(); i++ {
		b.StopTimer()
		ns := NewNetNS(b)
		r := network.Request{ID: fmt.Sprintf("%064x", i), Namespace: "default", Name: "bench", UID: "uid", NetNS: ns.Path()}
		b.StartTimer()
		start := time.Now()
		res, err := a.Attach(ctx, r)
		if err != nil {
			b.Fatal(err)
		}
		attach = append(attach, time.Since(start))
		r.Cached = res.Raw
		start = time.Now()
		if err := a.Detach(ctx, r); err != nil {
			b.Fatal(err)
		}
		detach = append(detach, time.Since(start))
		b.StopTimer()
		Unpin(b, ns)
		b.StartTimer()
	}
	for name, d := range map[string][]time.Duration{"attach": attach, "detach": detach} {
		slices.Sort(d)
		b.ReportMetric(float64(d[len(d)/2].Microseconds())/1000, name+"-p50-ms")
		b.ReportMetric(float64(d[len(d)*95/100].Microseconds())/1000, name+"-p95-ms")
	}
}

func nftConn() (*nftables.Conn, error) { return nftables.New() }
