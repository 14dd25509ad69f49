package nat

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// 32-bit registers, consecutive: what a map's key or value is composed of.
const (
	reg0 = unix.NFT_REG32_00
	reg1 = unix.NFT_REG32_01
)

const (
	ipv4Src, ipv4Dst = 12, 16
	ipv6Src, ipv6Dst = 8, 24
	ctStatusDNAT     = 1 << 5
)

// wantRules is the number of rules that each chain must have; build makes them.
func (t *table) wantRules() map[string]int {
	want := map[string]int{"prerouting": 1, "output": 1, "postrouting": 4, "to_pods": 4, chainAll: 1}
	for _, s := range t.subnets {
		hair := 2
		if s.prefix.Addr().Is6() {
			hair = 1
		}
		want[chainOf(chainMasq, s.prefix)] = 3
		want[chainOf(chainHair, s.prefix)] = hair
	}
	return want
}

// build puts a new table in the place of what there is, in one transaction:
// packets see either.
func (t *table) build(elems []element) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	tbl := &nftables.Table{Name: t.name, Family: nftables.TableFamilyINet}
	// Adding what may exist makes the deletion valid in every case.
	c.AddTable(tbl)
	c.DelTable(tbl)
	c.AddTable(tbl)
	b := builder{c: c, tbl: tbl}
	sets, err := b.sets()
	if err != nil {
		return err
	}
	b.chain(chainAll, nil, nil, "")
	b.rule(chainAll, &expr.Masq{})
	for _, s := range t.subnets {
		b.subnet(s.prefix)
	}
	b.ports(sets)
	b.hooks(sets)
	for _, e := range elems {
		s := sets[e.set]
		if s == nil {
			continue
		}
		se := nftables.SetElement{Key: []byte(e.key), Comment: e.owner}
		if e.jump != "" {
			se.VerdictData = &expr.Verdict{Kind: expr.VerdictJump, Chain: e.jump}
		} else {
			se.Val = []byte(e.val)
		}
		if err := c.SetAddElements(s, []nftables.SetElement{se}); err != nil {
			return err
		}
	}
	return c.Flush()
}

// drop removes the table.
func (t *table) drop() error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	c.DelTable(&nftables.Table{Name: t.name, Family: nftables.TableFamilyINet})
	if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove nftables table %s: %w", t.name, err)
	}
	return nil
}

type builder struct {
	c   *nftables.Conn
	tbl *nftables.Table
}

func (b builder) chain(name string, hook *nftables.ChainHook, prio *nftables.ChainPriority, typ nftables.ChainType) {
	b.c.AddChain(&nftables.Chain{Name: name, Table: b.tbl, Hooknum: hook, Priority: prio, Type: typ})
}

func (b builder) rule(chain string, exprs ...expr.Any) {
	b.c.AddRule(&nftables.Rule{Table: b.tbl, Chain: &nftables.Chain{Name: chain, Table: b.tbl}, Exprs: exprs})
}

