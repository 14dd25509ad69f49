package nat

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/nftables"
)

// TestMain runs the tests as a node of their own: in a network namespace that
// ends with them.
func TestMain(m *testing.M) {
	const inside = "CLOISTER_TEST_NODE"
	if os.Geteuid() != 0 || os.Getenv(inside) != "" {
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := cmd.Run(); err != nil {
		os.Exit(1)
	}
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: changes packet filter rules of a namespace")
	}
}

var (
	pod4 = netip.MustParsePrefix("10.1.2.3/16")
	pod6 = netip.MustParsePrefix("fd00::3/64")
)

func everything() Grant {
	return Grant{
		Masquerade: []netip.Prefix{pod4, pod6},
		Ports: []Port{
			{Protocol: 6, HostPort: 80, Port: 8080, Target: pod4},
			{Protocol: 17, HostPort: 53, Port: 53, Target: pod6},
			{Protocol: 132, HostPort: 9, Port: 9, Target: pod4, NoSNAT: true},
			{Protocol: 6, HostPort: 81, Port: 8080, HostIP: netip.MustParseAddr("127.0.0.1"), Target: pod4},
			{Protocol: 6, HostPort: 82, Port: 8080, HostIP: netip.IPv4Unspecified(), Target: pod4, MasqueradeAll: true},
			{Protocol: 6, HostPort: 81, Port: 8080, HostIP: netip.MustParseAddr("127.0.0.1"), Target: pod6}, // other family: nothing
		},
	}
}

func backends(t *testing.T, test func(t *testing.T, r Rules)) {
	needRoot(t)
	log := slog.New(slog.DiscardHandler)
	t.Run("nftables", func(t *testing.T) {
		r, err := Open("cloister-test", log)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		test(t, r)
	})
	t.Run("iptables", func(t *testing.T) {
		if _, err := exec.LookPath("iptables"); err != nil {
			t.Skip("iptables is not installed:", err)
		}
		r, err := openIPTables("cloister-test", log)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		test(t, r)
	})
}

func TestRules(t *testing.T) {
	backends(t, func(t *testing.T, r Rules) {
		ctx := context.Background()
		g := everything()
		for range 2 { // a repeat changes nothing
			if err := r.Add(ctx, "one", g, false); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.Check(ctx, "one", g); err != nil {
			t.Error(err)
		}
		if err := r.Check(ctx, "two", g); !errdefs.IsNotFound(err) {
			t.Errorf("check of what another has: %v, want not found", err)
		}
		if owners, err := r.Owners(ctx); err != nil || !slices.Equal(owners, []string{"one"}) {
			t.Errorf("owners %v, %v", owners, err)
		}
		other := Grant{Ports: []Port{{Protocol: 6, HostPort: 80, Port: 1, Target: netip.MustParsePrefix("10.1.2.4/16")}}}
		if err := r.Add(ctx, "two", other, false); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), "one") {
			t.Errorf("a port that is taken: %v, want already exists that names the owner", err)
		}
		if err := r.Add(ctx, "two", other, true); err != nil {
			t.Errorf("take over: %v", err)
		}
		if err := r.Remove(ctx, "one"); err != nil {
			t.Fatal(err)
		}
		if err := r.Check(ctx, "two", other); err != nil {
			t.Errorf("the removal of one owner took what another has: %v", err)
		}
		for range 2 {
			if err := r.Remove(ctx, "two"); err != nil {
				t.Fatal(err)
			}
		}
		if n, err := r.Count(ctx); err != nil || n != 0 {
			t.Errorf("%d elements left, %v", n, err)
		}
	})
}

