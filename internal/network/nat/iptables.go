package nat

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/coreos/go-iptables/iptables"
)

// ipTables implements Rules where the kernel has no nf_tables: one rule for
// each thing that an owner has, in chains of our own, told apart by comments.
type ipTables struct {
	log    *slog.Logger
	dnat   string // chain that PREROUTING and OUTPUT jump to
	snat   string // chain that POSTROUTING jumps to
	tables []*iptables.IPTables

	mu sync.Mutex // chains are read before they are changed
}

const natTable = "nat"

func openIPTables(name string, log *slog.Logger) (Rules, error) {
	sum := sha256.Sum256([]byte(name))
	tag := hex.EncodeToString(sum[:4])
	t := &ipTables{log: log, dnat: "CLOISTER-PORT-" + tag, snat: "CLOISTER-MASQ-" + tag}
	for _, proto := range []iptables.Protocol{iptables.ProtocolIPv4, iptables.ProtocolIPv6} {
		ipt, err := iptables.New(iptables.IPFamily(proto), iptables.Timeout(10))
		if err != nil {
			return nil, fmt.Errorf("the kernel has no nf_tables, and iptables cannot be run: install it: %w", errors.Join(err, errdefs.ErrFailedPrecondition))
		}
		t.tables = append(t.tables, ipt)
	}
	return t, nil
}

func (t *ipTables) Close() error { return nil }

func (t *ipTables) of(v4 bool) *iptables.IPTables {
	if v4 {
		return t.tables[0]
	}
	return t.tables[1]
}

// ensure makes the chains and the jumps to them.
func (t *ipTables) ensure(ipt *iptables.IPTables) error {
	for _, chain := range []string{t.dnat, t.snat} {
		ok, err := ipt.ChainExists(natTable, chain)
		if err == nil && !ok {
			err = ipt.NewChain(natTable, chain)
		}
		if err != nil {
			return err
		}
	}
	local := []string{"-m", "addrtype", "--dst-type", "LOCAL", "-j", t.dnat}
	return errors.Join(
		ipt.AppendUnique(natTable, "PREROUTING", local...),
		ipt.AppendUnique(natTable, "OUTPUT", local...),
		ipt.AppendUnique(natTable, "POSTROUTING", "-j", t.snat))
}

// chained is a rule and the chain it belongs to.
type chained struct {
	v4    bool
	chain string
	args  []string
}

func (t *ipTables) rulesOf(owner string, g Grant) []chained {
	var out []chained
	add := func(p netip.Prefix, chain string, args ...string) {
		out = append(out, chained{p.Addr().Is4(), chain, append(args, "-m", "comment", "--comment", owner)})
	}
	for _, p := range g.Ports {
		if !p.applies() {
			continue
		}
		match := []string{"-p", protocolName(p.Protocol), "--dport", strconv.Itoa(int(p.HostPort))}
		if p.HostIP.IsValid() && !p.HostIP.IsUnspecified() {
			match = append(match, "-d", p.HostIP.String())
		}
		to := netip.AddrPortFrom(p.Target.Addr(), p.Port).String()
		add(p.Target, t.dnat, append(match, "-j", "DNAT", "--to-destination", to)...)
		if p.NoSNAT {
			continue
		}
		back := []string{"-d", p.Target.Addr().String(), "-m", "conntrack", "--ctstate", "DNAT"}
		switch {
		case p.MasqueradeAll:
			add(p.Target, t.snat, append(slices.Clone(back), "-j", "MASQUERADE")...)
		default:
			add(p.Target, t.snat, append(slices.Clone(back), "-s", p.Target.Masked().String(), "-j", "MASQUERADE")...)
			if p.Target.Addr().Is4() {
				add(p.Target, t.snat, append(slices.Clone(back), "-s", "127.0.0.0/8", "-j", "MASQUERADE")...)
			}
		}
	}
	for _, m := range g.Masquerade {
		from, subnet, multicast := m.Addr().String(), m.Masked().String(), "224.0.0.0/4"
		if m.Addr().Is6() {
			multicast = "ff00::/8"
		}
		add(m, t.snat, "-s", from, "-d", subnet, "-j", "RETURN")
		add(m, t.snat, "-s", from, "!", "-d", multicast, "-j", "MASQUERADE")
	}
	return out
}

