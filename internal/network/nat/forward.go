package nat

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// Nothing in a table of one's own can make the kernel forward a packet that
// another table drops, and many nodes drop in the FORWARD chain of iptables'
// filter table. So passage is granted there: in the chain CNI-FORWARD, in front
// of everything, by rules that iptables reads as if it had written them. Where
// iptables is the one of old that knows no nftables, its program is run.

const (
	filterTable  = "filter"
	forwardChain = "FORWARD"
	passChain    = "CNI-FORWARD"
	passComment  = "CNI firewall plugin rules"
	adminComment = "CNI firewall plugin admin overrides"
	// AdminChain goes first in passChain; administrators fill it.
	AdminChain = "CNI-ADMIN"
)

// Forward grants passage through iptables' FORWARD chain. Safe for concurrent
// use.
type Forward struct {
	log *slog.Logger
	mu  sync.Mutex // the chain is read before it is changed
}

// NewForward touches nothing yet.
func NewForward(log *slog.Logger) *Forward {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Forward{log: log}
}

// Allow lets packets from the prefixes pass, and answers to them. The chains
// are made where they are missing. Repeating it is fine.
func (f *Forward) Allow(ctx context.Context, owner string, prefixes []netip.Prefix, admin string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, v4 := range []bool{true, false} {
		own := slices.DeleteFunc(slices.Clone(prefixes), func(p netip.Prefix) bool { return p.Addr().Is4() != v4 })
		if len(own) == 0 {
			continue
		}
		var err error
		if legacyIPTables(v4) {
			err = legacyAllow(v4, owner, own, admin)
		} else {
			err = allow(tableFamily(v4), owner, own, admin)
		}
		if err != nil {
			return fmt.Errorf("let %v pass the FORWARD chain: %w", own, err)
		}
	}
	return ctx.Err()
}

// Revoke takes all rules of the owner away.
func (f *Forward) Revoke(_ context.Context, owner string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var errs []error
	for _, v4 := range []bool{true, false} {
		if legacyIPTables(v4) {
			errs = append(errs, legacyRevoke(v4, owner))
			continue
		}
		errs = append(errs, revoke(tableFamily(v4), owner))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove rules of %s from the FORWARD chain: %w", owner, err)
	}
	return nil
}

// Allowed tells whether the owner has rules for as many prefixes.
func (f *Forward) Allowed(_ context.Context, owner string, prefixes []netip.Prefix) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	have := 0
	for _, v4 := range []bool{true, false} {
		if legacyIPTables(v4) {
			n, err := legacyCount(v4, owner)
			if err != nil {
				return false, err
			}
			have += n
			continue
		}
		c, err := nftables.New()
		if err != nil {
			return false, err
		}
		rules, err := rulesOf(c, passChainOf(tableFamily(v4)), owner)
		if err != nil {
			return false, err
		}
		have += len(rules)
	}
	return have >= 2*len(prefixes), nil
}

// Filtered tells whether the node drops forwarded packets of the family unless
// told otherwise.
func (f *Forward) Filtered(v4 bool) bool {
	if legacyIPTables(v4) {
		return true // asking would mean running the program
	}
	c, err := nftables.New()
	if err != nil {
		return false
	}
	chain, ok := baseChain(c, tableFamily(v4))
	return ok && chain.Policy != nil && *chain.Policy == nftables.ChainPolicyDrop
}

func tableFamily(v4 bool) nftables.TableFamily {
	if v4 {
		return nftables.TableFamilyIPv4
	}
	return nftables.TableFamilyIPv6
}

// legacyIPTables tells whether the kernel has a filter table that is not made
// of nftables.
func legacyIPTables(v4 bool) bool {
	path := "/proc/self/net/ip_tables_names"
	if !v4 {
		path = "/proc/self/net/ip6_tables_names"
	}
	names, err := os.ReadFile(path)
	return err == nil && slices.Contains(strings.Fields(string(names)), filterTable)
}

func passChainOf(family nftables.TableFamily) *nftables.Chain {
	return &nftables.Chain{Name: passChain, Table: &nftables.Table{Name: filterTable, Family: family}}
}

func baseChain(c *nftables.Conn, family nftables.TableFamily) (*nftables.Chain, bool) {
	chains, err := c.ListChainsOfTableFamily(family)
	if err != nil {
		return nil, false
	}
	i := slices.IndexFunc(chains, func(ch *nftables.Chain) bool { return ch.Table.Name == filterTable && ch.Name == forwardChain })
	if i < 0 {
		return nil, false
	}
	return chains[i], true
}

