package nat

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/coreos/go-iptables/iptables"
)

// The iptables of old is changed by its own program, one run a rule.

func legacyTables(v4 bool) (*iptables.IPTables, error) {
	proto := iptables.ProtocolIPv4
	if !v4 {
		proto = iptables.ProtocolIPv6
	}
	ipt, err := iptables.New(iptables.IPFamily(proto), iptables.Timeout(10))
	if err != nil {
		return nil, fmt.Errorf("the kernel filters with iptables, install its program: %w", err)
	}
	return ipt, nil
}

func legacyAllow(v4 bool, owner string, prefixes []netip.Prefix, admin string) error {
	ipt, err := legacyTables(v4)
	if err != nil {
		return err
	}
	for _, chain := range []string{passChain, admin} {
		if ok, err := ipt.ChainExists(filterTable, chain); err != nil || ok {
			if err != nil {
				return err
			}
			continue
		}
		if err := ipt.NewChain(filterTable, chain); err != nil {
			return err
		}
	}
	for _, j := range [][3]string{{forwardChain, passChain, passComment}, {passChain, admin, adminComment}} {
		if err := ipt.InsertUnique(filterTable, j[0], 1, "-m", "comment", "--comment", j[2], "-j", j[1]); err != nil {
			return err
		}
	}
	for _, p := range prefixes {
		mark := []string{"-m", "comment", "--comment", owner, "-j", "ACCEPT"}
		answers := append([]string{"-d", p.String(), "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED,DNAT"}, mark...)
		if err := errors.Join(
			ipt.AppendUnique(filterTable, passChain, answers...),
			ipt.AppendUnique(filterTable, passChain, append([]string{"-s", p.String()}, mark...)...)); err != nil {
			return err
		}
	}
	return nil
}

func legacyRevoke(v4 bool, owner string) error {
	ipt, err := legacyTables(v4)
	if err != nil {
		return err
	}
	return deleteCommented(ipt, filterTable, passChain, owner)
}

func legacyCount(v4 bool, owner string) (int, error) {
	ipt, err := legacyTables(v4)
	if err != nil {
		return 0, err
	}
	rules, err := commented(ipt, filterTable, passChain, owner)
	return len(rules), err
}

// commented lists the rules of a chain that carry a comment, as arguments. A
// missing chain has none.
func commented(ipt *iptables.IPTables, table, chain, comment string) ([][]string, error) {
	ok, err := ipt.ChainExists(table, chain)
	if err != nil || !ok {
		return nil, err
	}
	lines, err := ipt.List(table, chain)
	if err != nil {
		return nil, err
	}
	var out [][]string
	for _, l := range lines {
		args := splitArgs(l)
		i := slices.Index(args, "--comment")
		if len(args) > 2 && args[0] == "-A" && i > 0 && i+1 < len(args) && args[i+1] == comment {
			out = append(out, args[2:])
		}
	}
	return out, nil
}

func deleteCommented(ipt *iptables.IPTables, table, chain, comment string) error {
	rules, err := commented(ipt, table, chain, comment)
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range rules {
		errs = append(errs, ipt.DeleteIfExists(table, chain, r...))
	}
	return errors.Join(errs...)
}

// splitArgs splits a rule as iptables -S prints it: by blanks, but for what is
// in double quotes.
func splitArgs(line string) []string {
	var out []string
	var word strings.Builder
	quoted, inWord := false, false
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case c == '\\' && quoted && i+1 < len(line):
			i++
			word.WriteByte(line[i])
		case c == '"':
			quoted, inWord = !quoted, true
		case c == ' ' && !quoted:
			if inWord {
				out = append(out, word.String())
				word.Reset()
			}
			inWord = false
		default:
			word.WriteByte(c)
			inWord = true
		}
	}
	if inWord {
		out = append(out, word.String())
	}
	return out
}
