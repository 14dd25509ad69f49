// Package shim is the daemon's side of containerd's shim protocol: it finds,
// starts and reconnects to the programs that run sandboxes, and gives package
// pod one face for all of them.
//
// Two kinds stand behind a Handler. A resident shim (cloister-shim) is one
// process per backend that serves every pod; it is started when nobody answers
// on its socket and outlives the daemon. An external shim
// (containerd-shim-NAME-VERSION) is started by its own `start` command, one
// per pod; its containers' streams are kept by the resident shim's pump, so
// that the daemon is in no data path there either.
//
// The package promises that a call on a connection that broke is tried again
// on a new one when repeating it cannot do harm, and otherwise fails with
// errdefs.ErrUnavailable. It knows nothing of CRI, images or Kubernetes.
package shim
