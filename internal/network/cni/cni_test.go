package cni

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"cloister.dev/internal/network"
	"cloister.dev/internal/network/networktest"
)

func TestMain(m *testing.M) { networktest.Main(m) }

// bridgeList is what most nodes have; %[1]s is a folder, %[2]s the version.
const bridgeList = `{
  "cniVersion": "%[2]s", "name": "podnet",
  "plugins": [
    {"type": "bridge", "bridge": "cltest1", "isGateway": true, "ipMasq": true, "hairpinMode": true,
     "ipam": {"type": "host-local", "dataDir": "%[1]s/ipam",
              "ranges": [[{"subnet": "10.214.0.0/16"}], [{"subnet": "fd13:38::/64"}]],
              "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
    {"type": "portmap", "capabilities": {"portMappings": true}},
    {"type": "bandwidth", "capabilities": {"bandwidth": true}}
  ]
}`

func open(t testing.TB, dir, conf string) *Attacher {
	t.Helper()
	confDir := filepath.Join(dir, "net.d")
	if err := os.MkdirAll(confDir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(confDir, "10-test.conflist"), []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	a, err := New(Options{ConfDir: confDir, BinDirs: []string{filepath.Join(dir, "bin")}, MaxConfNum: 1, StateDir: filepath.Join(dir, "state")})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func subject(version string) networktest.Subject {
	return networktest.Subject{
		Bridge: "cltest1",
		Open: func(t testing.TB, dir string) network.Attacher {
			return open(t, dir, fmt.Sprintf(bridgeList, dir, version))
		},
	}
}

func TestSuite(t *testing.T) { networktest.Run(t, subject("1.0.0")) }

func BenchmarkAttach(b *testing.B) { networktest.Benchmark(b, subject("1.0.0")) }
