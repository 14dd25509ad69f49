package backend

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cloister.dev/internal/tee"
	"cloister.dev/internal/tee/teec/teectest"
)

// machine is a tree that stands for one.
type machine struct {
	tee.Machine
	t *testing.T
}

func newMachine(t *testing.T) machine { return machine{tee.Machine{Root: t.TempDir()}, t} }

func (m machine) write(path, text string) {
	m.t.Helper()
	if err := os.MkdirAll(filepath.Dir(m.Path(path)), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(m.Path(path), []byte(text), 0o644); err != nil {
		m.t.Fatal(err)
	}
}

// device makes a node of /dev/zero's number.
func (m machine) device(paths ...string) {
	m.t.Helper()
	for _, p := range paths {
		if err := os.MkdirAll(filepath.Dir(m.Path(p)), 0o755); err != nil {
			m.t.Fatal(err)
		}
		if err := unix.Mknod(m.Path(p), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))); err != nil {
			m.t.Skip("making device nodes takes root:", err)
		}
	}
}

func (m machine) folder(path string) {
	m.t.Helper()
	if err := os.MkdirAll(m.Path(path), 0o755); err != nil {
		m.t.Fatal(err)
	}
}

func (m machine) open(name string, change func(o *Options)) tee.Backend {
	m.t.Helper()
	o := Defaults()
	o.Machine = m.Machine
	if change != nil {
		change(&o)
	}
	all, err := Open([]string{name}, o)
	if err != nil {
		m.t.Fatal(err)
	}
	return all[0]
}

// look scans and gives "RESOURCE=UNITS" and "!REASON" for each ailment.
func look(t *testing.T, b tee.Backend) string {
	t.Helper()
	found, err := b.Scan(t.Context())
	if err != nil {
		return "error: " + err.Error()
	}
	var out []string
	for _, r := range found {
		n := fmt.Sprint(r.Units())
		if r.Model == tee.Bytes {
			n = ""
			for _, p := range r.Parts {
				n += fmt.Sprintf("%s:%d,", p.Key, p.Bytes)
			}
		}
		out = append(out, r.Name+"="+n)
	}
	if c, ok := b.(tee.Checker); ok {
		for _, a := range c.Health(t.Context(), found) {
			out = append(out, "!"+a.Part+" "+a.Reason)
		}
	}
	return strings.Join(out, " ")
}