func (t *ipTables) Add(ctx context.Context, owner string, g Grant, takeOver bool) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	rules := t.rulesOf(owner, g)
	for _, v4 := range []bool{true, false} {
		own := slices.DeleteFunc(slices.Clone(rules), func(r chained) bool { return r.v4 != v4 })
		if len(own) == 0 {
			continue
		}
		ipt := t.of(v4)
		if err := t.ensure(ipt); err != nil {
			return fmt.Errorf("set up iptables chains: %w", err)
		}
		if err := t.conflict(ipt, owner, g, takeOver); err != nil {
			return err
		}
		for _, r := range own {
			if err := ctx.Err(); err != nil {
				return err
			}
			put := ipt.AppendUnique
			if r.chain == t.dnat { // the newest first, so it is the one that counts
				put = func(table, chain string, args ...string) error { return ipt.InsertUnique(table, chain, 1, args...) }
			}
			if err := put(natTable, r.chain, r.args...); err != nil {
				return fmt.Errorf("add iptables rule for %s: %w", owner, err)
			}
		}
	}
	return nil
}

// conflict refuses a port of the node that another owner has.
func (t *ipTables) conflict(ipt *iptables.IPTables, owner string, g Grant, takeOver bool) error {
	if takeOver || len(g.Ports) == 0 {
		return nil
	}
	lines, err := ipt.List(natTable, t.dnat)
	if err != nil {
		return fmt.Errorf("list iptables rules: %w", err)
	}
	for _, l := range lines {
		args := splitArgs(l)
		value := func(key string) string {
			if i := slices.Index(args, key); i >= 0 && i+1 < len(args) {
				return args[i+1]
			}
			return ""
		}
		for _, p := range g.Ports {
			host := ""
			if p.HostIP.IsValid() && !p.HostIP.IsUnspecified() {
				host = netip.PrefixFrom(p.HostIP, p.HostIP.BitLen()).String()
			}
			other := value("--comment")
			if other != owner && value("--dport") == strconv.Itoa(int(p.HostPort)) && value("-p") == protocolName(p.Protocol) && value("-d") == host {
				return fmt.Errorf("port %s of the node is published by sandbox %s: %w", p, other, errdefs.ErrAlreadyExists)
			}
		}
	}
	return nil
}

func (t *ipTables) Remove(_ context.Context, owner string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	for _, ipt := range t.tables {
		for _, chain := range []string{t.dnat, t.snat} {
			errs = append(errs, deleteCommented(ipt, natTable, chain, owner))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove iptables rules of %s: %w", owner, err)
	}
	return nil
}

func (t *ipTables) Check(_ context.Context, owner string, g Grant) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, r := range t.rulesOf(owner, g) {
		ok, err := t.of(r.v4).Exists(natTable, r.chain, r.args...)
		if err != nil {
			return fmt.Errorf("look for iptables rule: %w", err)
		}
		if !ok {
			return fmt.Errorf("an iptables rule of %s is missing in %s: %w", owner, r.chain, errdefs.ErrNotFound)
		}
	}
	return nil
}

func (t *ipTables) each(f func(owner string)) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, ipt := range t.tables {
		for _, chain := range []string{t.dnat, t.snat} {
			ok, err := ipt.ChainExists(natTable, chain)
			if err != nil {
				return fmt.Errorf("look for iptables chain %s: %w", chain, err)
			}
			if !ok {
				continue
			}
			lines, err := ipt.List(natTable, chain)
			if err != nil {
				return fmt.Errorf("list iptables rules: %w", err)
			}
			for _, l := range lines {
				args := splitArgs(l)
				if i := slices.Index(args, "--comment"); i >= 0 && i+1 < len(args) {
					f(args[i+1])
				}
			}
		}
	}
	return nil
}

func (t *ipTables) Owners(context.Context) ([]string, error) {
	var out []string
	err := t.each(func(o string) { out = append(out, o) })
	slices.Sort(out)
	return slices.Compact(out), err
}

func (t *ipTables) Count(context.Context) (int, error) {
	n := 0
	err := t.each(func(string) { n++ })
	return n, err
}
