package pod

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/image"
	"cloister.dev/internal/network"
	"cloister.dev/internal/nri"
	"cloister.dev/internal/oci"
	"cloister.dev/internal/shim"
)

// Options configure a Service.
type Options struct {
	Root, State string
	Images      *image.Store
	Network     network.Attacher
	Shims       *shim.Client
	Node        oci.Node
	NRI         *nri.Server // nil: no plugins
	Observer    Observer
	Log         *slog.Logger

	// CgroupParent is for pods that name none and whose cgroups systemd does
	// not manage. Each daemon of a node needs one of its own; empty is
	// oci.DefaultCgroup.
	CgroupParent string

	// NetNSDir is where network namespaces are pinned; empty: in the folder of
	// each pod, below State.
	NetNSDir string

	LogMaxLine         int64 // bytes, see shim.TaskRequest
	IgnoreImageVolumes bool
	// DrainExecSync bounds the wait for output of an ExecSync that ended, which
	// a child of it may hold open; 0: as long as the caller waits.
	DrainExecSync time.Duration
	StatsPeriod   time.Duration              // statistics are no older than this
	LayerPeriod   time.Duration              // between two measurements of a writable layer; 0: layerAge
	PodRanges     func([]netip.Prefix) error // takes the node's pod ranges; nil: nobody wants them
	VerboseInfo   func() map[string]any      // the configuration, as Status shows it
	Conditions    func() []Condition         // further conditions of Status
}

// Condition is a fact about the daemon that Status reports.
type Condition struct {
	Type, Reason, Message string
	OK                    bool
}

// Service makes and keeps the pods of one daemon.
type Service struct {
	o     Options
	log   *slog.Logger
	store *store
	hub   *hub
	index index
	stats stats

	attempts attempts
	behind   *behind
	forwards atomic.Uint64 // names of sockets

	ctx    context.Context // ends with the service; creations run on it
	cancel context.CancelFunc
	work   sync.WaitGroup // creations, exit monitors, background clean-up
}

// Open opens the pod store and takes up the pods of an earlier daemon: what
// runs goes on, what ended meanwhile is noted, what was half made is taken
// down. The service serves at once; shims are asked in the background.
func Open(o Options) (*Service, error) {
	for _, d := range []struct {
		path string
		mode os.FileMode
	}{{o.Root, 0o700}, {o.State, 0o711}, {filepath.Join(o.State, "pods"), 0o711}, {filepath.Join(o.State, "containers"), 0o711}, {filepath.Join(o.State, "notes"), 0o700}} {
		if err := os.MkdirAll(d.path, d.mode); err != nil {
			return nil, fmt.Errorf("prepare the daemon's folders: %w", err)
		}
	}
	st, err := openStore(filepath.Join(o.Root, "pods.db"), filepath.Join(o.State, "notes"))
	if err != nil {
		return nil, err
	}
	s := &Service{o: o, log: o.Log, store: st, hub: newHub(), behind: newBehind()}
	s.index.init()
	s.attempts.init()
	s.ctx, s.cancel = context.WithCancel(context.Background())
	if err := s.recover(); err != nil {
		return nil, errors.Join(fmt.Errorf("recover the pods of an earlier daemon: %w", err), s.Close())
	}
	s.work.Go(s.followNotes)
	return s, nil
}

// Close waits for running operations and closes the store. Pods go on.
func (s *Service) Close() error {
	s.cancel()
	s.work.Wait()
	s.dropCgroupParent()
	s.hub.close()
	return s.store.close()
}

func (s *Service) podDir(id string) string       { return filepath.Join(s.o.State, "pods", id) }
func (s *Service) containerDir(id string) string { return filepath.Join(s.o.State, "containers", id) }
func (s *Service) volumeDir(id string) string    { return filepath.Join(s.o.Root, "volumes", id) }

// errClosing is what an operation answers that the daemon's end cut off.
var errClosing = fmt.Errorf("the daemon is stopping: %w", errdefs.ErrUnavailable)
