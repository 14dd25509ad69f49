package link

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"cloister.dev/internal/osutil"
)

const (
	// tapPrefix and the index of the pod's interface are a tap's name.
	tapPrefix = "cltap"
	// filterPriority tells our filters from those of others.
	filterPriority = 0xc107
	// socketTime bounds a question to the kernel.
	socketTime = 10 * time.Second
)

// Attach makes a tap for every interface of the namespace pinned at path that
// is up, the loopback one aside. A second Attach, after a machine has gone,
// works too.
func Attach(path string) (a *Attached, err error) {
	a = &Attached{}
	err = inside(path, func(h *netlink.Handle) error {
		links, err := interfaces(h)
		if err != nil {
			return err
		}
		if a.Network, err = collect(h, links); err != nil {
			return err
		}
		for _, l := range links {
			tap, err := connect(h, l)
			if err != nil {
				return fmt.Errorf("connect interface %s to the machine: %w", l.Attrs().Name, err)
			}
			a.Taps = append(a.Taps, Tap{Interface: l.Attrs().Name, MAC: l.Attrs().HardwareAddr.String(), File: tap})
		}
		return nil
	})
	if err != nil {
		a.Close() // and with the files the taps
		return nil, errors.Join(err, Detach(path))
	}
	return a, nil
}

// Detach gives the namespace's interfaces back to it. A namespace that is gone,
// or has never been attached, is success.
func Detach(path string) error {
	err := inside(path, func(h *netlink.Handle) error {
		links, err := interfaces(h)
		if err != nil {
			return err
		}
		for _, l := range links {
			err = errors.Join(err, removeFilters(h, l))
		}
		return err
	})
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// inside runs f in the namespace, on a thread that ends with it.
func inside(path string, f func(*netlink.Handle) error) error {
	ns, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open the pod's network namespace: %w", err)
	}
	defer ns.Close()
	return osutil.OnThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			if errors.Is(err, unix.EINVAL) {
				err = fmt.Errorf("nothing is mounted there any more: %w", os.ErrNotExist)
			}
			return fmt.Errorf("enter the pod's network namespace %s: %w", path, err)
		}
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open rtnetlink: %w", err)
		}
		defer h.Close()
		if err := h.SetSocketTimeout(socketTime); err != nil {
			return err
		}
		return f(h)
	})
}

// connect makes the tap of an interface, and has the kernel hand every packet
// that comes in at one of the two out at the other.
func connect(h *netlink.Handle, l netlink.Link) (_ *os.File, err error) {
	name := tapPrefix + strconv.Itoa(l.Attrs().Index)
	f, err := openTap(name)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	// What nobody addresses needs no address of its own.
	off := "/proc/sys/net/ipv6/conf/" + name + "/disable_ipv6"
	if err := os.WriteFile(off, []byte("1"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	tap, err := h.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("look up the tap: %w", err)
	}
	if err := h.LinkSetMTU(tap, l.Attrs().MTU); err != nil {
		return nil, fmt.Errorf("set the tap's MTU: %w", err)
	}
	if err := h.LinkSetUp(tap); err != nil {
		return nil, fmt.Errorf("bring the tap up: %w", err)
	}
	for _, pair := range [][2]netlink.Link{{l, tap}, {tap, l}} {
		if err := redirect(h, pair[0], pair[1]); err != nil {
			return nil, fmt.Errorf("redirect packets from %s to %s (the kernel needs sch_ingress, cls_u32 and act_mirred): %w",
				pair[0].Attrs().Name, pair[1].Attrs().Name, err)
		}
	}
	return f, nil
}

// openTap makes a tap device that lives as long as its file. Packets carry the
// header by which a guest leaves checksums and segments to the host.
func openTap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: "/dev/net/tun", Err: err}
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("make tap %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

func redirect(h *netlink.Handle, from, to netlink.Link) error {
	index := from.Attrs().Index
	q := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}}
	if err := h.QdiscAdd(q); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	if err := removeFilters(h, from); err != nil {
		return err
	}
	return h.FilterAdd(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: netlink.MakeHandle(0xffff, 0), Priority: filterPriority, Protocol: unix.ETH_P_ALL},
		Actions:     []netlink.Action{netlink.NewMirredAction(to.Attrs().Index)},
	})
}

// removeFilters takes ours away: those of a machine that has gone.
func removeFilters(h *netlink.Handle, l netlink.Link) error {
	filters, err := h.FilterList(l, netlink.MakeHandle(0xffff, 0))
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) { // no ingress queue
		return nil
	}
	if err != nil {
		return fmt.Errorf("list the filters of %s: %w", l.Attrs().Name, err)
	}
	for _, f := range filters {
		if f.Attrs().Priority != filterPriority {
			continue
		}
		if err := h.FilterDel(f); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("delete a filter of %s: %w", l.Attrs().Name, err)
		}
	}
	return nil
}

// interfaces lists what a machine takes over: all that are up and speak
// Ethernet, but for taps.
func interfaces(h *netlink.Handle) ([]netlink.Link, error) {
	all, err := h.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list the pod's interfaces: %w", err)
	}
	var links []netlink.Link
	for _, l := range all {
		a := l.Attrs()
		if a.RawFlags&unix.IFF_UP != 0 && a.EncapType == "ether" && !strings.HasPrefix(a.Name, tapPrefix) {
			links = append(links, l)
		}
	}
	return links, nil
}
