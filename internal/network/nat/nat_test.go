package nat

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"testing"
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
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		os.Exit(1)
	}
}

func TestTable(t *testing.T) {
	ctx := context.Background()
	r, err := Open("cloister-test", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	g := Grant{
		Masquerade: []netip.Prefix{netip.MustParsePrefix("10.1.2.3/16"), netip.MustParsePrefix("fd00::3/64")},
		Ports: []Port{
			{Protocol: 6, HostPort: 80, Port: 8080, Target: netip.MustParsePrefix("10.1.2.3/16")},
			{Protocol: 17, HostPort: 53, Port: 53, Target: netip.MustParsePrefix("fd00::3/64")},
			{Protocol: 6, HostPort: 81, Port: 8080, HostIP: netip.MustParseAddr("127.0.0.1"), Target: netip.MustParsePrefix("10.1.2.3/16"), MasqueradeAll: true},
		},
	}
	if err := r.Add(ctx, "one", g, false); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("nft", "list", "ruleset").CombinedOutput()
	t.Log(string(out), err)
	if err := r.Check(ctx, "one", g); err != nil {
		t.Fatal(err)
	}
	if err := r.Remove(ctx, "one"); err != nil {
		t.Fatal(err)
	}
	if n, err := r.Count(ctx); err != nil || n != 0 {
		t.Fatal(n, err)
	}
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
