package nat

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// Set elements change with every pod; they are sent without a library in
// between, because only so one datagram can carry the whole change together
// with the generation of the rule set that it relies on.

const (
	// nfnlBatchGenID makes the kernel refuse a batch when somebody changed the
	// rule set since that generation.
	nfnlBatchGenID = 1
	exchangeTime   = 10 * time.Second
	replySize      = 1 << 16
)

// errStale says that somebody else changed the rule set.
var errStale = errors.New("rule set changed meanwhile")

// element is one entry of a set or map, and who put it there.
type element struct {
	set   string
	key   string // raw bytes; a string so that elements compare
	val   string // raw bytes of a map's value
	jump  string // chain that a verdict map jumps to
	end   bool   // of an interval
	owner string
}

func (e element) id() string { return e.set + "\x00" + e.key }

// wire is one netfilter netlink socket.
type wire struct {
	mu  sync.Mutex
	fd  int
	seq uint32
	buf []byte
}

func dial() (*wire, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open netfilter netlink: %w", err)
	}
	tv := unix.NsecToTimeval(exchangeTime.Nanoseconds())
	err = errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv),
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}))
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("set up netfilter netlink: %w", err)
	}
	return &wire{fd: fd, buf: make([]byte, replySize)}, nil
}

func (w *wire) close() { unix.Close(w.fd) }

