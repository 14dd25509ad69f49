package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/metadata/boltutil"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/moby/sys/userns"
	bolt "go.etcd.io/bbolt"

	"cloister.dev/internal/image/untar"
)

const (
	namespace = "k8s.io"

	// Labels of image records, as containerd's CRI server writes them.
	labelManaged     = "io.cri-containerd.image"
	labelManagedYes  = "managed"
	labelPinned      = "io.cri-containerd.pinned"
	labelPinnedYes   = "pinned"
	labelPlatform    = "cloister.dev/platform"
	defaultHostsPath = "/etc/containerd/certs.d:/etc/docker/certs.d"

	lockTimeout = 10 * time.Second
)

// Store is the image store of one daemon. Open makes it, Close ends it; all
// other methods may be called from any number of goroutines.
type Store struct {
	o   Options
	log *slog.Logger

	bolt         *bolt.DB
	db           *metadata.DB
	content      content.Store
	images       images.Store
	leases       leases.Manager
	snapshotters map[string]snapshots.Snapshotter
	closers      []io.Closer

	records  sync.Mutex
	hosts    atomic.Pointer[Hosts]
	index    *index
	flights  flights
	arrivals arrivals
	blobs    keyedLock
	roots    roots
	bases    bases
	usage    usageCache
	gc       collector
	reserve  reserve
	idmap    func() (bool, error)
	direct   bool // layers are written where overlayfs keeps them

	// ctx ends with Close; it carries the namespace and the logger.
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// Open takes up the store below o.Root, or makes it. What an interrupted pull
// left behind is put aside for its resumption, or collected, in the background.
func Open(ctx context.Context, o Options) (_ *Store, err error) {
	if o.Root == "" {
		return nil, fmt.Errorf("image store: no root directory: %w", errdefs.ErrInvalidArgument)
	}
	s := &Store{o: withDefaults(o), index: newIndex(o.Pinned)}
	s.log = s.o.Log
	s.reserve = reserve{filepath.Join(o.Root, "reserve")}
	s.direct = untar.Supported() && !userns.RunningInUserNS() // whiteouts are device nodes
	s.idmap = sync.OnceValues(overlayutils.SupportsIDMappedMounts)
	s.ctx, s.cancel = context.WithCancel(namespaces.WithNamespace(log.WithLogger(context.Background(), forwardLog(s.log)), namespace))
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("open image store %s: %w", o.Root, err), s.Close())
		}
	}()
	if err := os.MkdirAll(o.Root, 0o700); err != nil {
		return nil, err
	}
	if err := os.RemoveAll(s.oldHosts()); err != nil {
		return nil, err
	}
	if err := s.SetHosts(s.o.Hosts); err != nil {
		return nil, err
	}
	if err := s.openSnapshotters(); err != nil {
		return nil, err
	}
	if err := s.openMetadata(); err != nil {
		return nil, err
	}
	if err := s.loadIndex(s.within(ctx)); err != nil {
		return nil, err
	}
	if err := s.loadRoots(s.within(ctx)); err != nil {
		return nil, err
	}
	if err := s.adoptLeases(s.within(ctx)); err != nil {
		return nil, err
	}
	s.gc.start(s)
	return s, nil
}

func withDefaults(o Options) Options {
	if o.Snapshotter == "" {
		o.Snapshotter = snapshotterOverlay
	}
	if o.MaxConcurrentDownloads <= 0 {
		o.MaxConcurrentDownloads = 3
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

// Close cancels pulls, waits for them, and closes the databases.
func (s *Store) Close() error {
	s.cancel()
	s.wg.Wait()
	var errs []error
	for _, c := range slices.Backward(s.closers) {
		errs = append(errs, c.Close())
	}
	s.closers = nil
	return errors.Join(errs...)
}

// within returns ctx with the namespace and the logger that containerd's
// libraries look for.
func (s *Store) within(ctx context.Context) context.Context {
	return namespaces.WithNamespace(log.WithLogger(ctx, log.G(s.ctx)), namespace)
}

func (s *Store) contentDir() string { return filepath.Join(s.o.Root, "content") }

func (s *Store) openMetadata() error {
	cs, err := local.NewStore(s.contentDir())
	if err != nil {
		return fmt.Errorf("content store: %w", err)
	}
	path := filepath.Join(s.o.Root, "meta.db")
	s.bolt, err = bolt.Open(path, 0o600, &bolt.Options{
		Timeout:        lockTimeout,
		NoFreelistSync: true,
		FreelistType:   bolt.FreelistMapType,
		NoStatistics:   true,
	})
	if err != nil {
		return fmt.Errorf("open %s (another daemon on the same root?): %w", path, err)
	}
	s.db = metadata.NewDB(s.bolt, cs, s.snapshotters)
	s.closers = append(s.closers, s.db)
	if err := s.dropNameless(); err != nil {
		return err
	}
	if err := s.db.Init(s.ctx); err != nil {
		return fmt.Errorf("initialise %s: %w", path, err)
	}
	s.content = s.db.ContentStore()
	s.images = metadata.NewImageStore(s.db)
	s.leases = metadata.NewLeaseManager(s.db)
	s.snapshotters = s.db.Snapshotters()
	return nil
}

// dropNameless removes what lies among the begun blobs without saying of which
// it is the beginning, which a kill leaves: the content store sees no such
// folder, and never collects it. It wants the store for itself.
func (s *Store) dropNameless() error {
	begun := filepath.Join(s.contentDir(), "ingest")
	entries, err := os.ReadDir(begun)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		dir := filepath.Join(begun, e.Name())
		ref, err := os.Stat(filepath.Join(dir, "ref"))
		if err == nil && ref.Size() > 0 {
			continue
		}
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("remove the beginning of a blob: %w", err)
		}
	}
	return nil
}

