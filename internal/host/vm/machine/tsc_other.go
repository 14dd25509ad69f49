//go:build !amd64

package machine

// rdtsc is 0 on machines without that counter.
func rdtsc() uint64 { return 0 }
