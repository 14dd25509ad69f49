// Package image keeps the images of the node: it resolves references, pulls
// through the registries' hosts.toml, unpacks into snapshots, and hands root
// file systems to containers. It promises that a pull that fails leaves
// nothing that a later garbage collection does not take, that what was fetched
// is not fetched again, and that an image, its layers and its snapshots stay
// while anything refers to them.
//
// Content, metadata and snapshots are containerd's libraries, in process, in
// containerd's namespace "k8s.io". The package knows nothing of pods, CRI
// messages or configuration files.
//
// Everything that comes out of a registry is hostile: sizes and counts are
// bounded before memory is spent on them, descriptors are stripped of URLs,
// annotations and embedded data, and labels of an image configuration are
// data that nothing interprets.
//
// An image is known by the digest of its configuration (its ID) and by any
// number of names. Three kinds of record in the metadata database refer to it,
// as containerd's own CRI server writes them: "name:tag", "name@digest" and
// "sha256:…" (the ID). All records of an image are written, and removed, in one
// transaction.
//
// Lock order, outer to inner: Store.records (one writer of image records and
// of the index at a time), then index.mu. Store.flights.mu and Store.roots.mu
// are leaves: nothing is acquired while they are held.
package image

import (
	"log/slog"
	"time"

	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Options says where a Store keeps its data and how it pulls.
type Options struct {
	// Root holds content, snapshots and meta.db. It is made with mode 0700.
	Root string
	// Snapshotter is the default one: "overlayfs" (also when empty), "native",
	// "btrfs" or the name of a proxy.
	Snapshotter string
	// Snapshotters are others that pulls and root file systems will name.
	Snapshotters []string
	// ProxySnapshotters are served by other programs, by name.
	ProxySnapshotters map[string]ProxySnapshotter
	// Hosts is how registries are reached at first; see SetHosts.
	Hosts
	// MaxConcurrentDownloads bounds the layers of one image in flight (3).
	MaxConcurrentDownloads int
	// LayerFetchBuffer is the size of the parts in which a layer is asked for,
	// MaxConcurrentDownloads of them at a time. 0 asks for a layer at once.
	LayerFetchBuffer int
	// ProgressTimeout cancels a pull that moves no byte for so long while a
	// request is open. 0 means never. Five minutes is a good value.
	ProgressTimeout time.Duration
	// Pinned names images that a collector of unused images must not remove.
	Pinned []string
	// DiscardUnpackedLayers drops layer blobs once they are unpacked.
	DiscardUnpackedLayers bool
	// SyncFS flushes the file system of the snapshots after each layer, so that
	// a power cut cannot leave a committed layer with empty files.
	SyncFS bool
	// Log may be nil.
	Log *slog.Logger
}

// Image is one image of the node. Slices, maps and pointers are shared with
// the index: readers must not change them.
type Image struct {
	ID          string // digest of the configuration, "sha256:…"
	RepoTags    []string
	RepoDigests []string
	Size        uint64 // bytes of the compressed image: manifests, config, layers
	Username    string // user part of USER when it is not a number
	UID         *int64 // user part of USER when it is a valid uid
	Pinned      bool
	Config      imagespec.ImageConfig
	ChainID     string // name of the committed snapshot; empty without layers
	Target      digest.Digest
	ConfigJSON  []byte

	target    imagespec.Descriptor
	platform  string
	encrypted bool
}

// Auth is what a caller of Pull knows about itself. All fields empty means
// anonymous.
type Auth struct {
	Username, Password, Auth, ServerAddress, IdentityToken, RegistryToken string
}

// PullRequest is one wish for an image.
type PullRequest struct {
	Ref         string
	Auth        *Auth
	Snapshotter string // empty: the default
	Platform    string // "os/arch[/variant]"; empty: this machine's
	// Progress is called about ten times a second from one goroutine, and a
	// last time before Pull returns. It must not block for long.
	Progress func(Progress)
	// Labels are put on the image's records.
	Labels map[string]string
}

// Progress is the state of a pull, layers in the manifest's order.
type Progress struct {
	Ref    string
	Layers []LayerProgress
}

// LayerProgress is the state of one layer.
type LayerProgress struct {
	Digest        digest.Digest
	Offset, Total int64
	State         LayerState
}

// LayerState says what is being done with a layer. Offset counts bytes of the
// compressed layer in each of them.
type LayerState string

// The states of a layer, in their order.
const (
	LayerWaiting     LayerState = "waiting"
	LayerDownloading LayerState = "downloading"
	LayerDownloaded  LayerState = "downloaded"
	LayerExtracting  LayerState = "extracting"
	LayerDone        LayerState = "done"
)

// Usage is what the store takes on disk.
type Usage struct {
	At        time.Time
	Snapshots []FilesystemUsage // one per snapshotter in use, the default first
	Content   FilesystemUsage
}

// FilesystemUsage is what one part of the store takes below Dir.
type FilesystemUsage struct {
	Dir           string
	Snapshotter   string // empty for content
	Bytes, Inodes uint64
}

// RootfsOptions shapes a container's root file system.
type RootfsOptions struct {
	Snapshotter string // empty: the default
	// UIDs and GIDs map the image's ids into a user namespace. The mounts then
	// carry containerd's "uidmap=" and "gidmap=" options, which core/mount
	// turns into id-mapped lower layers.
	UIDs, GIDs []specs.LinuxIDMapping
	// Volatile drops fsync of the upper layer. Such a file system can be
	// mounted once only; overlayfs refuses it afterwards.
	Volatile bool
}
