package networktest

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
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"

	"cloister.dev/internal/network"
	"cloister.dev/internal/network/link"
)

// Subject is the implementation under test, set up with an IPv4 and an IPv6
// subnet and published ports allowed.
type Subject struct {
	// Open makes an attacher on the folder; called again on the same folder
	// it is the daemon's next life.
	Open func(t testing.TB, dir string) network.Attacher
	// State lists folders beside dir that hold allocations, to be compared.
	State []string
	// Bridge is removed to see it come back; "": there is none.
	Bridge string
}

// settler is what an attacher has that finishes detaching in the background.
type settler interface {
	Settle(context.Context) error
}

type env struct {
	t       *testing.T
	ctx     context.Context
	a       network.Attacher
	dir     string
	s       Subject
	outside *link.NetNS
}

type pod struct {
	network.Request
	ns  *link.NetNS
	res *network.Result
}

func (p pod) ip4() netip.Addr { return p.family(true) }
func (p pod) ip6() netip.Addr { return p.family(false) }

func (p pod) family(v4 bool) netip.Addr {
	i := slices.IndexFunc(p.res.IPs, func(a netip.Addr) bool { return a.Is4() == v4 })
	if i < 0 {
		return netip.Addr{}
	}
	return p.res.IPs[i]
}

// Run runs the suite.
func Run(t *testing.T, s Subject) {
	RequireNode(t)
	RemoveAfter(t, s.Bridge)
	for name, test := range map[string]func(*env){
		"Result":            testResult,
		"Traffic":           testTraffic,
		"Ports":             testPorts,
		"PortsUDP":          testPortsUDP,
		"PortsHostIP":       testPortsHostIP,
		"DetachLeavesNone":  testDetachLeavesNone,
		"DetachTwice":       testDetachTwice,
		"DetachWithoutNS":   testDetachWithoutNS,
		"FailedAttach":      testFailedAttach,
		"Concurrent":        testConcurrent,
		"RulesFlushed":      testRulesFlushed,
		"BridgeRemoved":     testBridgeRemoved,
		"NextLife":          testNextLife,
		"Bandwidth":         testBandwidth,
		"AttachAfterDetach": testAttachAfterDetach,
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			t.Cleanup(cancel)
			dir := t.TempDir()
			e := &env{t: t, ctx: ctx, dir: dir, s: s, outside: Outside(t)}
			e.a = s.Open(t, dir)
			t.Cleanup(func() {
				if err := e.a.Close(); err != nil {
					t.Error(err)
				}
			})
			if err := e.a.Ready(); err != nil {
				t.Fatal("not ready:", err)
			}
			test(e)
		})
	}
}

func (e *env) request(name string) network.Request {
	return network.Request{
		ID:        fmt.Sprintf("%s-%d", name, time.Now().UnixNano()),
		Namespace: "default", Name: name, UID: "uid-" + name,
	}
}

func (e *env) attach(name string, ports ...network.PortMapping) pod {
	e.t.Helper()
	r := e.request(name)
	r.Ports = ports
	return e.attachRequest(r)
}

func (e *env) attachRequest(r network.Request) pod {
	e.t.Helper()
	p := pod{Request: r, ns: NewNetNS(e.t)}
	p.NetNS = p.ns.Path()
	res, err := e.a.Attach(e.ctx, p.Request)
	if err != nil {
		e.t.Fatal(err)
	}
	p.res = res
	p.Cached = res.Raw
	e.t.Cleanup(func() {
		if err := e.a.Detach(context.Background(), p.Request); err != nil {
			e.t.Error(err)
		}
	})
	return p
}

func (e *env) detach(p pod) {
	e.t.Helper()
	if err := e.a.Detach(e.ctx, p.Request); err != nil {
		e.t.Fatal(err)
	}
}

func (e *env) settle() {
	e.t.Helper()
	if s, ok := e.a.(settler); ok {
		if err := s.Settle(e.ctx); err != nil {
			e.t.Fatal(err)
		}
	}
}

// files lists what the state folders hold that names a sandbox.
func (e *env) files(id string) []string {
	var out []string
	for _, dir := range append([]string{e.dir}, e.s.State...) {
		_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return nil
			}
			b, _ := os.ReadFile(path)
			if strings.Contains(path, id) || (strings.Contains(string(b), id) && !strings.Contains(string(b), `"free":true`)) {
				out = append(out, path)
			}
			return nil
		})
	}
	return out
}

