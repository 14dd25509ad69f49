package link

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"net"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Rates limit the traffic of a pod as the pod sees it; bits per second, 0: no
// limit. A burst of 0 is the largest there is.
type Rates struct {
	Ingress, IngressBurst, Egress, EgressBurst uint64
}

// queueTime is how long a packet may wait for its turn; what would wait longer
// is dropped.
const queueTime = 25_000 // µs

// IFBName is the name of the interface through which traffic from the pod is
// led to be limited.
func IFBName(owner, ifName string) string {
	sum := sha256.Sum256([]byte(owner + "\x00" + ifName))
	return "ifb" + hex.EncodeToString(sum[:])[:12]
}

// Limit puts token buckets on the node's end of a pair: on its queue for what
// goes to the pod, and on that of an intermediate interface for what comes
// from it. On error the intermediate interface is removed; the queues go with
// the pair.
func (n *Node) Limit(host, ifb string, r Rates) (err error) {
	if r.Ingress == 0 && r.Egress == 0 {
		return nil
	}
	l, err := n.h.LinkByName(host)
	if err != nil {
		return fmt.Errorf("limit bandwidth of %s: %w", host, err)
	}
	if r.Ingress > 0 {
		if err := n.bucket(l.Attrs().Index, r.Ingress, r.IngressBurst); err != nil {
			return fmt.Errorf("limit bandwidth to the pod on %s: %w", host, err)
		}
	}
	if r.Egress == 0 {
		return nil
	}
	defer func() {
		if err != nil {
			_, gone := n.Remove(ifb)
			err = errors.Join(fmt.Errorf("limit bandwidth from the pod on %s: %w", host, err), gone)
		}
	}()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.Flags = ifb, l.Attrs().MTU, net.FlagUp
	if err := n.h.LinkAdd(&netlink.Ifb{LinkAttrs: attrs}); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add %s: %w", ifb, err)
	}
	via, err := n.h.LinkByName(ifb)
	if err != nil {
		return fmt.Errorf("look up %s: %w", ifb, err)
	}
	if err := n.redirect(l.Attrs().Index, via.Attrs().Index); err != nil {
		return err
	}
	return n.bucket(via.Attrs().Index, r.Egress, r.EgressBurst)
}

// redirect leads all that comes in on one interface to the queue of another.
func (n *Node) redirect(from, to int) error {
	ingress := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: from,
		Handle:    netlink.MakeHandle(0xffff, 0),
		Parent:    netlink.HANDLE_INGRESS,
	}}
	if err := n.h.QdiscAdd(ingress); err != nil {
		return fmt.Errorf("add ingress queue: %w", err)
	}
	err := n.h.FilterAdd(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: from,
			Parent:    ingress.Handle,
			Priority:  1,
			Protocol:  unix.ETH_P_ALL,
		},
		ClassId: netlink.MakeHandle(1, 1),
		Actions: []netlink.Action{&netlink.MirredAction{
			ActionAttrs:  netlink.ActionAttrs{Action: netlink.TC_ACT_STOLEN},
			MirredAction: netlink.TCA_EGRESS_REDIR,
			Ifindex:      to,
		}},
	})
	if err != nil {
		return fmt.Errorf("add redirecting filter: %w", err)
	}
	return nil
}

func (n *Node) bucket(index int, rate, burst uint64) error {
	tbf, err := Bucket(rate, burst)
	if err != nil {
		return err
	}
	tbf.LinkIndex = index
	if err := n.h.QdiscReplace(tbf); err != nil {
		return fmt.Errorf("add token bucket: %w", err)
	}
	return nil
}

// Bucket translates bits per second into the kernel's terms.
func Bucket(rate, burst uint64) (*netlink.Tbf, error) {
	if burst == 0 || burst > math.MaxUint32 {
		burst = math.MaxUint32
	}
	rate, burst = rate/8, burst/8
	if rate == 0 || burst == 0 {
		return nil, fmt.Errorf("less than one byte per second: %w", errdefs.ErrInvalidArgument)
	}
	micros := min(float64(burst)*netlink.TIME_UNITS_PER_SEC/float64(rate), math.MaxUint32)
	return &netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       rate,
		Limit:      uint32(min(float64(rate)*queueTime/netlink.TIME_UNITS_PER_SEC+float64(burst), math.MaxUint32)),
		Buffer:     uint32(min(float64(uint32(micros))*netlink.TickInUsec(), math.MaxUint32)),
	}, nil
}
