package machine

import (
	"sync"
	"time"
)

// Warm measures what Start needs to know of the host, so that the first
// machine does not pay for it (20 ms).
func Warm() { hostTSC() }

// tscWindow is how long the host's counter is watched. Reading a clock is good
// for 50 ns, so this gives 5 parts in a million.
const tscWindow = 20 * time.Millisecond

// hostTSC is the frequency of the host's time stamp counter in kHz, 0 where
// there is none.
var hostTSC = sync.OnceValue(func() uint64 {
	t0, c0 := readClocks()
	timer := time.NewTimer(tscWindow)
	defer timer.Stop()
	<-timer.C
	t1, c1 := readClocks()
	if c1 <= c0 {
		return 0
	}
	return uint64(float64(c1-c0) / float64(t1.Sub(t0).Nanoseconds()) * 1e6)
})

// readClocks reads both clocks as closely together as it gets.
func readClocks() (at time.Time, count uint64) {
	best := uint64(1<<64 - 1)
	for range 16 {
		before := rdtsc()
		now := time.Now()
		after := rdtsc()
		if after-before < best {
			best, at, count = after-before, now, before+(after-before)/2
		}
	}
	return at, count
}
