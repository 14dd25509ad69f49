// Package plugin offers the resources of an inventory to kubelet, by its device
// plugin API v1beta1. It promises to keep at it: a kubelet that restarts, a
// stream that breaks, a socket that is deleted or a resource that comes late
// need no restart of the plugin, and what is wrong with one resource does not
// touch the others.
//
// Each resource has a socket of its own beside kubelet's and a goroutine that
// owns it (endpoint). An endpoint serves first and registers then, because
// kubelet calls back before it answers. What is sent on a stream is encoded
// once for all streams, as the list of 220,000 units is four megabytes long; it
// may not be longer, kubelet takes no more (see encode.go).
//
// The package knows nothing of configuration, nor of what a unit is good for.
package plugin
