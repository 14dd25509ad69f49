// Package share lets one virtual machine see some files of the host through
// virtio-fs, and nothing else of it. It promises that what was shared read-only
// cannot be written by the guest whatever that does, that no device file works
// through a share, and that Stop leaves no process and no mount.
//
// A FS is one folder that virtiofsd serves from inside a mount namespace of its
// own. Files of the host are mounted there and nowhere else: the host's mount
// table does not grow, and what is left of a FS dies with virtiofsd, which ends
// when the machine does.
//
//	DIR/fs                 the folder, with empty mount points as others see it
//	DIR/virtiofsd.sock     where the machine connects
//	DIR/virtiofsd.log      what virtiofsd complains about
//
// Mounts are attached as what they shall be, read-only for one, so there is no
// moment in which they are something else.
//
// It knows nothing of pods or containers; names are opaque to it.
package share

import (
	"path/filepath"

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
	// Overlays has the guest put overlay file systems on folders of the share: it
	// is told that trusted attributes do not exist, rather than that they are
	// forbidden, which an overlay copies a file without.
	Overlays bool
	// ExtraArgs are added to virtiofsd's command line.
	ExtraArgs []string
}

// State finds a FS again. It is stored as JSON. Whoever was killed before he
// could store it attaches by Dir alone, which is enough for Stop.
type State struct {
	Dir   string `json:"dir"`
	Pid   int    `json:"pid,omitempty"`
	Start uint64 `json:"start,omitempty"`
}

// Options of one shared thing.
type Options struct {
	// ReadOnly keeps the source itself from being written. Mounts beneath it
	// are read-only with ReadOnlyBeneath alone.
	ReadOnly        bool
	ReadOnlyBeneath bool
	// Recursive shares mounts beneath the source too.
	Recursive bool
}

// FS is a folder that a machine sees. Its methods may be called concurrently.
type FS struct {
	reaper *proc.Reaper
	state  State
	done   chan struct{}
}

// State is what has to be on disk for Attach.
func (f *FS) State() State { return f.state }

// Socket is where the machine connects.
func (f *FS) Socket() string { return filepath.Join(f.state.Dir, socketFile) }

// Done is closed when virtiofsd has ended; the guest's file systems hang then.
func (f *FS) Done() <-chan struct{} { return f.done }