func (b builder) sets() (map[string]*nftables.Set, error) {
	out := map[string]*nftables.Set{}
	add := func(name string, key, data nftables.SetDatatype, concat bool) error {
		s := &nftables.Set{Table: b.tbl, Name: name, IsMap: true, KeyType: key, DataType: data, Concatenation: concat, KeyByteOrder: binaryutil.BigEndian}
		out[name] = s
		return b.c.AddSet(s, nil)
	}
	for fam, addr := range map[string]nftables.SetDatatype{"4": nftables.TypeIPAddr, "6": nftables.TypeIP6Addr} {
		port := nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService)
		hostPort := nftables.MustConcatSetType(addr, nftables.TypeInetProto, nftables.TypeInetService)
		target := nftables.MustConcatSetType(addr, nftables.TypeInetService)
		for _, err := range []error{
			add(setMasq+fam, addr, nftables.TypeVerdict, false),
			add(setHair+fam, addr, nftables.TypeVerdict, false),
			add(setPorts+fam, port, target, true),
			add(setHostIP+fam, hostPort, target, true),
		} {
			if err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

// subnet makes the chains of one subnet. masq: what leaves it, but for
// multicast, gets the node's address. hair: so does what comes back into it
// after its destination was rewritten, and what the node sends as 127.0.0.1.
func (b builder) subnet(p netip.Prefix) {
	masq, hair := chainOf(chainMasq, p), chainOf(chainHair, p)
	b.chain(masq, nil, nil, "")
	b.chain(hair, nil, nil, "")
	multicast := netip.MustParsePrefix("224.0.0.0/4")
	if p.Addr().Is6() {
		multicast = netip.MustParsePrefix("ff00::/8")
	}
	back := &expr.Verdict{Kind: expr.VerdictReturn}
	b.rule(masq, append(matchAddr(false, p), back)...)
	b.rule(masq, append(matchAddr(false, multicast), back)...)
	b.rule(masq, &expr.Masq{})
	b.rule(hair, append(matchAddr(true, p), &expr.Masq{})...)
	if p.Addr().Is4() {
		b.rule(hair, append(matchAddr(true, netip.MustParsePrefix("127.0.0.0/8")), &expr.Masq{})...)
	}
}

// ports makes the chain that looks up published ports; the more particular map
// first.
func (b builder) ports(sets map[string]*nftables.Set) {
	const chain = "to_pods"
	b.chain(chain, nil, nil, "")
	for _, fam := range []string{"4", "6"} {
		proto, nat, dst, words := byte(unix.NFPROTO_IPV4), uint32(unix.NFPROTO_IPV4), uint32(ipv4Dst), uint32(1)
		if fam == "6" {
			proto, nat, dst, words = unix.NFPROTO_IPV6, unix.NFPROTO_IPV6, ipv6Dst, 4
		}
		dnat := &expr.NAT{Type: expr.NATTypeDestNAT, Family: nat, RegAddrMin: reg0, RegProtoMin: reg0 + words}
		lookup := func(set string) *expr.Lookup {
			return &expr.Lookup{SourceRegister: reg0, DestRegister: reg0, IsDestRegSet: true, SetName: set, SetID: sets[set].ID}
		}
		b.rule(chain, append(isFamily(proto),
			&expr.Payload{DestRegister: reg0, Base: expr.PayloadBaseNetworkHeader, Offset: dst, Len: 4 * words},
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg0 + words},
			&expr.Payload{DestRegister: reg0 + words + 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
			lookup(setHostIP+fam), dnat)...)
		b.rule(chain, append(isFamily(proto),
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg0},
			&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
			lookup(setPorts+fam), dnat)...)
	}
}

func (b builder) hooks(sets map[string]*nftables.Set) {
	b.chain("prerouting", nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest, nftables.ChainTypeNAT)
	b.chain("output", nftables.ChainHookOutput, nftables.ChainPriorityNATDest, nftables.ChainTypeNAT)
	b.chain("postrouting", nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, nftables.ChainTypeNAT)
	for _, chain := range []string{"prerouting", "output"} {
		b.rule(chain,
			&expr.Fib{Register: unix.NFT_REG_1, FlagDADDR: true, ResultADDRTYPE: true},
			&expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
			&expr.Verdict{Kind: expr.VerdictJump, Chain: "to_pods"})
	}
	for _, fam := range []string{"4", "6"} {
		proto, src, dst, words := byte(unix.NFPROTO_IPV4), uint32(ipv4Src), uint32(ipv4Dst), uint32(1)
		if fam == "6" {
			proto, src, dst, words = unix.NFPROTO_IPV6, ipv6Src, ipv6Dst, 4
		}
		load := func(offset uint32) expr.Any {
			return &expr.Payload{DestRegister: unix.NFT_REG_1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4 * words}
		}
		dispatch := func(set string) expr.Any {
			return &expr.Lookup{SourceRegister: unix.NFT_REG_1, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: set, SetID: sets[set].ID}
		}
		mask := binaryutil.NativeEndian.PutUint32(ctStatusDNAT)
		b.rule("postrouting", append(isFamily(proto),
			&expr.Ct{Key: expr.CtKeySTATUS, Register: unix.NFT_REG_1},
			&expr.Bitwise{SourceRegister: unix.NFT_REG_1, DestRegister: unix.NFT_REG_1, Len: 4, Mask: mask, Xor: make([]byte, 4)},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: unix.NFT_REG_1, Data: make([]byte, 4)},
			load(dst), dispatch(setHair+fam))...)
		b.rule("postrouting", append(isFamily(proto), load(src), dispatch(setMasq+fam))...)
	}
}

// isFamily goes first in rules of a table of both families.
func isFamily(proto byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: unix.NFT_REG_1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: []byte{proto}},
	}
}

// matchAddr matches the source or destination address against a prefix, in
// chains where the family is known already.
func matchAddr(source bool, p netip.Prefix) []expr.Any {
	offset, size := uint32(ipv4Dst), 4
	switch {
	case p.Addr().Is4() && source:
		offset = ipv4Src
	case p.Addr().Is6() && source:
		offset, size = ipv6Src, 16
	case p.Addr().Is6():
		offset, size = ipv6Dst, 16
	}
	mask := make([]byte, size)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return []expr.Any{
		&expr.Payload{DestRegister: unix.NFT_REG_1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(size)},
		&expr.Bitwise{SourceRegister: unix.NFT_REG_1, DestRegister: unix.NFT_REG_1, Len: uint32(size), Mask: mask, Xor: make([]byte, size)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: p.Masked().Addr().AsSlice()},
	}
}
