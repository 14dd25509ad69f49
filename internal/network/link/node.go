// Package link makes and removes the interfaces that join a pod's network
// namespace to the node: bridges, veth pairs, their addresses and routes, and
// the few sysctls that go with them.
//
// It promises that every call is one or a few rtnetlink messages, that no
// process is started, that no thread is left in a foreign namespace, and that
// the node's end of a pair has a name derived from its owner, so that it can be
// found again without the namespace and without a record.
//
// It knows nothing of CNI, of address allocation or of packet filters.
package link

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// socketTime bounds one rtnetlink exchange.
const socketTime = 20 * time.Second

// Node is the node's own network namespace, the one that this process lives
// in. It is safe for concurrent use.
type Node struct {
	h      *netlink.Handle
	log    *slog.Logger
	reaper *reaper
	self   identity // of the namespace
}

// Open prepares to change the node's interfaces. Pairs whose deletion a former
// process had begun are deleted in the background.
func Open(log *slog.Logger) (*Node, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open rtnetlink: %w", err)
	}
	if err := h.SetSocketTimeout(socketTime); err != nil {
		h.Close()
		return nil, fmt.Errorf("set rtnetlink time-out: %w", err)
	}
	own, err := OpenNetNS("/proc/thread-self/ns/net")
	if err != nil {
		h.Close()
		return nil, err
	}
	defer own.Close()
	n := &Node{h: h, log: log, reaper: newReaper(log)}
	if n.self, err = own.identity(); err != nil {
		h.Close()
		return nil, err
	}
	if err := n.sweep(); err != nil {
		log.Warn("deletion of left-over interfaces", "err", err)
	}
	return n, nil
}

// Close waits for deletions that are under way.
func (n *Node) Close() error {
	n.reaper.close()
	n.h.Close()
	return nil
}

// Own tells whether a namespace is the node's: nothing that is meant for a pod
// may be done there.
func (n *Node) Own(ns *NetNS) bool {
	id, err := ns.identity()
	return err == nil && id == n.self
}

// Settle waits until the interfaces that Remove cut off are gone.
func (n *Node) Settle(ctx context.Context) error { return n.reaper.wait(ctx) }

// Handle is for rare changes on the node's side that have no method here.
func (n *Node) Handle() *netlink.Handle { return n.h }

// HostName is the name of the node's end of the pair that owner has under the
// name ifName in its namespace.
func HostName(owner, ifName string) string {
	sum := sha256.Sum256([]byte(owner + "\x00" + ifName))
	return "veth" + hex.EncodeToString(sum[:])[:11]
}

// Exists tells whether the node has an interface of that name.
func (n *Node) Exists(name string) (bool, error) {
	_, err := n.h.LinkByName(name)
	if isNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look up interface %s: %w", name, err)
	}
	return true, nil
}

// Remove cuts the interface off at once and deletes it in the background: the
// kernel takes tens of milliseconds for the last step, in which nothing can
// pass any more. It tells whether there was such an interface.
func (n *Node) Remove(name string) (bool, error) {
	req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	req.Sockets = nil
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Change = unix.IFF_UP
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(graveyard)))
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		if errors.Is(err, unix.ENODEV) {
			return false, nil
		}
		return false, fmt.Errorf("cut off interface %s: %w", name, err)
	}
	n.reaper.add(name)
	return true, nil
}

// RemoveNow is Remove that returns when the interface is gone.
func (n *Node) RemoveNow(name string) error { return deleteLink(name) }

func deleteLink(name string) error {
	req := nl.NewNetlinkRequest(unix.RTM_DELLINK, unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete interface %s: %w", name, err)
	}
	return nil
}

// Forward makes the node route packets of the families.
func (n *Node) Forward(v4, v6 bool) error {
	if v4 {
		if err := ensureSysctl("/proc/sys/net/ipv4/ip_forward", "1"); err != nil {
			return fmt.Errorf("enable IPv4 forwarding: %w", err)
		}
	}
	if v6 {
		if err := ensureSysctl("/proc/sys/net/ipv6/conf/all/forwarding", "1"); err != nil {
			return fmt.Errorf("enable IPv6 forwarding: %w", err)
		}
	}
	return nil
}

// RouteLocalnet lets packets of 127.0.0.0/8 be routed over the interface, which
// published ports need to be reachable at the node's 127.0.0.1.
func (n *Node) RouteLocalnet(name string) error {
	if err := ensureSysctl("/proc/sys/net/ipv4/conf/"+name+"/route_localnet", "1"); err != nil {
		return fmt.Errorf("enable route_localnet on %s: %w", name, err)
	}
	return nil
}

// ensureSysctl writes only a value that differs: some of these files have side
// effects on every write, and all are read-only in some test environments.
func ensureSysctl(path, value string) error {
	have, err := os.ReadFile(path)
	if err == nil && len(have) >= len(value) && string(have[:len(value)]) == value {
		return nil
	}
	return os.WriteFile(path, []byte(value), 0o644)
}

func isNotFound(err error) bool {
	var nf netlink.LinkNotFoundError
	return errors.As(err, &nf) || errors.Is(err, unix.ENODEV) || errors.Is(err, fs.ErrNotExist)
}