func want(t *testing.T, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestSGX(t *testing.T) {
	m := newMachine(t)
	b := m.open("sgx", nil)
	want(t, look(t, b), "")
	m.device("/dev/sgx_enclave", "/dev/sgx_provision")
	m.write("/sys/devices/system/node/node0/x86/sgx_total_bytes", "67108864\n")
	m.write("/sys/devices/system/node/node1/x86/sgx_total_bytes", "33554432\n")
	m.write("/sys/devices/system/node/node2/x86/sgx_total_bytes", "nonsense\n")
	want(t, look(t, b), "sgx.intel.com/enclave=110 sgx.intel.com/provision=110 sgx.intel.com/epc=node0:67108864,node1:33554432,")
	found, err := b.Scan(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	d := found[0].Parts[0].Grant.Devices
	if len(d) != 1 || d[0].Container != "/dev/sgx_enclave" || d[0].Host != m.Path("/dev/sgx_enclave") {
		t.Errorf("devices: %v", d)
	}
	// A device node that is a regular file is unwell; the other one is not.
	if err := os.Remove(m.Path("/dev/sgx_enclave")); err != nil {
		t.Fatal(err)
	}
	m.write("/dev/sgx_enclave", "")
	want(t, look(t, b), "sgx.intel.com/enclave=110 sgx.intel.com/provision=110 sgx.intel.com/epc=node0:67108864,node1:33554432, ! /dev/sgx_enclave is a regular file, not a device node: failed precondition")
}

func TestMisc(t *testing.T) {
	for _, file := range []string{"/sys/fs/cgroup/misc.capacity", "/sys/fs/cgroup/unified/misc.capacity", "/sys/fs/cgroup/misc/misc.capacity",
		"/host/sys/fs/cgroup/misc.capacity"} {
		m := newMachine(t)
		sev, tdx := m.open("sev", nil), m.open("tdx", nil)
		want(t, look(t, sev)+look(t, tdx), "")
		m.write(file, "sev 404\nsev_es 99\ntdx 31\n")
		want(t, look(t, sev), "sev.amd.com/asids=404 sev-snp.amd.com/esids=99 !* /dev/sev is not there: not found !* /dev/sev is not there: not found")
		want(t, look(t, tdx), "tdx.intel.com/keys=31")
		m.device("/dev/sev")
		want(t, look(t, sev), "sev.amd.com/asids=404 sev-snp.amd.com/esids=99")
		m.write(file, "sev_es -1\ntdx 0\nsev 1e9\n")
		want(t, look(t, sev)+look(t, tdx), "")
	}
}

func TestTPM(t *testing.T) {
	m := newMachine(t)
	b := m.open("tpm", nil)
	want(t, look(t, b), "")
	m.device("/dev/tpmrm0", "/dev/tpmrm1")
	m.write("/sys/class/tpm/tpm0/device/numa_node", "-1\n")
	m.write("/sys/class/tpm/tpm1/device/numa_node", "1\n")
	want(t, look(t, b), "cloister.dev/tpm=32")
	found, err := b.Scan(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if g := found[0].Parts[1].Grant.Devices[0]; g.Host != m.Path("/dev/tpmrm1") || g.Container != "/dev/tpmrm0" {
		t.Errorf("the second TPM is given as %+v", g)
	}
	if found[0].Parts[0].NUMA != nil || !slices.Equal(found[0].Parts[1].NUMA, []int64{1}) {
		t.Errorf("NUMA nodes: %v and %v", found[0].Parts[0].NUMA, found[0].Parts[1].NUMA)
	}
}

func TestSim(t *testing.T) {
	m := newMachine(t)
	fault := m.Path("/fault")
	b := m.open("sim", func(o *Options) { o.Sim.Nodes, o.Sim.FaultFile = 2, fault })
	want(t, look(t, b), "cloister.sim/tee-ram=128")
	m.write("/fault", "")
	want(t, look(t, b), "cloister.sim/tee-ram=128 !* told to be")
	m.write("/fault", "node1: on fire\n")
	want(t, look(t, b), "cloister.sim/tee-ram=128 !node1 on fire")
	m.write("/fault", strings.Repeat("x", 1<<20))
	if got := look(t, b); len(got) > 5000 {
		t.Errorf("a reason of %d bytes", len(got))
	}
	real := m.open("sim", func(o *Options) { o.Sim.Resource = "huawei.com/tee-ram" })
	if got := look(t, real); !strings.Contains(got, "cloister.sim/NAME") {
		t.Errorf("a simulation under a real name: %s", got)
	}
}

func TestTrustZone(t *testing.T) {
	lib := teectest.Build(t)
	m := newMachine(t)
	b := m.open("trustzone", func(o *Options) { o.Teec = lib.Options() })
	defer b.(*trustZone).Close()
	m.device("/dev/tc_ns_cvm", "/dev/teelog")
	m.folder("/var/itrustee/teecd")

	lib.Say(t, "total=2097152 free=1048576")
	want(t, look(t, b), "huawei.com/tee-ram=2896") // (2 GiB - 600 MiB) / 512 KiB
	found, err := b.Scan(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	g := found[0].Parts[0].Grant
	if len(g.Devices) != 2 || len(g.Mounts) != 1 || !g.Mounts[0].ReadOnly || g.Mounts[0].Container != "/var/itrustee/teecd" {
		t.Errorf("grant: %+v", g)
	}
	t.Run("free memory", func(t *testing.T) { freeMemory(t, b, lib, found[0]) })
	for _, tt := range []struct{ script, want string }{
		{"total=614400", "614400 KiB of memory, 614400 KiB are reserved"},
		{"total=1", "lower reserve_kib or precision"},
		{"fail=TEEC_OpenSession:ffff0008:3", "no trusted application of this UUID"},
		{"fail=TEEC_InitializeContext:ffff000e:0", "is teecd running"},
	} {
		lib.Say(t, tt.script)
		if got := look(t, b); !strings.HasPrefix(got, "error: ") || !strings.Contains(got, tt.want) {
			t.Errorf("%s: %s", tt.script, got)
		}
	}
	lib.Say(t, "")
	if err := os.RemoveAll(m.Path("/var/itrustee/teecd")); err != nil {
		t.Fatal(err)
	}
	want(t, look(t, b), "huawei.com/tee-ram=2896 !* /var/itrustee/teecd is not there: not found; is teecd running?")
	if err := os.Remove(m.Path("/dev/teelog")); err != nil {
		t.Fatal(err)
	}
	m.write("/dev/teelog", "")
	want(t, look(t, b), "huawei.com/tee-ram=2896 !* /dev/teelog is a regular file, not a device node: failed precondition")
	paths := b.(tee.Watcher).WatchPaths()
	if !slices.Contains(paths, m.Path("/dev/tc_ns_cvm")) {
		t.Errorf("watched: %v", paths)
	}
}

func freeMemory(t *testing.T, b tee.Backend, lib *teectest.Library, r tee.Resource) {
	ids := make([]string, 10)
	allocate := func(ctx context.Context) error { return b.(tee.Allocator).Allocate(ctx, r, ids, &tee.Grant{}) }
	lib.Say(t, "unit=1 free=5120")
	if err := allocate(t.Context()); err != nil {
		t.Errorf("ten of ten free units: %v", err)
	}
	const many = 2000
	start := time.Now()
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range many / 8 {
				if err := allocate(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	t.Logf("%.0f allocations a second, each with a session to the TA", many/time.Since(start).Seconds())
	lib.Say(t, "unit=1 free=5119")
	if err := allocate(t.Context()); !errors.Is(err, errdefs.ErrResourceExhausted) || !strings.Contains(err.Error(), "5119 KiB free") {
		t.Errorf("ten of nine free units: %v", err)
	}
}

func TestPrecision(t *testing.T) {
	for _, name := range []string{"trustzone", "sim"} {
		o := Defaults()
		o.TrustZone.PrecisionKiB, o.Sim.PrecisionKiB = 511, 511
		if _, err := Open([]string{name}, o); !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), "512") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Open([]string{"sgx", "sgx"}, Defaults()); err == nil {
		t.Error("a backend was taken twice")
	}
	if _, err := Open([]string{"unobtainium"}, Defaults()); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("unknown backend: %v", err)
	}
}

func TestProbe(t *testing.T) {
	m := newMachine(t)
	if got := Auto(m.Machine); len(got) > 0 {
		t.Errorf("an empty machine has %v", got)
	}
	m.write("/proc/cpuinfo", "processor : 0\nflags\t\t: fpu sgx sgx_lc\n")
	m.write("/sys/module/kvm_intel/parameters/tdx", "Y\n")
	m.write("/sys/fs/cgroup/misc.capacity", "tdx 15\n")
	m.write("/sys/class/tpm/tpm0/tpm_version_major", "2\n")
	m.device("/dev/tpmrm0", "/dev/tee0", "/dev/tc_ns_client")
	usable := map[string]bool{}
	for _, f := range m.Probe() {
		if f.Present {
			usable[f.Technology] = f.Usable
			if !f.Usable && f.Remedy == "" {
				t.Errorf("%s cannot be used and nothing says why", f.Technology)
			}
		}
	}
	wantUsable := map[string]bool{"sgx": false, "tdx": true, "tpm": true, "optee": false, "trustzone": false}
	if fmt.Sprint(usable) != fmt.Sprint(wantUsable) {
		t.Errorf("got %v, want %v", usable, wantUsable)
	}
	if got := Auto(m.Machine); !slices.Equal(got, []string{"sgx", "tdx", "trustzone", "tpm"}) {
		t.Errorf("backends: %v", got)
	}
}

func FuzzMisc(f *testing.F) {
	f.Add("sev 404\nsev_es 99\n")
	f.Add("tdx 99999999999999999999\ntdx")
	f.Fuzz(func(t *testing.T, text string) {
		m := tee.Machine{Root: t.TempDir()}
		dir := m.Path("/sys/fs/cgroup")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "misc.capacity"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, key := range []string{"sev", "sev_es", "tdx"} {
			if n, ok := m.MiscCapacity(key); ok != (n > 0) {
				t.Errorf("%q: %d, %v", text, n, ok)
			}
		}
	})
}
