package nat

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// The maps of the table, each once for either family.
const (
	setMasq   = "masq"   // address of a pod → chain of its subnet
	setPorts  = "ports"  // protocol, port → address, port
	setHostIP = "hostip" // address of the node, protocol, port → address, port
	setHair   = "hair"   // address of a pod with ports → chain of its subnet
)

func setNames() []string {
	var names []string
	for _, s := range []string{setMasq, setPorts, setHostIP, setHair} {
		names = append(names, s+"4", s+"6")
	}
	return names
}

const commitTries = 20

// table implements Rules with nf_tables. The lock is held over an exchange
// with the kernel: the elements in memory follow the order of transactions.
type table struct {
	name string
	log  *slog.Logger
	w    *wire

	mu      sync.Mutex
	gen     uint32             // generation for which the rules are known to be whole
	whole   bool               // gen means something
	subnets map[string]subnet  // chains that exist, or have to
	elems   map[string]element // by id
}

// subnet is a pair of chains that elements jump to.
type subnet struct {
	prefix netip.Prefix
}

func openTable(name string, w *wire, log *slog.Logger) (*table, error) {
	t := &table{name: name, log: log, w: w, subnets: map[string]subnet{}, elems: map[string]element{}}
	if err := t.load(); err != nil {
		w.close()
		return nil, err
	}
	return t, nil
}

// Close takes the table along when nobody has anything in it.
func (t *table) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	defer t.w.close()
	if len(t.elems) > 0 {
		return nil
	}
	have, err := t.w.countRules(t.name)
	if err != nil || len(have) == 0 {
		return err
	}
	return t.drop()
}

// load takes over what a former process left in the kernel.
func (t *table) load() error {
	for _, set := range setNames() {
		elems, err := t.w.dump(t.name, set)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return err
		}
		for _, e := range elems {
			t.elems[e.id()] = e
			if p, ok := chainSubnet(e.jump); ok {
				t.subnets[p.String()] = subnet{p}
			}
		}
	}
	return nil
}

func (t *table) Add(ctx context.Context, owner string, g Grant, takeOver bool) error {
	elems, subnets := elementsOf(owner, g)
	if len(elems) == 0 {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	var del, add []element
	for _, e := range elems {
		old, ok := t.elems[e.id()]
		switch {
		case !ok:
			add = append(add, e)
		case old == e:
		case old.owner != owner && !takeOver && old.val != "":
			return fmt.Errorf("port %s of the node is published by sandbox %s: %w", portOf(e), old.owner, errdefs.ErrAlreadyExists)
		default:
			if old.owner != owner {
				t.log.Warn("taking over from another sandbox", "what", e.set, "from", old.owner, "to", owner)
			}
			del, add = append(del, old), append(add, e)
		}
	}
	for _, p := range subnets {
		if _, ok := t.subnets[p.String()]; !ok {
			t.subnets[p.String()] = subnet{p}
			t.whole = false
		}
	}
	if err := t.commit(ctx, del, add); err != nil {
		return fmt.Errorf("add nftables elements for %s: %w", owner, err)
	}
	return nil
}

func (t *table) Remove(ctx context.Context, owner string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	del := t.ownedBy(owner)
	if len(del) == 0 {
		return nil
	}
	if err := t.commit(ctx, del, nil); err != nil {
		return fmt.Errorf("remove nftables elements of %s: %w", owner, err)
	}
	return nil
}

func (t *table) ownedBy(owner string) []element {
	var out []element
	for _, e := range t.elems {
		if e.owner == owner {
			out = append(out, e)
		}
	}
	slices.SortFunc(out, func(a, b element) int { return cmp.Or(cmp.Compare(a.set, b.set), cmp.Compare(a.key, b.key)) })
	return out
}

func (t *table) Check(_ context.Context, owner string, g Grant) error {
	elems, _ := elementsOf(owner, g)
	t.mu.Lock()
	defer t.mu.Unlock()
	inKernel := map[string]map[string]element{}
	for _, e := range elems {
		have, ok := inKernel[e.set]
		if !ok {
			list, err := t.w.dump(t.name, e.set)
			if err != nil && !errors.Is(err, unix.ENOENT) {
				return err
			}
			have = map[string]element{}
			for _, k := range list {
				have[k.id()] = k
			}
			inKernel[e.set] = have
		}
		if have[e.id()] != e {
			return fmt.Errorf("nftables set %s %s lacks an element of %s: %w", t.name, e.set, owner, errdefs.ErrNotFound)
		}
	}
	return nil
}

func (t *table) Owners(context.Context) ([]string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	owners := map[string]bool{}
	for _, e := range t.elems {
		owners[e.owner] = true
	}
	return slices.Sorted(maps.Keys(owners)), nil
}

func (t *table) Count(context.Context) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := 0
	for _, set := range setNames() {
		elems, err := t.w.dump(t.name, set)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return 0, err
		}
		n += len(elems)
	}
	return n, nil
}

