// Package pod makes, keeps and ends pods and containers: their life cycle,
// their durable store, recovery after a crash, events and statistics.
//
// It promises that
//   - every durable step is written as intent before the act and as outcome
//     after it, so that what a crash left half made is finished or taken down
//     at the next start;
//   - a creation outlives the caller that gave up on it, and a repeat of the
//     same request gets the result of the first attempt;
//   - stopping and removing may be repeated at any time and finish what is
//     left to do;
//   - nothing here is in the data path of a running container.
//
// It knows isolation only through the shim protocol (package shim), and it
// knows no gRPC server, no TOML and no registry.
//
// Lock order, outer to inner: the op of a sandbox, then of one of its
// containers (one life-cycle operation at a time; held across I/O on purpose,
// it excludes only operations on the same id); their mu (one change of the
// record at a time; held while the store is written). All other locks are
// leaves and never held across I/O.
package pod
