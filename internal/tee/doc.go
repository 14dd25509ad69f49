// Package tee tells what trusted execution technology the machine has, how
// much of it, and whether it is well. Its Inventory is the one place that
// knows: the device plugin, "cloister check" and the runtime handlers that need
// a technology all read it.
//
// # Model
//
// A Backend knows one technology. It finds Resources, such as
// "sgx.intel.com/enclave" or "huawei.com/tee-ram". A resource is made of Parts:
// what fails and recovers as one, such as a device node, or a NUMA node's share
// of a memory. A part has Units; a unit is what a container asks for, an open of
// a device or so many KiB of memory, and has an id that stays the same as long
// as its part has that many units.
//
// # Life of a part
//
// A part is healthy from the scan that finds it well. One bad check makes it
// unhealthy at once; it takes Options.Recover good checks in a row to make it
// healthy again. A part that a scan does not find any more stays known, and
// unhealthy, because containers may still hold units of it.
//
// The package knows nothing of kubelet, sockets and configuration files.
//
// Lock order: Inventory.mu is the only lock, and no backend is called with it.
package tee
