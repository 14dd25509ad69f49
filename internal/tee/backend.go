package tee

import "context"

// Backend knows one technology. Its methods are called one after the other,
// Allocate excepted, which comes from several goroutines at once. All of them
// have to end when their context does.
//
// A machine without the technology is no error: Scan finds nothing then. An
// error means that it should be there and cannot be used, and says why.
type Backend interface {
	// Name is how configuration and status call the backend, such as "sgx".
	Name() string
	// Scan finds what the machine has now.
	Scan(ctx context.Context) ([]Resource, error)
}

// Checker is a Backend that knows more of the health of what it found than
// that it was found.
type Checker interface {
	// Health names what is unwell; nothing means that all is well.
	Health(ctx context.Context, found []Resource) []Ailment
}

// Ailment says why a part is unwell.
type Ailment struct {
	Resource string
	Part     string // its key; AllParts means every part
	Reason   string
}

// AllParts stands for every part of a resource in an Ailment.
const AllParts = "*"

// Allocator is a Backend that has a say when units are handed out: it may
// refuse, or give more than the parts' grants, which grant holds already.
type Allocator interface {
	Allocate(ctx context.Context, r Resource, ids []string, grant *Grant) error
}

// Watcher is a Backend that can name the files whose coming and going is worth
// a check at once.
type Watcher interface {
	WatchPaths() []string
}