func testResult(e *env) {
	t := e.t
	p := e.attach("result")
	if p.res.Interface != "eth0" {
		t.Errorf("interface %q, want eth0", p.res.Interface)
	}
	if !p.ip4().IsValid() || !p.ip6().IsValid() {
		t.Fatalf("addresses %v, want one of each family", p.res.IPs)
	}
	if !p.res.IPs[0].Is4() {
		t.Errorf("addresses %v, want IPv4 first", p.res.IPs)
	}
	var raw types100.Result
	if err := json.Unmarshal(p.res.Raw, &raw); err != nil {
		t.Fatalf("raw result %s: %v", p.res.Raw, err)
	}
	if raw.CNIVersion < "1.0.0" {
		t.Errorf("raw result of version %s, want 1.0.0 or newer", raw.CNIVersion)
	}
	found := false
	for _, i := range raw.Interfaces {
		found = found || i.Name == "eth0" && i.Sandbox == p.NetNS
	}
	if !found || len(raw.IPs) != 2 {
		t.Errorf("raw result %s lacks eth0 of the sandbox or an address", p.res.Raw)
	}
	err := p.ns.Do(func() error {
		for _, name := range []string{"lo", "eth0"} {
			l, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			if l.Attrs().RawFlags&1 == 0 {
				return fmt.Errorf("%s is down", name)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	ids, err := e.a.Allocations(e.ctx)
	if err != nil || !slices.Contains(ids, p.ID) {
		t.Errorf("allocations %v (%v) lack %s", ids, err, p.ID)
	}
}

func testDetachLeavesNone(e *env) {
	t := e.t
	e.detach(e.attach("first")) // makes the bridge and the rules
	e.settle()
	before := TakeTrace(t)
	var pods []pod
	for i := range 5 {
		pods = append(pods, e.attach(fmt.Sprintf("p%d", i), network.PortMapping{Protocol: "tcp", ContainerPort: 80, HostPort: uint16(20000 + i)}))
	}
	if during := TakeTrace(t); during.Links != before.Links+5 || during.Elements <= before.Elements {
		t.Errorf("while attached: %+v, before: %+v", during, before)
	}
	for _, p := range pods {
		e.detach(p)
	}
	e.settle()
	if after := TakeTrace(t); after != before {
		t.Errorf("after: %+v, before: %+v", after, before)
	}
	for _, p := range pods {
		if left := e.files(p.ID); len(left) > 0 {
			t.Errorf("files of %s: %v", p.ID, left)
		}
	}
	if ids, err := e.a.Allocations(e.ctx); err != nil || len(ids) > 0 {
		t.Errorf("allocations %v, %v", ids, err)
	}
}

func testDetachTwice(e *env) {
	t := e.t
	p := e.attach("twice", network.PortMapping{Protocol: "tcp", ContainerPort: 80, HostPort: 20000})
	e.detach(p)
	e.detach(p)
	// The address and the port may have a new owner by the time of a repeat.
	next := e.attach("next", network.PortMapping{Protocol: "tcp", ContainerPort: 80, HostPort: 20000})
	Echo(t, next.ns, "tcp", netip.AddrPortFrom(next.ip4(), 80).String())
	e.detach(p)
	Reach(t, nil, "tcp", "127.0.0.1:20000")
	unknown := e.request("unknown")
	if err := e.a.Detach(e.ctx, unknown); err != nil {
		t.Errorf("detach of a sandbox that never was: %v", err)
	}
}

func testDetachWithoutNS(e *env) {
	t := e.t
	e.detach(e.attach("first"))
	e.settle()
	before := TakeTrace(t)
	for name, forget := range map[string]func(*network.Request){
		"no path":       func(r *network.Request) { r.NetNS = "" },
		"no file":       func(r *network.Request) { r.NetNS += "-gone" },
		"not mounted":   func(*network.Request) {},
		"nothing known": func(r *network.Request) { r.NetNS, r.Cached, r.Ports = "", nil, nil },
	} {
		p := e.attach("gone", network.PortMapping{Protocol: "tcp", ContainerPort: 80, HostPort: 20000})
		Unpin(t, p.ns)
		r := p.Request
		forget(&r)
		if err := e.a.Detach(e.ctx, r); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if left := e.files(p.ID); len(left) > 0 {
			t.Errorf("%s: files %v", name, left)
		}
	}
	e.settle()
	waitTrace(t, before)
}

// waitTrace waits for the kernel, which ends namespaces in the background.
func waitTrace(t *testing.T, want Trace) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		got := TakeTrace(t)
		if got == want {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("left: %+v, before: %+v", got, want)
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func testFailedAttach(e *env) {
	t := e.t
	e.detach(e.attach("first"))
	e.settle()
	before := TakeTrace(t)
	taken := NewNetNS(t)
	err := taken.Do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "eth0"
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs})
	})
	if err != nil {
		t.Fatal(err)
	}
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	done, cancel := context.WithCancel(e.ctx)
	cancel()
	for _, c := range []struct {
		name string
		ctx  context.Context
		path string
	}{
		{"no namespace", e.ctx, "/nowhere"},
		{"a plain file", e.ctx, plain},
		{"no path", e.ctx, ""},
		{"the node's own namespace", e.ctx, "/proc/thread-self/ns/net"},
		{"eth0 is taken", e.ctx, taken.Path()},
		{"cancelled", done, NewNetNS(t).Path()},
	} {
		r := e.request("fail")
		r.NetNS = c.path
		r.Ports = []network.PortMapping{{Protocol: "tcp", ContainerPort: 80, HostPort: 20000}}
		if _, err := e.a.Attach(c.ctx, r); err == nil {
			t.Errorf("%s: attached", c.name)
		}
		if left := e.files(r.ID); len(left) > 0 {
			t.Errorf("%s: files %v", c.name, left)
		}
	}
	e.settle()
	if after := TakeTrace(t); after != before {
		t.Errorf("after: %+v, before: %+v", after, before)
	}
	if ids, err := e.a.Allocations(e.ctx); err != nil || len(ids) > 0 {
		t.Errorf("allocations %v, %v", ids, err)
	}
}

func testConcurrent(e *env) {
	t := e.t
	const n = 50
	e.detach(e.attach("first"))
	e.settle()
	before := TakeTrace(t)
	reqs := make([]network.Request, n)
	for i := range reqs {
		reqs[i] = e.request(fmt.Sprintf("c%d", i))
		reqs[i].NetNS = NewNetNS(t).Path()
		reqs[i].Ports = []network.PortMapping{{Protocol: "tcp", ContainerPort: 80, HostPort: uint16(21000 + i)}}
	}
	results := make([]*network.Result, n)
	all := func(f func(i int) error) {
		t.Helper()
		errs := make([]error, n)
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() { errs[i] = f(i) })
		}
		wg.Wait()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	all(func(i int) (err error) {
		results[i], err = e.a.Attach(e.ctx, reqs[i])
		return err
	})
	seen := map[netip.Addr]int{}
	for i, r := range results {
		for _, ip := range r.IPs {
			if j, ok := seen[ip]; ok {
				t.Errorf("%s was given to both %d and %d", ip, i, j)
			}
			seen[ip] = i
		}
	}
	if len(seen) != 2*n {
		t.Errorf("%d addresses, want %d", len(seen), 2*n)
	}
	all(func(i int) error { return e.a.Detach(e.ctx, reqs[i]) })
	e.settle()
	if after := TakeTrace(t); after != before {
		t.Errorf("after: %+v, before: %+v", after, before)
	}
}