func TestTableTakesOver(t *testing.T) {
	needRoot(t)
	ctx := context.Background()
	first, err := Open("cloister-next", nil)
	if err != nil {
		t.Fatal(err)
	}
	g := everything()
	if err := first.Add(ctx, "one", g, false); err != nil {
		t.Fatal(err)
	}
	first.Close()
	second, err := Open("cloister-next", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if err := second.Add(ctx, "two", Grant{Masquerade: []netip.Prefix{netip.MustParsePrefix("10.2.0.9/24")}}, false); err != nil {
		t.Fatal(err)
	}
	if err := second.Check(ctx, "one", g); err != nil {
		t.Errorf("a new subnet lost what there was: %v", err)
	}
	if err := errors.Join(second.Remove(ctx, "one"), second.Remove(ctx, "two")); err != nil {
		t.Fatal(err)
	}
	if n, err := second.Count(ctx); err != nil || n != 0 {
		t.Errorf("%d elements left, %v", n, err)
	}
}

// TestTableSurvives takes parts of the table away behind its back.
func TestTableSurvives(t *testing.T) {
	needRoot(t)
	ctx := context.Background()
	r, err := Open("cloister-break", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	tbl := &nftables.Table{Name: "cloister-break", Family: nftables.TableFamilyINet}
	g := everything()
	for name, harm := range map[string]func(){
		"nothing":         func() {},
		"rule set":        c.FlushRuleset,
		"table's rules":   func() { c.FlushTable(tbl) },
		"table":           func() { c.DelTable(tbl) },
		"one chain":       func() { c.FlushChain(&nftables.Chain{Name: "postrouting", Table: tbl}) },
		"elements of one": func() { c.FlushSet(&nftables.Set{Name: "masq4", Table: tbl}) },
		"another table":   func() { c.AddTable(&nftables.Table{Name: "other", Family: nftables.TableFamilyIPv4}) },
	} {
		t.Run(name, func(t *testing.T) {
			if err := r.Add(ctx, "old", g, false); err != nil {
				t.Fatal(err)
			}
			harm()
			if err := c.Flush(); err != nil {
				t.Fatal(err)
			}
			more := Grant{Masquerade: []netip.Prefix{netip.MustParsePrefix("10.1.2.9/16")}}
			if err := r.Add(ctx, "new", more, false); err != nil {
				t.Fatal(err)
			}
			if err := r.Check(ctx, "new", more); err != nil {
				t.Error(err)
			}
			if err := r.Remove(ctx, "old"); err != nil {
				t.Error(err)
			}
			if err := r.Remove(ctx, "new"); err != nil {
				t.Error(err)
			}
			if n, err := r.Count(ctx); err != nil || n != 0 {
				t.Errorf("%d elements left, %v", n, err)
			}
		})
	}
}

func TestForward(t *testing.T) {
	needRoot(t)
	if _, err := exec.LookPath("iptables"); err != nil {
		t.Skip("iptables is not installed, which reads the rules back:", err)
	}
	ctx := context.Background()
	f := NewForward(nil)
	if f.Filtered(true) {
		t.Error("a node without rules is said to drop what it forwards")
	}
	if out, err := exec.Command("iptables", "-P", "FORWARD", "DROP").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if !f.Filtered(true) {
		t.Error("the policy DROP is not noticed")
	}
	hosts := []netip.Prefix{netip.MustParsePrefix("10.1.2.3/32"), netip.MustParsePrefix("fd00::3/128"), netip.MustParsePrefix("10.9.0.0/20")}
	for range 2 {
		if err := f.Allow(ctx, "one", hosts, AdminChain); err != nil {
			t.Fatal(err)
		}
	}
	if ok, err := f.Allowed(ctx, "one", hosts); err != nil || !ok {
		t.Errorf("allowed: %v, %v", ok, err)
	}
	out, err := exec.Command("iptables", "-S").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, want := range []string{
		"-A FORWARD -m comment --comment \"CNI firewall plugin rules\" -j CNI-FORWARD",
		"-A CNI-FORWARD -m comment --comment \"CNI firewall plugin admin overrides\" -j CNI-ADMIN",
		"-A CNI-FORWARD -s 10.1.2.3/32 -m comment --comment one -j ACCEPT",
		"-A CNI-FORWARD -s 10.9.0.0/20 -m comment --comment one -j ACCEPT",
		"-A CNI-FORWARD -d 10.1.2.3/32 -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -m comment --comment one -j ACCEPT",
	} {
		if strings.Count(string(out), want+"\n") != 1 {
			t.Errorf("iptables does not read %s once:\n%s", want, out)
		}
	}
	for range 2 {
		if err := f.Revoke(ctx, "one"); err != nil {
			t.Fatal(err)
		}
	}
	if ok, err := f.Allowed(ctx, "one", hosts); err != nil || ok {
		t.Errorf("allowed after the end: %v, %v", ok, err)
	}
}

func TestSplitArgs(t *testing.T) {
	got := splitArgs(`-A X -d 10.0.0.1/32 -m comment --comment "a \"b\" c" -j ACCEPT`)
	want := []string{"-A", "X", "-d", "10.0.0.1/32", "-m", "comment", "--comment", `a "b" c`, "-j", "ACCEPT"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func FuzzParseElement(f *testing.F) {
	f.Add(elementList("t", "s", []element{{set: "s", key: "abcd", jump: "c", owner: "o"}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<16 {
			return
		}
		parseElement("s", b)
		eachAttr(b, func(_ uint16, d []byte) { parseElement("s", d) })
	})
}

func BenchmarkAddRemove(b *testing.B) {
	ctx := context.Background()
	r, err := Open("cloister-test", nil)
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	g := Grant{Masquerade: []netip.Prefix{netip.MustParsePrefix("10.1.2.3/16")}}
	for b.Loop() {
		if err := r.Add(ctx, "one", g, false); err != nil {
			b.Fatal(err)
		}
		if err := r.Remove(ctx, "one"); err != nil {
			b.Fatal(err)
		}
	}
}
