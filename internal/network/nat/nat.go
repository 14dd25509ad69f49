// Package nat keeps the packet filter rules of pods: masquerading of what
// leaves for other networks, ports of the node that lead to a pod, and passage
// through a filter that would drop forwarded packets.
//
// All rules are in one nftables table of their own, made once; a pod adds only
// elements to sets and maps, in one netlink transaction, and no process is
// started. Each element carries the id of its owner, so that what a pod has is
// removed without a record, and nothing of another pod with it. When somebody
// empties the rule set of the node, the next change puts everything back.
//
// Where the kernel has no nf_tables, the same is done with iptables rules,
// slower.
//
// It knows addresses and ports, and nothing of CNI, pods or interfaces.
package nat

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Grant is what one owner has.
type Grant struct {
	// Masquerade lists addresses of the owner with the subnet each lives in;
	// what they send beyond the subnet gets the node's address.
	Masquerade []netip.Prefix
	Ports      []Port
}

// Port leads a port of the node to an address.
type Port struct {
	Protocol uint8      // IPPROTO_TCP, _UDP or _SCTP
	HostIP   netip.Addr // invalid: every address of the node
	HostPort uint16
	// Target is the address with its subnet: the subnet's other members need
	// masquerading, as answers to them would not pass the node.
	Target netip.Prefix
	Port   uint16
	// NoSNAT leaves out masquerading for the node itself and the subnet.
	NoSNAT bool
	// MasqueradeAll masquerades every client.
	MasqueradeAll bool
}

// Rules are the rules of one table. Safe for concurrent use.
type Rules interface {
	// Add gives the owner something. A port that another owner has is
	// errdefs.ErrAlreadyExists unless takeOver.
	Add(ctx context.Context, owner string, g Grant, takeOver bool) error
	// Remove takes everything that the owner has; nothing is success.
	Remove(ctx context.Context, owner string) error
	// Check is nil when the owner has all of it.
	Check(ctx context.Context, owner string, g Grant) error
	// Owners lists who has something.
	Owners(ctx context.Context) ([]string, error)
	// Count is the number of elements, or rules, that owners have.
	Count(ctx context.Context) (int, error)
	// Close leaves what owners have in force, and nothing if they have nothing.
	Close() error
}

// Open prepares the rules under the name of a table; nothing is written yet.
func Open(table string, log *slog.Logger) (Rules, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	w, err := dial()
	if err == nil {
		if _, err = w.generation(); err == nil {
			return openTable(table, w, log)
		}
		w.close()
	}
	if errors.Is(err, unix.EPERM) {
		return nil, fmt.Errorf("nftables: %w", errors.Join(err, errdefs.ErrPermissionDenied))
	}
	log.Info("kernel has no nf_tables, using iptables", "err", err)
	return openIPTables(table, log)
}

// Protocol numbers a name as CRI and CNI spell it.
func Protocol(name string) (uint8, error) {
	switch name {
	case "tcp", "":
		return unix.IPPROTO_TCP, nil
	case "udp":
		return unix.IPPROTO_UDP, nil
	case "sctp":
		return unix.IPPROTO_SCTP, nil
	}
	return 0, fmt.Errorf("port protocol %q is not tcp, udp or sctp: %w", name, errdefs.ErrInvalidArgument)
}

func protocolName(p uint8) string {
	switch p {
	case unix.IPPROTO_UDP:
		return "udp"
	case unix.IPPROTO_SCTP:
		return "sctp"
	}
	return "tcp"
}

// applies tells whether a host address selects this target at all: one of the
// other family does not.
func (p Port) applies() bool {
	return !p.HostIP.IsValid() || p.HostIP.Is4() == p.Target.Addr().Is4()
}

func (p Port) String() string {
	if p.HostIP.IsValid() && !p.HostIP.IsUnspecified() {
		return fmt.Sprintf("%s/%s", netip.AddrPortFrom(p.HostIP, p.HostPort), protocolName(p.Protocol))
	}
	return fmt.Sprintf("%d/%s", p.HostPort, protocolName(p.Protocol))
}
