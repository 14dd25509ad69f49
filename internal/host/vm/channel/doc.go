// Package channel is how a virtual machine and its host talk. Both ends use
// it: the shim through a Machine, the agent through device files.
//
// # Ports, not a multiplexer
//
// Every stream is a virtio-serial port of its own, plugged in when it is
// wanted and found by its name. The host's end of a port is a file that QEMU
// itself holds: for a container's output the very pipe that its log is read
// from. So
//
//   - output passes no program of ours on the host: when the shim is killed,
//     nothing is lost and nothing comes twice, because nothing was on its way;
//   - each stream has the device's own flow control, and a stream that nobody
//     reads holds up neither another one nor a call;
//   - a connection for calls (ttrpc) is a new port each time, so that no rest of
//     an earlier one can be taken for the beginning of an answer.
//
// A port carries bytes both ways but cannot be closed for one direction alone.
// Duplex adds that where it is needed (forwarded network connections).
package channel

// ControlPrefix begins the names of ports that carry calls.
const ControlPrefix = "control."

// MaxPorts is how many ports a machine has: three for a container, three for
// a running exec, one for a forwarded connection.
const MaxPorts = 64
