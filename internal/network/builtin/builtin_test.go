package builtin

import (
	"net/netip"
	"testing"

	"cloister.dev/internal/network"
	"cloister.dev/internal/network/networktest"
)

func TestMain(m *testing.M) { networktest.Main(m) }

func subject() networktest.Subject {
	return networktest.Subject{
		Bridge: "cltest0",
		Open: func(t testing.TB, dir string) network.Attacher {
			a, err := New(Options{
				Bridge: "cltest0", StateDir: dir, HostPorts: true,
				Subnets: []netip.Prefix{netip.MustParsePrefix("10.213.0.0/16"), netip.MustParsePrefix("fd13:37::/64")},
			})
			if err != nil {
				t.Fatal(err)
			}
			return a
		},
	}
}

func TestSuite(t *testing.T) { networktest.Run(t, subject()) }

func BenchmarkAttach(b *testing.B) { networktest.Benchmark(b, subject()) }
