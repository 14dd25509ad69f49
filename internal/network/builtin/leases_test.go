package builtin

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/network"
)

func openTest(t testing.TB, dir, subnet string) *leases {
	t.Helper()
	l, err := openLeases(dir, []netip.Prefix{netip.MustParsePrefix(subnet)})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func take(t testing.TB, l *leases, id string) netip.Addr {
	t.Helper()
	e, err := l.take(id, []network.PortMapping{{Protocol: "tcp", HostPort: 80, ContainerPort: 80}})
	if err != nil {
		t.Fatal(err)
	}
	return e.Addrs[0].Addr()
}

func TestLeasesWholeSubnet(t *testing.T) {
	for subnet, want := range map[string]int{"10.0.0.0/30": 1, "10.0.0.0/24": 253, "10.0.0.0/16": 65533} {
		l := openTest(t, t.TempDir(), subnet)
		p := netip.MustParsePrefix(subnet)
		seen := map[netip.Addr]bool{}
		for i := range want {
			a := take(t, l, fmt.Sprint("id", i))
			if seen[a] || !p.Contains(a) || a == p.Addr() || a == p.Addr().Next() {
				t.Fatalf("%s: address %s given twice or not for pods", subnet, a)
			}
			seen[a] = true
		}
		if _, err := l.take("more", nil); !errdefs.IsResourceExhausted(err) {
			t.Errorf("%s: one more: %v, want resource exhausted", subnet, err)
		}
		if err := l.give("id0"); err != nil {
			t.Fatal(err)
		}
		take(t, l, "more")
		if err := l.close(); err != nil {
			t.Error(err)
		}
	}
}

func TestLeasesRest(t *testing.T) {
	l := openTest(t, t.TempDir(), "10.0.0.0/24")
	defer l.close()
	first := take(t, l, "a")
	if err := l.give("a"); err != nil {
		t.Fatal(err)
	}
	if next := take(t, l, "b"); next == first {
		t.Errorf("%s was given again at once", first)
	}
	if err := l.give("a"); err != nil {
		t.Errorf("giving back twice: %v", err)
	}
	if _, err := l.take("b", nil); !errdefs.IsAlreadyExists(err) {
		t.Errorf("taking twice: %v, want already exists", err)
	}
}

// TestLeasesCut is a process that died at any byte of its journal.
func TestLeasesCut(t *testing.T) {
	dir := t.TempDir()
	l := openTest(t, dir, "10.0.0.0/24")
	for _, id := range []string{"a", "b", "c"} {
		take(t, l, id)
	}
	if err := errors.Join(l.give("b"), l.close()); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(filepath.Join(dir, journalName))
	if err != nil {
		t.Fatal(err)
	}
	lines := 0
	want := [][]string{{}, {"a"}, {"a", "b"}, {"a", "b", "c"}, {"a", "c"}}
	for end := range len(whole) + 1 {
		if end > 0 && whole[end-1] == '\n' {
			lines++
		}
		cut := t.TempDir()
		if err := os.WriteFile(filepath.Join(cut, journalName), whole[:end], 0o600); err != nil {
			t.Fatal(err)
		}
		l := openTest(t, cut, "10.0.0.0/24")
		if len(l.byID) != len(want[lines]) {
			t.Fatalf("cut at %d: %v, want %v", end, l.byID, want[lines])
		}
		used := map[netip.Addr]bool{}
		for _, id := range want[lines] {
			used[l.byID[id].Addrs[0].Addr()] = true
		}
		if a := take(t, l, "new"); used[a] {
			t.Fatalf("cut at %d: %s given twice", end, a)
		}
		if err := l.close(); err != nil {
			t.Fatal(err)
		}
		// What was written after the cut must be readable as well.
		l = openTest(t, cut, "10.0.0.0/24")
		if !l.has("new") {
			t.Fatalf("cut at %d: the lease after it is lost", end)
		}
		l.close()
	}
}

func TestLeasesOneProcess(t *testing.T) {
	dir := t.TempDir()
	l := openTest(t, dir, "10.0.0.0/24")
	defer l.close()
	if _, err := openLeases(dir, l.subnets); !errdefs.IsUnavailable(err) {
		t.Errorf("second opener: %v, want unavailable", err)
	}
}

func TestLeasesJournalStaysSmall(t *testing.T) {
	dir := t.TempDir()
	l := openTest(t, dir, "10.0.0.0/24")
	defer l.close()
	for range 3 * history {
		take(t, l, "x")
		if err := l.give("x"); err != nil {
			t.Fatal(err)
		}
	}
	st, err := os.Stat(filepath.Join(dir, journalName))
	if err != nil || st.Size() > 250*2*history {
		t.Errorf("journal of %d bytes, %v", st.Size(), err)
	}
}

func FuzzLeases(f *testing.F) {
	f.Add([]byte(`{"id":"a","slot":2,"addrs":["10.0.0.2/24"]}` + "\n" + `{"id":"a","free":true}` + "\n{"))
	f.Add([]byte(`{"id":"a","slot":4294967295}` + "\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, journalName), data, 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := openLeases(dir, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/28")})
		if err != nil {
			return
		}
		defer l.close()
		if !l.has("new") {
			if e, err := l.take("new", nil); err == nil && (e.Slot < firstSlot || e.Slot >= l.slots) {
				t.Errorf("slot %d is not one", e.Slot)
			}
		}
	})
}

func BenchmarkLeases(b *testing.B) {
	l := openTest(b, b.TempDir(), "10.0.0.0/16")
	defer l.close()
	for i := range 60000 {
		take(b, l, fmt.Sprint(i))
	}
	for b.Loop() {
		take(b, l, "x")
		if err := l.give("x"); err != nil {
			b.Fatal(err)
		}
	}
}