// commit brings one change to the kernel on top of whole rules, and then to
// memory. The transaction names the generation it relies on, so a rule set
// that somebody emptied in between is noticed and rebuilt.
func (t *table) commit(ctx context.Context, del, add []element) error {
	for range commitTries {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := t.ensureWhole(); err != nil {
			return err
		}
		if len(del)+len(add) == 0 {
			return nil
		}
		err := t.w.commit(t.name, t.gen, del, add)
		if errors.Is(err, errStale) {
			t.whole = false
			continue
		}
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EEXIST) {
			// Somebody changed elements of ours by hand: start over from
			// what has to be there.
			if err := t.rebuild(); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			t.whole = false
			return err
		}
		for _, e := range del {
			delete(t.elems, e.id())
		}
		for _, e := range add {
			t.elems[e.id()] = e
		}
		t.gen++
		return nil
	}
	return fmt.Errorf("the node's rule set changes too often: %w", errdefs.ErrUnavailable)
}

// ensureWhole makes sure that the rules are there, as cheaply as it can: with
// no question when nobody else changed anything, with one when somebody
// changed something elsewhere.
func (t *table) ensureWhole() error {
	gen, err := t.w.generation()
	if err != nil {
		return err
	}
	if t.whole && gen == t.gen {
		return nil
	}
	have, err := t.w.countRules(t.name)
	if err != nil {
		return err
	}
	want := t.wantRules()
	for chain, n := range want {
		if have[chain] != n {
			return t.rebuild()
		}
	}
	t.gen, t.whole = gen, true
	return nil
}

// rebuild replaces the table by one that is whole and holds all elements.
func (t *table) rebuild() error {
	if err := t.build(slices.Collect(maps.Values(t.elems))); err != nil {
		t.whole = false
		return fmt.Errorf("set up nftables table %s: %w", t.name, err)
	}
	gen, err := t.w.generation()
	if err != nil {
		return err
	}
	t.gen, t.whole = gen, true
	return nil
}

// elementsOf translates a grant, and names the subnets whose chains it needs.
func elementsOf(owner string, g Grant) ([]element, []netip.Prefix) {
	var out []element
	var subnets []netip.Prefix
	for _, m := range g.Masquerade {
		subnets = append(subnets, m.Masked())
		out = append(out, element{
			set: setMasq + family(m), key: string(m.Addr().AsSlice()), jump: chainOf(chainMasq, m), owner: owner,
		})
	}
	hair := map[string]element{}
	for _, p := range g.Ports {
		if !p.applies() {
			continue
		}
		e := element{
			set:   setPorts + family(p.Target),
			key:   portKey(p.Protocol, p.HostPort),
			val:   string(p.Target.Addr().AsSlice()) + padPort(p.Port),
			owner: owner,
		}
		if p.HostIP.IsValid() && !p.HostIP.IsUnspecified() {
			e.set = setHostIP + family(p.Target)
			e.key = string(p.HostIP.AsSlice()) + e.key
		}
		out = append(out, e)
		if p.NoSNAT {
			continue
		}
		h := element{set: setHair + family(p.Target), key: string(p.Target.Addr().AsSlice()), jump: chainOf(chainHair, p.Target), owner: owner}
		if p.MasqueradeAll {
			h.jump = chainAll
		} else {
			subnets = append(subnets, p.Target.Masked())
		}
		hair[h.id()] = h
	}
	out = append(out, slices.Collect(maps.Values(hair))...)
	slices.SortFunc(out, func(a, b element) int { return cmp.Or(cmp.Compare(a.set, b.set), cmp.Compare(a.key, b.key)) })
	return slices.CompactFunc(out, func(a, b element) bool { return a.id() == b.id() }), subnets
}

// portKey is a protocol and a port as they lie in 32-bit registers.
func portKey(proto uint8, port uint16) string {
	return string([]byte{proto, 0, 0, 0}) + padPort(port)
}

func padPort(port uint16) string {
	return string(binary.BigEndian.AppendUint16(nil, port)) + "\x00\x00"
}

// portOf reads the key of an element back, for messages.
func portOf(e element) string {
	k := e.key
	if len(k) < 8 {
		return "?"
	}
	k, ip := k[len(k)-8:], k[:len(k)-8]
	p := Port{Protocol: k[0], HostPort: binary.BigEndian.Uint16([]byte(k[4:6]))}
	p.HostIP, _ = netip.AddrFromSlice([]byte(ip))
	return p.String()
}

func family(p netip.Prefix) string {
	if p.Addr().Is4() {
		return "4"
	}
	return "6"
}

const (
	chainMasq = "masq_"
	chainHair = "hair_"
	chainAll  = "masquerade_all"
)

// chainOf names the chain of a subnet; nft's language has no colons in names.
func chainOf(kind string, p netip.Prefix) string {
	return kind + strings.ReplaceAll(p.Masked().String(), ":", "_")
}

func chainSubnet(chain string) (netip.Prefix, bool) {
	s, ok := strings.CutPrefix(chain, chainMasq)
	if !ok {
		s, ok = strings.CutPrefix(chain, chainHair)
	}
	if !ok {
		return netip.Prefix{}, false
	}
	p, err := netip.ParsePrefix(strings.ReplaceAll(s, "_", ":"))
	return p, err == nil
}