// message appends one netlink message and gives it a sequence number.
func (w *wire) message(b []byte, typ, flags uint16, family byte, res uint16, attrs []byte) []byte {
	w.seq++
	b = binary.NativeEndian.AppendUint32(b, uint32(unix.NLMSG_HDRLEN+4+len(attrs)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, flags|unix.NLM_F_REQUEST)
	b = binary.NativeEndian.AppendUint32(b, w.seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	b = append(b, family, unix.NFNETLINK_V0)
	b = binary.BigEndian.AppendUint16(b, res)
	return append(b, attrs...)
}

func attr(b []byte, typ uint16, data []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(data)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, data...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func nested(b []byte, typ uint16, data []byte) []byte {
	return attr(b, typ|unix.NLA_F_NESTED, data)
}

func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }

func nftType(msg uint16) uint16 { return unix.NFNL_SUBSYS_NFTABLES<<8 | msg }

// elementList is the payload of messages about elements of one set.
func elementList(table, set string, elems []element) []byte {
	var list []byte
	for _, e := range elems {
		var item []byte
		if e.end {
			item = attr(item, unix.NFTA_SET_ELEM_FLAGS, be32(unix.NFT_SET_ELEM_INTERVAL_END))
		}
		item = nested(item, unix.NFTA_SET_ELEM_KEY, attr(nil, unix.NFTA_DATA_VALUE, []byte(e.key)))
		switch {
		case e.jump != "":
			verdict := attr(nil, unix.NFTA_VERDICT_CODE, be32(nftJump))
			verdict = attr(verdict, unix.NFTA_VERDICT_CHAIN, []byte(e.jump+"\x00"))
			item = nested(item, unix.NFTA_SET_ELEM_DATA, nested(nil, unix.NFTA_DATA_VERDICT, verdict))
		case e.val != "":
			item = nested(item, unix.NFTA_SET_ELEM_DATA, attr(nil, unix.NFTA_DATA_VALUE, []byte(e.val)))
		}
		if e.owner != "" {
			item = attr(item, unix.NFTA_SET_ELEM_USERDATA, userdata.AppendString(nil, userdata.NFTNL_UDATA_SET_ELEM_COMMENT, e.owner))
		}
		list = nested(list, unix.NFTA_LIST_ELEM, item)
	}
	b := attr(nil, unix.NFTA_SET_ELEM_LIST_TABLE, []byte(table+"\x00"))
	b = attr(b, unix.NFTA_SET_ELEM_LIST_SET, []byte(set+"\x00"))
	return nested(b, unix.NFTA_SET_ELEM_LIST_ELEMENTS, list)
}

// nftJump is NFT_JUMP, -3, as it travels.
const nftJump = 0xfffffffd

// generation asks for the number that grows with every change of any rule set
// of the namespace.
func (w *wire) generation() (uint32, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	msg := w.message(nil, nftType(unix.NFT_MSG_GETGEN), 0, unix.AF_UNSPEC, 0, nil)
	seq := w.seq
	if err := w.send(msg); err != nil {
		return 0, err
	}
	var gen uint32
	err := w.receive(seq, seq, func(typ uint16, payload []byte) bool {
		eachAttr(payload[4:], func(t uint16, data []byte) {
			if t == unix.NFTA_GEN_ID && len(data) == 4 {
				gen = binary.BigEndian.Uint32(data)
			}
		})
		return typ == nftType(unix.NFT_MSG_NEWGEN)
	})
	if err != nil {
		return 0, fmt.Errorf("read nftables generation: %w", err)
	}
	return gen, nil
}

// commit deletes and adds elements of the table in one transaction, if the
// rule set still is of generation gen; errStale if not.
func (w *wire) commit(table string, gen uint32, del, add []element) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	genID := attr(nil, nfnlBatchGenID, be32(gen))
	b := w.message(nil, unix.NFNL_MSG_BATCH_BEGIN, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, genID)
	first := w.seq
	put := func(msg, flags uint16, elems []element) {
		for _, group := range bySet(elems) {
			b = w.message(b, nftType(msg), flags|unix.NLM_F_ACK, unix.NFPROTO_INET, 0, elementList(table, group[0].set, group))
		}
	}
	put(unix.NFT_MSG_DELSETELEM, 0, del)
	put(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE|unix.NLM_F_EXCL, add)
	last := w.seq
	b = w.message(b, unix.NFNL_MSG_BATCH_END, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, nil)
	if err := w.send(b); err != nil {
		return err
	}
	err := w.receive(first, last, nil)
	if errors.Is(err, unix.ERESTART) {
		return errStale
	}
	return err
}

// bySet groups neighbours of one set.
func bySet(elems []element) [][]element {
	var out [][]element
	for i, e := range elems {
		if i > 0 && elems[i-1].set == e.set {
			out[len(out)-1] = append(out[len(out)-1], e)
			continue
		}
		out = append(out, []element{e})
	}
	return out
}

func (w *wire) send(b []byte) error {
	if err := unix.Sendto(w.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("send to netfilter: %w", err)
	}
	return nil
}

// receive reads answers to the messages first…last. It ends with the
// acknowledgement of last, with a refusal of first as a whole, at the end of a
// dump, or when each says so. The first error wins.
func (w *wire) receive(first, last uint32, each func(typ uint16, payload []byte) bool) error {
	var failed error
	for {
		n, _, err := unix.Recvfrom(w.fd, w.buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("receive from netfilter: %w", err)
		}
		for b := w.buf[:n]; len(b) >= unix.NLMSG_HDRLEN; {
			size := binary.NativeEndian.Uint32(b)
			if size < unix.NLMSG_HDRLEN || int(size) > len(b) {
				return errors.New("receive from netfilter: cut-off message")
			}
			typ, seq := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint32(b[8:])
			payload := b[unix.NLMSG_HDRLEN:size]
			b = b[min((size+3)&^3, uint32(len(b))):]
			if seq-first > last-first {
				continue // of an exchange that timed out
			}
			switch {
			case typ == unix.NLMSG_ERROR && len(payload) >= 4:
				if code := int32(binary.NativeEndian.Uint32(payload)); code != 0 && failed == nil {
					failed = unix.Errno(-code)
					if seq == first && first != last {
						return failed // the batch was not even looked at
					}
				}
				if seq == last {
					return failed
				}
			case typ == unix.NLMSG_DONE:
				return failed
			case len(payload) >= 4 && each != nil && each(typ, payload):
				return failed
			}
		}
	}
}

// eachAttr walks netlink attributes; it stops at the first malformed one.
func eachAttr(b []byte, f func(typ uint16, data []byte)) {
	for len(b) >= 4 {
		size := int(binary.NativeEndian.Uint16(b))
		if size < 4 || size > len(b) {
			return
		}
		f(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[4:size])
		b = b[min((size+3)&^3, len(b)):]
	}
}

// dump reads all elements of a set.
func (w *wire) dump(table, set string) ([]element, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	b := attr(nil, unix.NFTA_SET_ELEM_LIST_TABLE, []byte(table+"\x00"))
	b = attr(b, unix.NFTA_SET_ELEM_LIST_SET, []byte(set+"\x00"))
	msg := w.message(nil, nftType(unix.NFT_MSG_GETSETELEM), unix.NLM_F_DUMP, unix.NFPROTO_INET, 0, b)
	seq := w.seq
	if err := w.send(msg); err != nil {
		return nil, err
	}
	var out []element
	err := w.receive(seq, seq, func(typ uint16, payload []byte) bool {
		eachAttr(payload[4:], func(t uint16, data []byte) {
			if t != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				return
			}
			eachAttr(data, func(_ uint16, item []byte) { out = append(out, parseElement(set, item)) })
		})
		return false
	})
	if err != nil {
		return nil, fmt.Errorf("list elements of nftables set %s %s: %w", table, set, err)
	}
	return out, nil
}

