// Package networktest is the test suite of network.Attacher: what the contract
// promises, tried with real interfaces, rules and traffic.
//
// The tests of an implementation run as a node of their own, in a network
// namespace that ends with them (see Main), so that the machine's own network
// is never touched.
package networktest

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"cloister.dev/internal/network/link"
)

const insideEnv = "CLOISTER_TEST_NODE"

// Main runs the tests of a package in network and mount namespaces of their
// own. Without root it runs them in place; those that need a node skip.
func Main(m *testing.M) {
	if os.Geteuid() != 0 || os.Getenv(insideEnv) != "" {
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		Pdeathsig:  syscall.SIGKILL,
	}
	runtime.LockOSThread() // Pdeathsig is about the thread
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			fmt.Fprintln(os.Stderr, "networktest:", err)
		}
		os.Exit(1)
	}
	os.Exit(0)
}

// The addresses of the node towards the outside, and of the one host there.
var (
	NodeIP4    = netip.MustParseAddr("192.0.2.1")
	NodeIP6    = netip.MustParseAddr("2001:db8::1")
	OutsideIP4 = netip.MustParseAddr("192.0.2.2")
	OutsideIP6 = netip.MustParseAddr("2001:db8::2")
)

// RequireNode skips the test where there is no throw-away node.
func RequireNode(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces and interfaces")
	}
	if os.Getenv(insideEnv) == "" {
		t.Fatal("TestMain of the package must call networktest.Main")
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal("make mounts private:", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
}

// Outside connects a host to the node that knows nothing of pods and their
// subnets.
func Outside(t testing.TB) *link.NetNS {
	t.Helper()
	if l, err := netlink.LinkByName("outside"); err == nil {
		if err := netlink.LinkDel(l); err != nil {
			t.Fatal(err)
		}
	}
	ns := NewNetNS(t)
	node, err := link.Open(nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = node.AddVeth(ns, link.VethConfig{
		Host: "outside", Pod: "up",
		Addrs: []link.Addr{{Prefix: netip.PrefixFrom(OutsideIP4, 24)}, {Prefix: netip.PrefixFrom(OutsideIP6, 64)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := netlink.LinkByName("outside")
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []*netlink.Addr{
		{IPNet: &net.IPNet{IP: NodeIP4.AsSlice(), Mask: net.CIDRMask(24, 32)}},
		{IPNet: &net.IPNet{IP: NodeIP6.AsSlice(), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD},
	} {
		if err := netlink.AddrAdd(l, a); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := errors.Join(node.RemoveNow("outside"), node.Close()); err != nil {
			t.Error(err)
		}
	})
	return ns
}

// RemoveAfter deletes an interface of the node at the end of the test.
func RemoveAfter(t testing.TB, name string) {
	t.Helper()
	t.Cleanup(func() {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return // was never made
		}
		if err := netlink.LinkDel(l); err != nil {
			t.Error(err)
		}
	})
}

// NewNetNS makes a network namespace, pinned in a file as the daemon does.
func NewNetNS(t testing.TB) *link.NetNS {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "cl")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "net")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := pin(path); err != nil {
		t.Fatal(err)
	}
	ns, err := link.OpenNetNS(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ns.Close()
		_ = unix.Unmount(path, unix.MNT_DETACH) // tests may have done it
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return ns
}

// pin makes the namespace on a thread that ends with it; the main thread could
// not, and its namespace is what others take for that of the process.
func pin(path string) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			err := pin(path) // on another thread, as this one is locked
			runtime.UnlockOSThread()
			done <- err
			return
		}
		// Not unlocked: the thread ends with the goroutine.
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
		}
		done <- err
	}()
	return <-done
}

// Unpin ends a namespace in which no process lives.
func Unpin(t testing.TB, ns *link.NetNS) {
	t.Helper()
	if err := unix.Unmount(ns.Path(), unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	ns.Close()
}

// Echo serves one address in a namespace (nil: the node's): it answers each
// connection or datagram with the client's address, then with what was sent.
func Echo(t testing.TB, ns *link.NetNS, network, addr string) {
	t.Helper()
	err := in(ns, func() error {
		if network == "udp" {
			c, err := net.ListenPacket(network, addr)
			if err != nil {
				return err
			}
			t.Cleanup(func() { c.Close() })
			go func() {
				b := make([]byte, 1500)
				for {
					_, from, err := c.ReadFrom(b)
					if err != nil {
						return
					}
					_, _ = c.WriteTo([]byte(from.String()+"\n"), from)
				}
			}()
			return nil
		}
		l, err := net.Listen(network, addr)
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = fmt.Fprintf(c, "%s\n", c.RemoteAddr())
				c.Close()
			}
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Reach connects from a namespace to an Echo and returns the address under
// which the other side saw the client.
func Reach(t testing.TB, ns *link.NetNS, network, addr string) netip.Addr {
	t.Helper()
	seen, err := TryReach(ns, network, addr, 5*time.Second)
	if err != nil {
		t.Fatalf("reach %s %s: %v", network, addr, err)
	}
	return seen
}

// TryReach is Reach that may fail.
func TryReach(ns *link.NetNS, network, addr string, patience time.Duration) (seen netip.Addr, err error) {
	err = in(ns, func() error {
		c, err := net.DialTimeout(network, addr, patience)
		if err != nil {
			return err
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		if network == "udp" {
			if _, err := c.Write([]byte("?")); err != nil {
				return err
			}
		}
		b := make([]byte, 200)
		n, err := c.Read(b)
		if err != nil {
			return err
		}
		p, err := netip.ParseAddrPort(string(b[:max(n-1, 0)]))
		seen = p.Addr().Unmap()
		return err
	})
	return seen, err
}

func in(ns *link.NetNS, f func() error) error {
	if ns == nil {
		return f()
	}
	return ns.Do(f)
}

// Trace counts what an attachment could leave on the node.
type Trace struct {
	Links, Elements, Rules int
}

// TakeTrace counts now.
func TakeTrace(t testing.TB) Trace {
	t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	tr := Trace{Links: len(links)}
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	tables, err := c.ListTables()
	if err != nil {
		t.Fatal(err)
	}
	for _, tbl := range tables {
		sets, err := c.GetSets(tbl)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range sets {
			elems, err := c.GetSetElements(s)
			if err != nil {
				t.Fatal(err)
			}
			tr.Elements += len(elems)
		}
	}
	chains, err := c.ListChains()
	if err != nil {
		t.Fatal(err)
	}
	for _, ch := range chains {
		rules, err := c.GetRules(ch.Table, ch)
		if err != nil {
			t.Fatal(err)
		}
		tr.Rules += len(rules)
	}
	return tr
}

// DropForwarded has the node's packet filter drop what it forwards, until the
// test ends. Where br_netfilter is on, pods of one bridge are forwarded, too.
func DropForwarded(t testing.TB) {
	t.Helper()
	for _, ipt := range []string{"iptables", "ip6tables"} {
		if _, err := exec.LookPath(ipt); err != nil {
			t.Skip("iptables is not installed, which is asked to drop:", err)
		}
		if out, err := exec.Command(ipt, "-P", "FORWARD", "DROP").CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", ipt, err, out)
		}
		t.Cleanup(func() {
			if out, err := exec.Command(ipt, "-P", "FORWARD", "ACCEPT").CombinedOutput(); err != nil {
				t.Errorf("%s: %v: %s", ipt, err, out)
			}
		})
	}
}
