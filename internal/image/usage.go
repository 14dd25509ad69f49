package image

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// usageAge is how old an answer about disk usage may be.
const usageAge = 10 * time.Second

// usageCache holds the last walk. Its lock is held during a walk, so that
// callers who come meanwhile get the same answer.
type usageCache struct {
	mu    sync.Mutex
	total Usage

	rootMu sync.Mutex
	roots  map[string]measured
}

type measured struct {
	at    time.Time
	usage snapshots.Usage
}

func (c *usageCache) forget(key string) {
	c.rootMu.Lock()
	defer c.rootMu.Unlock()
	delete(c.roots, key)
}

// inUse says whether a snapshotter has ever held a snapshot here. The native
// one is opened on every node, and used on few.
func (s *Store) inUse(snapshotter string) bool {
	if _, ok := s.o.ProxySnapshotters[snapshotter]; ok {
		return true
	}
	_, err := os.Stat(filepath.Join(s.snapshotDir(snapshotter), "metadata.db"))
	return err == nil
}

// Usage says what snapshots and content take on disk. It walks at most once in
// ten seconds.
func (s *Store) Usage(ctx context.Context) (Usage, error) {
	s.usage.mu.Lock()
	defer s.usage.mu.Unlock()
	if time.Since(s.usage.total.At) < usageAge {
		return s.usage.total, nil
	}
	ctx = s.within(ctx)
	u := Usage{At: time.Now(), Content: FilesystemUsage{Dir: s.contentDir()}}
	names := []string{s.o.Snapshotter}
	for name := range s.snapshotters {
		if name != s.o.Snapshotter && s.inUse(name) {
			names = append(names, name)
		}
	}
	for _, name := range names {
		f, err := s.snapshotUsage(ctx, name)
		if _, ok := s.o.ProxySnapshotters[name]; ok && err != nil {
			s.log.Warn("proxy snapshotter does not tell what it uses", "snapshotter", name, "error", clean(err.Error()))
		} else if err != nil {
			return Usage{}, err
		}
		u.Snapshots = append(u.Snapshots, f)
	}
	err := s.content.Walk(ctx, func(i content.Info) error {
		u.Content.Bytes += uint64(i.Size)
		u.Content.Inodes++
		return nil
	})
	if err != nil {
		return Usage{}, fmt.Errorf("usage of content: %w", err)
	}
	s.usage.total = u
	return u, nil
}

func (s *Store) snapshotUsage(ctx context.Context, name string) (FilesystemUsage, error) {
	f := FilesystemUsage{Dir: s.snapshotDir(name), Snapshotter: name}
	sn := s.snapshotters[name]
	var infos []snapshots.Info
	err := sn.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		infos = append(infos, i)
		return nil
	})
	if err != nil {
		return f, fmt.Errorf("usage of %s: %w", name, err)
	}
	for _, i := range infos {
		u, err := sn.Usage(ctx, i.Name)
		if errdefs.IsNotFound(err) || os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return f, fmt.Errorf("usage of snapshot %s: %w", i.Name, err)
		}
		f.Bytes += uint64(max(u.Size, 0))
		f.Inodes += uint64(max(u.Inodes, 0))
	}
	if name == snapshotterOverlay {
		bytes, inodes, err := s.foldersUsage(ctx)
		if err != nil {
			return f, err
		}
		f.Bytes += bytes
		f.Inodes += inodes
	}
	return f, nil
}

// RootfsUsage says what a container has written to its root file system. It
// walks the written files at most once in ten seconds.
func (s *Store) RootfsUsage(ctx context.Context, key string) (bytes, inodes uint64, err error) {
	r, sn, err := s.existing(ctx, key)
	if err != nil {
		return 0, 0, err
	}
	s.usage.rootMu.Lock()
	m, ok := s.usage.roots[key]
	s.usage.rootMu.Unlock()
	if !ok || time.Since(m.at) >= usageAge {
		var u snapshots.Usage
		if r.folder {
			u, err = s.folderUsage(ctx, key)
		} else {
			u, err = sn.Usage(s.within(ctx), key)
		}
		if err != nil {
			return 0, 0, fmt.Errorf("usage of root file system %s: %w", quoted(key), err)
		}
		m = measured{time.Now(), u}
		s.usage.rootMu.Lock()
		if s.usage.roots == nil {
			s.usage.roots = make(map[string]measured)
		}
		s.usage.roots[key] = m
		s.usage.rootMu.Unlock()
	}
	return uint64(max(m.usage.Size, 0)), uint64(max(m.usage.Inodes, 0)), nil
}