func parseElement(set string, item []byte) element {
	e := element{set: set}
	eachAttr(item, func(t uint16, data []byte) {
		switch t {
		case unix.NFTA_SET_ELEM_FLAGS:
			e.end = len(data) == 4 && binary.BigEndian.Uint32(data)&unix.NFT_SET_ELEM_INTERVAL_END != 0
		case unix.NFTA_SET_ELEM_KEY:
			eachAttr(data, func(_ uint16, v []byte) { e.key = string(v) })
		case unix.NFTA_SET_ELEM_DATA:
			eachAttr(data, func(t uint16, v []byte) {
				if t == unix.NFTA_DATA_VALUE {
					e.val = string(v)
					return
				}
				eachAttr(v, func(t uint16, v []byte) {
					if t == unix.NFTA_VERDICT_CHAIN && len(v) > 0 {
						e.jump = string(v[:len(v)-1])
					}
				})
			})
		case unix.NFTA_SET_ELEM_USERDATA:
			e.owner, _ = commentIn(data, userdata.NFTNL_UDATA_SET_ELEM_COMMENT)
		}
	})
	return e
}

// commentIn finds a string in user data, which is a list of type, length and
// value. Other software puts there what it likes, so nothing is taken for
// granted.
func commentIn(b []byte, typ userdata.Type) (string, bool) {
	for len(b) >= 2 {
		end := 2 + int(b[1])
		if end > len(b) {
			return "", false
		}
		if userdata.Type(b[0]) == typ {
			return strings.TrimSuffix(string(b[2:end]), "\x00"), true
		}
		b = b[end:]
	}
	return "", false
}

// countRules tells how many rules each chain of the table has. A missing table
// has none.
func (w *wire) countRules(table string) (map[string]int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	b := attr(nil, unix.NFTA_RULE_TABLE, []byte(table+"\x00"))
	msg := w.message(nil, nftType(unix.NFT_MSG_GETRULE), unix.NLM_F_DUMP, unix.NFPROTO_INET, 0, b)
	seq := w.seq
	if err := w.send(msg); err != nil {
		return nil, err
	}
	count := map[string]int{}
	err := w.receive(seq, seq, func(_ uint16, payload []byte) bool {
		var in, chain string
		eachAttr(payload[4:], func(t uint16, data []byte) {
			switch {
			case t == unix.NFTA_RULE_TABLE && len(data) > 0:
				in = string(data[:len(data)-1])
			case t == unix.NFTA_RULE_CHAIN && len(data) > 0:
				chain = string(data[:len(data)-1])
			}
		})
		if in == table {
			count[chain]++
		}
		return false
	})
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("list rules of nftables table %s: %w", table, err)
	}
	return count, nil
}
