package image

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	remote "github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/containerd/v2/plugins/snapshots/native"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	"github.com/containerd/errdefs"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const (
	snapshotterOverlay = "overlayfs"
	snapshotterNative  = "native"
	snapshotterBtrfs   = "btrfs"
	snapshotterErofs   = "erofs"

	maxSnapshotMessage = 16 << 20 // as containerd's gRPC servers have it
	maxLabel           = 4096     // of key and value, containerd's limit
)

// ProxySnapshotter is a snapshotter that another program serves over
// containerd's snapshots API.
type ProxySnapshotter struct {
	Address string // of a unix socket
	// Root is the folder that it fills, for the usage of the disk; may be empty.
	Root string
	// Remote says that it may fetch layers itself. It is told image, manifest and
	// layers by the labels that stargz, nydus and soci know, and a layer that it
	// claims to have is neither fetched nor unpacked.
	Remote bool
}

// wanted lists the snapshotters that this node shall have, the default first.
func (s *Store) wanted() []string {
	names := []string{s.o.Snapshotter}
	for _, n := range append(slices.Clone(s.o.Snapshotters), snapshotterNative) {
		if n != "" && !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	return names
}

// openSnapshotters opens all that are wanted. One that does not work here
// fails the store when it is the default or named by a handler.
func (s *Store) openSnapshotters() error {
	s.snapshotters = make(map[string]snapshots.Snapshotter)
	for _, name := range s.wanted() {
		sn, err := s.openSnapshotter(name)
		if err != nil {
			return err
		}
		s.snapshotters[name] = sn
		s.closers = append(s.closers, sn)
	}
	// Images of an earlier default may lie in overlayfs.
	if s.snapshotters[snapshotterOverlay] == nil && s.inUse(snapshotterOverlay) {
		sn, err := s.openSnapshotter(snapshotterOverlay)
		if err != nil {
			s.log.Warn("snapshots of overlayfs exist and cannot be used", "error", err)
			return nil
		}
		s.snapshotters[snapshotterOverlay] = sn
		s.closers = append(s.closers, sn)
	}
	return nil
}

func (s *Store) openSnapshotter(name string) (snapshots.Snapshotter, error) {
	if p, ok := s.o.ProxySnapshotters[name]; ok {
		return openProxy(name, p)
	}
	root := s.snapshotDir(name)
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	var sn snapshots.Snapshotter
	var err error
	switch name {
	case snapshotterOverlay:
		// Only the full check, with a mount, says whether overlayfs works here.
		if err := overlayutils.Supported(root); err != nil {
			return nil, fmt.Errorf("overlayfs does not work below %s, choose another root or the snapshotter %q: %w: %w", root, snapshotterNative, err, errdefs.ErrFailedPrecondition)
		}
		sn, err = overlay.NewSnapshotter(root, overlay.AsynchronousRemove, overlay.WithRemapIDs)
	case snapshotterNative:
		sn, err = native.NewSnapshotter(root)
	case snapshotterErofs:
		sn, err = openErofs(root)
	case snapshotterBtrfs:
		if sn, err = openBtrfs(root); err != nil {
			err = fmt.Errorf("below %s, which has to be a mounted btrfs: %w: %w", root, err, errdefs.ErrFailedPrecondition)
		}
	default:
		_ = os.Remove(root)
		return nil, fmt.Errorf("unknown snapshotter %s, choose one of %s: %w", quoted(name), strings.Join(s.known(), ", "), errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, fmt.Errorf("snapshotter %s: %w", name, err)
	}
	return sn, nil
}

// known lists the snapshotters that can be chosen.
func (s *Store) known() []string {
	names := []string{snapshotterOverlay, snapshotterNative, snapshotterErofs, snapshotterBtrfs}
	for n := range s.o.ProxySnapshotters {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

// proxied closes the connection with the snapshotter.
type proxied struct {
	snapshots.Snapshotter
	conn *grpc.ClientConn
}

func (p proxied) Close() error { return errors.Join(p.Snapshotter.Close(), p.conn.Close()) }

// openProxy does not wait for the program: it may be started after the daemon.
func openProxy(name string, p ProxySnapshotter) (snapshots.Snapshotter, error) {
	address := p.Address
	if !strings.Contains(address, "://") {
		address = "unix://" + address
	}
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxSnapshotMessage), grpc.MaxCallSendMsgSize(maxSnapshotMessage)))
	if err != nil {
		return nil, fmt.Errorf("snapshotter %s at %s: %w", name, p.Address, err)
	}
	return proxied{proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), name), conn}, nil
}

func (s *Store) snapshotDir(snapshotter string) string {
	if p, ok := s.o.ProxySnapshotters[snapshotter]; ok && p.Root != "" {
		return p.Root
	}
	return filepath.Join(s.o.Root, "snapshots", snapshotter)
}

// layersFor gives the layers as a snapshotter is to see them.
func (s *Store) layersFor(snapshotter, ref string, c chosen) []imagespec.Descriptor {
	layers := c.layers()
	if !s.o.ProxySnapshotters[snapshotter].Remote || ref == "" {
		return layers
	}
	for i := range layers {
		layers[i].Annotations = map[string]string{
			remote.TargetRefLabel:            ref,
			remote.TargetManifestDigestLabel: c.manifestDesc().Digest.String(),
			remote.TargetLayerDigestLabel:    layers[i].Digest.String(),
			remote.TargetImageLayersLabel:    digests(layers[i:]),
		}
	}
	return layers
}

// digests lists as many layers as a label has room for.
func digests(layers []imagespec.Descriptor) string {
	var b strings.Builder
	for _, l := range layers {
		if b.Len()+len(l.Digest)+1 > maxLabel-len(remote.TargetImageLayersLabel) {
			break
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString(l.Digest.String())
	}
	return b.String()
}