func testRulesFlushed(e *env) {
	t := e.t
	old := e.attach("old", network.PortMapping{Protocol: "tcp", ContainerPort: 80, HostPort: 20000})
	Echo(t, old.ns, "tcp", netip.AddrPortFrom(old.ip4(), 80).String())
	flushRules(t)
	next := e.attach("next", network.PortMapping{Protocol: "tcp", ContainerPort: 80, HostPort: 20001})
	Echo(t, next.ns, "tcp", netip.AddrPortFrom(next.ip4(), 80).String())
	Reach(t, nil, "tcp", "127.0.0.1:20001")
	Reach(t, nil, "tcp", "127.0.0.1:20000")
	flushRules(t)
	e.detach(old)
	e.detach(next)
}

func testBridgeRemoved(e *env) {
	t := e.t
	if e.s.Bridge == "" {
		return // no bridge, nothing to come back
	}
	e.attach("old")
	l, err := netlink.LinkByName(e.s.Bridge)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkDel(l); err != nil {
		t.Fatal(err)
	}
	a, b := e.attach("a"), e.attach("b")
	Echo(t, b.ns, "tcp", netip.AddrPortFrom(b.ip4(), 80).String())
	Reach(t, a.ns, "tcp", netip.AddrPortFrom(b.ip4(), 80).String())
	Reach(t, nil, "tcp", netip.AddrPortFrom(b.ip4(), 80).String())
}

func testNextLife(e *env) {
	t := e.t
	a := e.attach("a", network.PortMapping{Protocol: "tcp", ContainerPort: 80, HostPort: 20000})
	Echo(t, a.ns, "tcp", netip.AddrPortFrom(a.ip4(), 80).String())
	e.settle()
	if err := e.a.Close(); err != nil {
		t.Fatal(err)
	}
	e.a = e.s.Open(t, e.dir)
	Reach(t, nil, "tcp", "127.0.0.1:20000")
	ids, err := e.a.Allocations(e.ctx)
	if err != nil || !slices.Contains(ids, a.ID) {
		t.Errorf("allocations %v (%v) lack %s", ids, err, a.ID)
	}
	b := e.attach("b")
	if b.ip4() == a.ip4() || b.ip6() == a.ip6() {
		t.Errorf("addresses %v given twice", b.res.IPs)
	}
	e.detach(a)
	if left := e.files(a.ID); len(left) > 0 {
		t.Errorf("files %v", left)
	}
	if _, err := TryReach(nil, "tcp", "127.0.0.1:20000", time.Second); err == nil {
		t.Error("port still leads to the pod after Detach")
	}
}

func testAttachAfterDetach(e *env) {
	t := e.t
	p := e.attach("again")
	if _, err := e.a.Attach(e.ctx, p.Request); err == nil {
		t.Fatal("attached twice")
	} else if !errdefs.IsAlreadyExists(err) {
		t.Logf("second attach: %v", err)
	}
	Echo(t, p.ns, "tcp", netip.AddrPortFrom(p.ip4(), 80).String())
	Reach(t, nil, "tcp", netip.AddrPortFrom(p.ip4(), 80).String())
	e.detach(p)
	if _, err := e.a.Attach(e.ctx, p.Request); err != nil {
		t.Errorf("attach after detach: %v", err)
	}
}

func flushRules(t testing.TB) {
	t.Helper()
	c := must(nftConn())(t)
	c.FlushRuleset()
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
}