func allow(family nftables.TableFamily, owner string, prefixes []netip.Prefix, admin string) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	tbl := &nftables.Table{Name: filterTable, Family: family}
	pass := passChainOf(family)
	forward, ok := baseChain(c, family)
	if !ok {
		accept := nftables.ChainPolicyAccept
		forward = &nftables.Chain{
			Name: forwardChain, Table: tbl, Type: nftables.ChainTypeFilter,
			Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &accept,
		}
		c.AddTable(tbl)
		c.AddChain(forward)
	}
	c.AddChain(&nftables.Chain{Name: admin, Table: tbl})
	c.AddChain(pass)
	first := func(chain *nftables.Chain, to, text string) error {
		have, err := rulesTo(c, chain, to)
		if err != nil || have {
			return err
		}
		c.InsertRule(&nftables.Rule{Table: tbl, Chain: chain, Exprs: []expr.Any{
			&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictJump, Chain: to},
		}, UserData: comment(text)})
		return nil
	}
	if err := errors.Join(first(forward, passChain, passComment), first(pass, admin, adminComment)); err != nil {
		return err
	}
	old, err := rulesOf(c, pass, owner)
	if err != nil {
		return err
	}
	for _, r := range old {
		if err := c.DelRule(r); err != nil {
			return err
		}
	}
	for _, p := range prefixes {
		accept := []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictAccept}}
		answers := append(matchAddr(false, p), answerMatch())
		c.AddRule(&nftables.Rule{Table: tbl, Chain: pass, Exprs: append(compact(answers, p), accept...), UserData: comment(owner)})
		c.AddRule(&nftables.Rule{Table: tbl, Chain: pass, Exprs: append(compact(matchAddr(true, p), p), accept...), UserData: comment(owner)})
	}
	return c.Flush()
}

// compact leaves out the mask of a single address, as iptables does.
func compact(exprs []expr.Any, p netip.Prefix) []expr.Any {
	if !p.IsSingleIP() {
		return exprs
	}
	return slices.DeleteFunc(exprs, func(e expr.Any) bool { _, ok := e.(*expr.Bitwise); return ok })
}

// answerMatch is -m conntrack --ctstate RELATED,ESTABLISHED,DNAT. The last is
// more than the firewall plugin's program allows: published ports are reachable
// on nodes that drop, too.
func answerMatch() expr.Any {
	const established, related, dnat = 1 << 1, 1 << 2, 1 << 7
	info := &xt.ConntrackMtinfo3{}
	info.MatchFlags = uint16(xt.ConntrackState)
	info.StateMask = established | related | dnat
	return &expr.Match{Name: "conntrack", Rev: 3, Info: info}
}

func revoke(family nftables.TableFamily, owner string) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	rules, err := rulesOf(c, passChainOf(family), owner)
	if err != nil || len(rules) == 0 {
		return err
	}
	for _, r := range rules {
		if err := c.DelRule(r); err != nil {
			return err
		}
	}
	err = c.Flush()
	if errors.Is(err, unix.ENOENT) {
		return nil // somebody was faster
	}
	return err
}

// rulesOf lists the rules of a chain that have the comment.
func rulesOf(c *nftables.Conn, chain *nftables.Chain, text string) ([]*nftables.Rule, error) {
	rules, err := rulesIn(c, chain)
	return slices.DeleteFunc(rules, func(r *nftables.Rule) bool {
		s, ok := commentIn(r.UserData, userdata.TypeComment)
		return !ok || s != text
	}), err
}

func rulesIn(c *nftables.Conn, chain *nftables.Chain) ([]*nftables.Rule, error) {
	rules, err := c.GetRules(chain.Table, chain)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list rules of %s: %w", chain.Name, err)
	}
	return rules, nil
}

// rulesTo tells whether the chain jumps to another one.
func rulesTo(c *nftables.Conn, chain *nftables.Chain, to string) (bool, error) {
	rules, err := rulesIn(c, chain)
	return slices.ContainsFunc(rules, func(r *nftables.Rule) bool {
		return slices.ContainsFunc(r.Exprs, func(e expr.Any) bool {
			v, ok := e.(*expr.Verdict)
			return ok && v.Kind == expr.VerdictJump && v.Chain == to
		})
	}), err
}

func comment(s string) []byte { return userdata.AppendString(nil, userdata.TypeComment, s) }