// update runs fn in one transaction of the metadata database: all stores that
// are called with the context it gets take part.
func (s *Store) update(ctx context.Context, fn func(context.Context) error) error {
	return s.db.Update(func(tx *bolt.Tx) error {
		return fn(boltutil.WithTransaction(ctx, tx))
	})
}

func (s *Store) snapshotter(name string) (string, snapshots.Snapshotter, error) {
	if name == "" {
		name = s.o.Snapshotter
	}
	sn, ok := s.snapshotters[name]
	if !ok {
		return "", nil, fmt.Errorf("no snapshotter %s on this node: %w", quoted(name), errdefs.ErrInvalidArgument)
	}
	return name, sn, nil
}

// loadIndex reads all image records. A record whose manifest or configuration
// is gone cannot be used and is dropped, so that the next pull starts afresh.
func (s *Store) loadIndex(ctx context.Context) error {
	records, err := s.images.List(ctx)
	if err != nil {
		return fmt.Errorf("list image records: %w", err)
	}
	type key struct{ digest, platform string }
	seen := make(map[key]Image)
	for _, r := range records {
		k := key{r.Target.Digest.String(), r.Labels[labelPlatform]}
		img, ok := seen[k]
		if !ok {
			img, err = s.describe(ctx, r.Target, k.platform)
			if errdefs.IsNotFound(err) {
				s.log.Warn("dropping an image record whose content is gone", "name", r.Name, "error", err)
				if err := s.images.Delete(ctx, r.Name); err != nil && !errdefs.IsNotFound(err) {
					return fmt.Errorf("drop image record %q: %w", r.Name, err)
				}
				continue
			}
			if err != nil {
				s.log.Warn("image record is not usable", "name", r.Name, "error", err)
				continue
			}
			seen[k] = img
		}
		if isID(r.Name) && r.Name != img.ID {
			continue
		}
		s.index.put(img, r.Labels[labelPinned] == labelPinnedYes, r.Name)
	}
	return nil
}

// Get finds an image by ID, by an unambiguous beginning of its ID, or by name.
// It answers from memory.
func (s *Store) Get(refOrID string) (Image, error) { return s.index.get(refOrID, "") }

// GetFor is Get for a handler's platform and snapshotter, as a PullRequest has
// them. An image whose layers are neither there nor can be unpacked there is
// not found, so that it is pulled again.
func (s *Store) GetFor(ctx context.Context, refOrID, snapshotter, platform string) (Image, error) {
	img, err := s.index.get(refOrID, platform)
	if err != nil || !s.o.DiscardUnpackedLayers || img.ChainID == "" {
		return img, err
	}
	name, sn, err := s.snapshotter(snapshotter)
	if err != nil {
		return Image{}, err
	}
	ctx = s.within(ctx)
	if _, err := sn.Stat(ctx, img.ChainID); err == nil || !errdefs.IsNotFound(err) {
		return img, err
	}
	c, err := s.stored(ctx, img.target, img.platform)
	for _, l := range c.layers() {
		if err == nil {
			_, err = s.content.Info(ctx, l.Digest)
		}
	}
	if err != nil {
		return Image{}, fmt.Errorf("image %s is not unpacked for %s: %w", img.ID, name, err)
	}
	return img, nil
}

// List returns all images, ordered by ID. It answers from memory.
func (s *Store) List() []Image { return s.index.list() }

// Remove forgets the image that refOrID names, with all its names. Content and
// snapshots that nothing else uses are freed soon after.
func (s *Store) Remove(ctx context.Context, refOrID string) error {
	return s.RemoveFor(ctx, refOrID, "")
}

// RemoveFor is Remove for a name's image of a platform.
func (s *Store) RemoveFor(ctx context.Context, refOrID, platform string) error {
	s.records.Lock()
	defer s.records.Unlock()
	img, err := s.index.get(refOrID, platform)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	names := s.index.records(img.ID)
	remove := func() error {
		return s.update(s.within(ctx), func(ctx context.Context) error {
			for _, name := range names {
				if err := s.images.Delete(ctx, name); err != nil && !errdefs.IsNotFound(err) {
					return err
				}
			}
			return s.unlabel(ctx, img)
		})
	}
	if err = remove(); isNoSpace(err) {
		s.reserve.release()
		err = remove()
	}
	if err != nil {
		return fmt.Errorf("remove image %s: %w", img.ID, err)
	}
	s.index.remove(img.ID)
	s.gc.kick()
	s.log.Info("image removed", "image", img.ID, "names", names)
	return nil
}

// unlabel lets go of the manifest of an image that is removed, where an index
// stays that other platforms' images came from.
func (s *Store) unlabel(ctx context.Context, img Image) error {
	c, err := s.stored(ctx, img.target, img.platform)
	if err != nil {
		return nil //nolint:nilerr // nothing refers to what is not there
	}
	for _, p := range c.parents {
		if !images.IsIndexType(p.desc.MediaType) {
			continue
		}
		label := indexLabel(p.children[0])
		_, err := s.content.Update(ctx, content.Info{Digest: p.desc.Digest, Labels: map[string]string{label: ""}}, "labels."+label)
		if err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("unlabel %s: %w", p.desc.Digest, err)
		}
	}
	return nil
}
