// Package share lets one virtual machine see some files of the host through
// virtio-fs, and nothing else of it. It promises that what was shared read-only
// cannot be written by the guest whatever that does, that no device file works
// through a share, and that Stop leaves no process and no mount.
//
// A FS is one folder that virtiofsd serves. Files of the host appear in it as
// bind mounts, which may come and go while the machine runs:
//
//	DIR/fs                     a mount of its own, shared with virtiofsd's namespace
//	DIR/fs/CONTAINER/rootfs    whatever Add put there
//	DIR/virtiofsd.sock         where the machine connects
//
// It knows nothing of pods or containers; names are opaque to it.
package share

import (
	"context"

	"cloister.dev/internal/host/proc"
)

// Tag is what the guest mounts the file system by.
const Tag = "cloister"

// Config describes what serves a machine's files.
type Config struct {
	Program string // path of virtiofsd
	Dir     string // private folder that exists, short enough for a socket in it
	// Cgroups are folders of cgroups, as in machine.Config.
	Cgroups []string
	Cache   string // "auto" (one second), "always" or "never"; empty: auto
	// ExtraArgs are added to virtiofsd's command line.
	ExtraArgs []string
}

// State finds a FS again. It is stored as JSON.
type State struct {
	Dir   string `json:"dir"`
	Pid   int    `json:"pid"`
	Start uint64 `json:"start"`
}

// Options of one shared thing.
type Options struct {
	ReadOnly bool
	// Recursive shares mounts beneath the source too.
	Recursive bool
}

// FS is a folder that a machine sees. Its methods may be called concurrently.
type FS struct {
	state State
	done  chan struct{}
	exit  proc.Exit
}

// Start makes the folder and runs virtiofsd on it; it returns when the socket
// takes connections. On error nothing is left.
func Start(ctx context.Context, reaper *proc.Reaper, c Config) (*FS, error) {
	return start(ctx, reaper, c)
}

// Attach takes up a FS that an earlier life of this program started.
func Attach(reaper *proc.Reaper, s State) *FS { return attach(reaper, s) }

// State is what has to be on disk for Attach.
func (f *FS) State() State { return f.state }

// Socket is where the machine connects.
func (f *FS) Socket() string { return socketIn(f.state.Dir) }

// Done is closed when virtiofsd has ended; the guest's file systems hang then.
func (f *FS) Done() <-chan struct{} { return f.done }

// Add shares source, a folder or a file, under name, a relative path. The
// guest sees it at that path in the share. A name that is there already is
// errdefs.ErrAlreadyExists.
func (f *FS) Add(name, source string, o Options) error { return f.add(name, source, o) }

// Remove takes a name, and all names beneath it, out of the share. An absent
// name is success.
func (f *FS) Remove(name string) error { return f.remove(name) }

// Stop ends virtiofsd and unmounts everything. It may be repeated.
func (f *FS) Stop(ctx context.Context) error { return f.stop(ctx) }
