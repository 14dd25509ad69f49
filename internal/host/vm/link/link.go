// Package link connects a virtual machine to the network namespace of its pod.
// For every interface that the network provider made there it opens a tap
// device and lets the kernel redirect all packets between the two, so that the
// guest's interface takes the place of the pod's; what the guest needs to know
// (addresses, routes, MTU, hardware address, neighbours) is collected as a
// plain struct.
//
// It promises that the namespace is left as it was found when something fails,
// and that nothing but the tap's file keeps the tap alive: when QEMU is gone,
// so is the tap. It knows nothing of pods or machines.
package link

import (
	"net/netip"
	"os"
)

// Network is what a guest is told of its network. It travels as JSON.
type Network struct {
	Interfaces []Interface `json:"interfaces,omitempty"`
	// Routes are in the order in which they can be added.
	Routes     []Route     `json:"routes,omitempty"`
	Neighbours []Neighbour `json:"neighbours,omitempty"`
}

// Interface is a network interface that the guest finds by its hardware
// address.
type Interface struct {
	Name  string         `json:"name"`
	MAC   string         `json:"mac"`
	MTU   int            `json:"mtu"`
	Addrs []netip.Prefix `json:"addrs,omitempty"`
}

// Route is a route of the main table.
type Route struct {
	Interface string       `json:"interface"`
	Dst       netip.Prefix `json:"dst"` // 0.0.0.0/0 or ::/0 for a default route
	Gateway   netip.Addr   `json:"gateway,omitzero"`
	Source    netip.Addr   `json:"source,omitzero"`
	Scope     uint8        `json:"scope,omitempty"`
	Metric    int          `json:"metric,omitempty"`
	MTU       int          `json:"mtu,omitempty"`
	OnLink    bool         `json:"onlink,omitempty"`
}

// Neighbour is a permanent entry of the neighbour table.
type Neighbour struct {
	Interface string     `json:"interface"`
	Addr      netip.Addr `json:"addr"`
	MAC       string     `json:"mac"`
}

// Tap is the machine's end of an interface.
type Tap struct {
	Interface string // the pod's interface that it stands for
	MAC       string // the guest's
	File      *os.File
}

// Attached is a namespace that a machine can be connected to.
type Attached struct {
	Network Network
	Taps    []Tap
}

// Close closes the taps' files; QEMU has its own.
func (a *Attached) Close() {
	for _, t := range a.Taps {
		t.File.Close()
	}
}
