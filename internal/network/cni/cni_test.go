package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"

	"cloister.dev/internal/network"
	"cloister.dev/internal/network/link"
	"cloister.dev/internal/network/networktest"
)

func TestMain(m *testing.M) { networktest.Main(m) }

// The lists that most nodes have; %[1]s is a folder, %[2]s the version.
const (
	bridgeList = `{
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
	ptpList = `{
  "cniVersion": "%[2]s", "name": "podnet",
  "plugins": [
    {"type": "ptp", "ipMasq": true, "mtu": 1400,
     "ipam": {"type": "host-local", "dataDir": "%[1]s/ipam",
              "ranges": [[{"subnet": "10.215.0.0/24", "rangeStart": "10.215.0.10"}], [{"subnet": "fd13:39::/64"}]],
              "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
    {"type": "portmap", "capabilities": {"portMappings": true}},
    {"type": "bandwidth", "capabilities": {"bandwidth": true}}
  ]
}`
	everyList = `{
  "cniVersion": "%[2]s", "name": "podnet",
  "plugins": [
    {"type": "loopback"},
    {"type": "bridge", "bridge": "cltest2", "isDefaultGateway": true, "forceAddress": true, "ipMasq": true, "promiscMode": true,
     "ipam": {"type": "host-local", "dataDir": "%[1]s/ipam",
              "ranges": [[{"subnet": "10.216.0.0/24"}, {"subnet": "10.216.1.0/24"}], [{"subnet": "fd13:40::/64"}]]}},
    {"type": "tuning", "dataDir": "%[1]s/tuning", "mtu": 1300, "sysctl": {"net.ipv4.conf.IFNAME.log_martians": "1"}},
    {"type": "firewall"},
    {"type": "portmap", "capabilities": {"portMappings": true}},
    {"type": "bandwidth", "capabilities": {"bandwidth": true}}
  ]
}`
)

func confDir(dir string) string { return filepath.Join(dir, "net.d") }
func binDir(dir string) string  { return filepath.Join(dir, "bin") }

func write(t testing.TB, path, data string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(data), mode); err != nil {
		t.Fatal(err)
	}
}

func start(t testing.TB, dir string, change ...func(*Options)) *Attacher {
	t.Helper()
	o := Options{ConfDir: confDir(dir), BinDirs: []string{binDir(dir)}, MaxConfNum: 1, StateDir: filepath.Join(dir, "state")}
	for _, c := range change {
		c(&o)
	}
	a, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func subject(list, version, bridge string) networktest.Subject {
	return networktest.Subject{
		Bridge: bridge,
		Open: func(t testing.TB, dir string) network.Attacher {
			write(t, filepath.Join(confDir(dir), "10-test.conflist"), fmt.Sprintf(list, dir, version), 0o644)
			return start(t, dir)
		},
	}
}

func TestSuiteBridge(t *testing.T) { networktest.Run(t, subject(bridgeList, "1.0.0", "cltest1")) }

func TestSuitePTP(t *testing.T) { networktest.Run(t, subject(ptpList, "0.3.1", "")) }

// TestSuiteEverything runs on a node that drops what it forwards.
func TestSuiteEverything(t *testing.T) {
	networktest.RequireNode(t)
	networktest.DropForwarded(t)
	networktest.Run(t, subject(everyList, "1.1.0", "cltest2"))
}

func BenchmarkAttach(b *testing.B) { networktest.Benchmark(b, subject(bridgeList, "1.0.0", "cltest1")) }

func newPod(t testing.TB, id string) network.Request {
	return network.Request{ID: id, Namespace: "ns", Name: "pod", UID: "uid", NetNS: networktest.NewNetNS(t).Path()}
}

func deadline(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func shut(t testing.TB, a *Attacher) {
	t.Helper()
	if err := a.Close(); err != nil {
		t.Error(err)
	}
}

func TestVersions(t *testing.T) {
	networktest.RequireNode(t)
	for _, v := range []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		t.Run(v, func(t *testing.T) {
			dir := t.TempDir()
			write(t, filepath.Join(confDir(dir), "10.conflist"), fmt.Sprintf(everyList, dir, v), 0o644)
			a := start(t, dir)
			defer shut(t, a)
			if err := a.Ready(); err != nil {
				t.Fatal(err)
			}
			ctx, r := deadline(t), newPod(t, "v"+v)
			r.Ports = []network.PortMapping{{Protocol: "tcp", ContainerPort: 80, HostPort: 8080}}
			res, err := a.Attach(ctx, r)
			if err != nil {
				t.Fatal(err)
			}
			var raw struct {
				Version string `json:"cniVersion"`
			}
			if err := json.Unmarshal(res.Raw, &raw); err != nil || raw.Version != "1.0.0" {
				t.Errorf("raw result of version %q, %v", raw.Version, err)
			}
			if v >= "0.4.0" {
				if err := a.Check(ctx, r); err != nil {
					t.Errorf("check: %v", err)
				}
				breakPod(t, r)
				if err := a.Check(ctx, r); err == nil {
					t.Error("check of a pod that lost its address: no error")
				}
			}
			if v >= "1.1.0" {
				if err := a.GC(ctx, []string{"somebody"}); err != nil {
					t.Errorf("gc: %v", err)
				}
				if held, err := a.AddressHolders(); err != nil || len(held) > 0 {
					t.Errorf("addresses after gc: %v, %v", held, err)
				}
			}
			if err := a.Detach(ctx, r); err != nil {
				t.Error(err)
			}
		})
	}
}

func breakPod(t *testing.T, r network.Request) {
	t.Helper()
	ns, err := link.OpenNetNS(r.NetNS)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	err = ns.Do(func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		addrs, err := netlink.AddrList(l, netlink.FAMILY_V4)
		if err != nil {
			return err
		}
		return netlink.AddrDel(l, &addrs[0])
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestTuning(t *testing.T) {
	networktest.RequireNode(t)
	dir := t.TempDir()
	write(t, filepath.Join(confDir(dir), "10.conflist"), fmt.Sprintf(everyList, dir, "1.0.0"), 0o644)
	a := start(t, dir)
	defer shut(t, a)
	ctx, r := deadline(t), newPod(t, "tuned")
	if _, err := a.Attach(ctx, r); err != nil {
		t.Fatal(err)
	}
	ns, err := link.OpenNetNS(r.NetNS)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	st, err := link.Inspect(ns, "eth0")
	if err != nil || st.MTU != 1300 {
		t.Errorf("mtu %d, %v; want 1300", st.MTU, err)
	}
	const key = "/proc/sys/net/ipv4/conf/eth0/log_martians"
	have, err := link.ReadSysctls(ns, []string{key})
	if err != nil || have[key] != "1\n" {
		t.Errorf("sysctl %q, %v", have[key], err)
	}
	if err := a.Detach(ctx, r); err != nil {
		t.Fatal(err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "tuning", "*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestHostLocalFiles checks the form in which other programs read the state.
func TestHostLocalFiles(t *testing.T) {
	networktest.RequireNode(t)
	dir := t.TempDir()
	write(t, filepath.Join(confDir(dir), "10.conflist"), fmt.Sprintf(bridgeList, dir, "1.0.0"), 0o644)
	// Somebody else's address, and the end of the range that they used last.
	data := filepath.Join(dir, "ipam", "podnet")
	write(t, filepath.Join(data, "10.214.0.8"), "foreign\r\neth0", 0o600)
	write(t, filepath.Join(data, "last_reserved_ip.0"), "10.214.0.7", 0o600)
	a := start(t, dir)
	defer shut(t, a)
	ctx, r := deadline(t), newPod(t, "files")
	res, err := a.Attach(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	if want := netip.MustParseAddr("10.214.0.9"); res.IPs[0] != want {
		t.Errorf("address %s, want %s", res.IPs[0], want)
	}
	for name, want := range map[string]string{"10.214.0.9": "files\r\neth0", "last_reserved_ip.0": "10.214.0.9", "fd13:38::2": "files\r\neth0"} {
		if got, err := os.ReadFile(filepath.Join(data, name)); err != nil || string(got) != want {
			t.Errorf("%s holds %q, %v; want %q", name, got, err, want)
		}
	}
	if err := a.Detach(ctx, r); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(data, "10.214.0.9")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("address is still held: %v", err)
	}
	if _, err := os.Stat(filepath.Join(data, "10.214.0.8")); err != nil {
		t.Errorf("somebody else's address is gone: %v", err)
	}
	if ids, err := a.Allocations(ctx); err != nil || len(ids) > 0 {
		t.Errorf("allocations %v, %v: those of others must not be among them", ids, err)
	}
	if ids, err := a.AddressHolders(); err != nil || !slices.Equal(ids, []string{"foreign"}) {
		t.Errorf("holders %v, %v", ids, err)
	}
}

// TestRangeFull is about an address range that ends.
func TestRangeFull(t *testing.T) {
	networktest.RequireNode(t)
	dir := t.TempDir()
	write(t, filepath.Join(confDir(dir), "10.conf"), fmt.Sprintf(`{"cniVersion":"1.0.0","name":"small","type":"bridge","bridge":"cltest3","isGateway":true,
		"ipam":{"type":"host-local","dataDir":"%s/ipam","subnet":"10.217.0.0/30"}}`, dir), 0o644)
	a := start(t, dir)
	defer shut(t, a)
	ctx, first, second := deadline(t), newPod(t, "first"), newPod(t, "second")
	if _, err := a.Attach(ctx, first); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Attach(ctx, second); err == nil || !strings.Contains(err.Error(), "10.conf") || !strings.Contains(err.Error(), "no IP addresses available") {
		t.Errorf("second pod: %v, want an error that names the file and the reason", err)
	}
	if err := a.Detach(ctx, first); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Attach(ctx, second); err != nil {
		t.Errorf("second pod, when there is room: %v", err)
	}
	if err := a.Detach(ctx, second); err != nil {
		t.Error(err)
	}
}

// TestConfChanges detaches what was attached under another configuration, in
// another life of the daemon.
func TestConfChanges(t *testing.T) {
	networktest.RequireNode(t)
	for name, change := range map[string]func(dir string){
		"removed": func(dir string) { os.RemoveAll(confDir(dir)) },
		"another": func(dir string) {
			write(t, filepath.Join(confDir(dir), "10.conflist"), fmt.Sprintf(everyList, dir, "1.0.0"), 0o644)
		},
		"broken": func(dir string) { write(t, filepath.Join(confDir(dir), "10.conflist"), "{", 0o644) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, filepath.Join(confDir(dir), "10.conflist"), fmt.Sprintf(bridgeList, dir, "1.0.0"), 0o644)
			a := start(t, dir)
			ctx, r := deadline(t), newPod(t, "changes")
			r.Ports = []network.PortMapping{{Protocol: "tcp", ContainerPort: 80, HostPort: 8080}}
			if _, err := a.Attach(ctx, r); err != nil {
				t.Fatal(err)
			}
			shut(t, a)
			change(dir)
			a = start(t, dir)
			defer shut(t, a)
			if err := a.Detach(ctx, r); err != nil {
				t.Fatal(err)
			}
			if left, err := filepath.Glob(filepath.Join(dir, "ipam", "podnet", "10.*")); err != nil || len(left) > 0 {
				t.Errorf("left: %v, %v", left, err)
			}
			if n, err := a.rules.Count(ctx); err != nil || n != 0 {
				t.Errorf("%d elements left, %v", n, err)
			}
		})
	}
}

func TestSeveralNetworks(t *testing.T) {
	networktest.RequireNode(t)
	for _, serially := range []bool{true, false} {
		dir := t.TempDir()
		write(t, filepath.Join(confDir(dir), "10.conflist"), fmt.Sprintf(bridgeList, dir, "1.0.0"), 0o644)
		write(t, filepath.Join(confDir(dir), "20.conflist"), strings.Replace(fmt.Sprintf(ptpList, dir, "1.0.0"), "podnet", "second", 1), 0o644)
		a := start(t, dir, func(o *Options) { o.MaxConfNum, o.SetupSerially, o.IPPref = 0, serially, "ipv6" })
		ctx, r := deadline(t), newPod(t, "several")
		res, err := a.Attach(ctx, r)
		if err != nil {
			t.Fatal(err)
		}
		if res.IPs[0].Is4() || len(res.IPs) != 2 {
			t.Errorf("addresses %v, want IPv6 first and those of eth0 only", res.IPs)
		}
		ns, err := link.OpenNetNS(r.NetNS)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := link.Inspect(ns, "eth1"); err != nil {
			t.Errorf("eth1: %v", err)
		}
		ns.Close()
		if err := a.Detach(ctx, r); err != nil {
			t.Error(err)
		}
		if held, err := a.AddressHolders(); err != nil || len(held) > 0 {
			t.Errorf("addresses held: %v, %v", held, err)
		}
		shut(t, a)
	}
}

func TestBadRequests(t *testing.T) {
	networktest.RequireNode(t)
	dir := t.TempDir()
	write(t, filepath.Join(confDir(dir), "10.conflist"), fmt.Sprintf(bridgeList, dir, "1.0.0"), 0o644)
	a := start(t, dir)
	defer shut(t, a)
	for _, change := range []func(*network.Request){
		func(r *network.Request) { r.ID = "" },
		func(r *network.Request) { r.ID = "../../etc" },
		func(r *network.Request) { r.ID = strings.Repeat("x", 10_000) },
		func(r *network.Request) { r.ID = "a\nb" },
		func(r *network.Request) { r.Name = "x;IP=10.0.0.1" },
		func(r *network.Request) { r.UID = "a=b" },
	} {
		r := newPod(t, "bad")
		change(&r)
		if _, err := a.Attach(deadline(t), r); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.40q %q %q: %v, want invalid argument", r.ID, r.Name, r.UID, err)
		}
	}
}

// What cannot be attached can still be detached, or its pod would stay for
// ever.
func TestNamesThatCannotBePassed(t *testing.T) {
	networktest.RequireNode(t)
	dir := t.TempDir()
	write(t, filepath.Join(confDir(dir), "10.conflist"), fmt.Sprintf(bridgeList, dir, "1.0.0"), 0o644)
	a := start(t, dir)
	defer shut(t, a)
	for _, bad := range []string{"a=b;c=d", "a\nb", "a\x00b"} {
		for field, r := range map[string]network.Request{
			"namespace": {ID: "n", Namespace: bad}, "name": {ID: "n", Name: bad}, "uid": {ID: "n", UID: bad},
		} {
			r.NetNS = networktest.NewNetNS(t).Path()
			if _, err := a.Attach(deadline(t), r); !errdefs.IsInvalidArgument(err) {
				t.Errorf("attach with %s %q: %v", field, bad, err)
			}
			if err := a.Detach(deadline(t), r); err != nil {
				t.Errorf("detach with %s %q: %v", field, bad, err)
			}
		}
	}
}
