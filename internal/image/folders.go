package image

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	continuityfs "github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// On overlayfs the files that a container writes are in a folder of ours, not
// in a snapshot of its own, which would cost four database transactions in a
// container's life (docs/decisions/034-writable-folders.md). The layers below
// are those of the base: one snapshot for all containers of an image, never
// mounted, that tells how its mount would look and keeps the layers from
// collection.

const (
	labelBase  = "cloister.dev/base"
	baseName   = "base-"
	folderName = "r-"  // and the key, escaped
	trashName  = "old" // folders whose root file systems were removed
	aboutName  = "about.json"

	optUpper = "upperdir="
	optWork  = "workdir="
)

// bases are the bases that exist or are being made.
type bases struct {
	mu      sync.Mutex // guards the fields and those of each base; never held across I/O
	byChain map[string]*base
	byName  map[string]*base
}

type base struct {
	name, chain string
	users       int

	making sync.Mutex // held while the snapshot is made; guards mounts
	mounts []mount.Mount
}

// folder is what about.json keeps of a root file system.
type folder struct {
	Base     string `json:"base"`
	Volatile bool   `json:"volatile,omitempty"`
}

func (b *bases) add(n *base) {
	b.byName[n.name] = n
	if b.byChain[n.chain] == nil {
		b.byChain[n.chain] = n
	}
}

// hold gives the base of a chain, which may have to be made.
func (b *bases) hold(chain string) *base {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := b.byChain[chain]
	if n == nil {
		n = &base{name: baseName + rand.Text(), chain: chain}
		b.add(n)
	}
	n.users++
	return n
}

func (b *bases) release(n *base) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n.users--
}

// idle takes those out that nobody stands on and no image needs.
func (b *bases) idle(needed map[string]bool) (all []*base) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for name, n := range b.byName {
		if n.users > 0 || needed[n.chain] && b.byChain[n.chain] == n {
			continue
		}
		delete(b.byName, name)
		if b.byChain[n.chain] == n {
			delete(b.byChain, n.chain)
		}
		all = append(all, n)
	}
	return all
}

func (s *Store) foldersDir() string { return filepath.Join(s.o.Root, "rootfs") }

func (s *Store) folder(key string) string {
	h := fnv.New32a()
	_, _ = h.Write([]byte(key)) // a hash takes everything
	return filepath.Join(s.foldersDir(), shard(h.Sum32()%shards), folderName+url.PathEscape(key))
}

// shards is among how many folders root file systems are divided. See spread.
const shards = 64

func shard(n uint32) string { return fmt.Sprintf("%02x", n) }

// loadFolders finds the root file systems of earlier lives and what they
// stand on.
func (s *Store) loadFolders(ctx context.Context) error {
	s.bases.byChain, s.bases.byName = map[string]*base{}, map[string]*base{}
	if err := os.MkdirAll(filepath.Join(s.foldersDir(), trashName), 0o700); err != nil {
		return fmt.Errorf("make the folder of root file systems: %w", err)
	}
	if err := spread(s.foldersDir()); err != nil {
		s.log.Debug("root file systems are not spread over the disk, containers are made slower", "path", s.foldersDir(), "error", err)
	}
	keys, err := s.listFolders()
	if err != nil {
		return err
	}
	if sn := s.snapshotters[snapshotterOverlay]; sn != nil && s.inUse(snapshotterOverlay) {
		err := sn.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
			if i.Labels[labelBase] != "" {
				s.bases.add(&base{name: i.Name, chain: i.Parent})
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("list snapshots of %s: %w", snapshotterOverlay, err)
		}
	}
	for _, key := range keys {
		s.roots.set(key, s.readFolder(key))
	}
	return nil
}

// listFolders gives the keys of all root file systems. The first version had
// them beside the shards; they move, mounted or not.
func (s *Store) listFolders() (keys []string, err error) {
	dirs := []string{s.foldersDir()}
	for n := range uint32(shards) {
		dir := filepath.Join(s.foldersDir(), shard(n))
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("make a folder of root file systems: %w", err)
		}
		dirs = append(dirs, dir)
	}
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return nil, fmt.Errorf("list root file systems: %w", err)
		}
		for _, e := range entries {
			escaped, ok := strings.CutPrefix(e.Name(), folderName)
			key, err := url.PathUnescape(escaped)
			if !ok || err != nil {
				continue
			}
			if dir != s.foldersDir() {
				keys = append(keys, key)
			} else if err := os.Rename(filepath.Join(dir, e.Name()), s.folder(key)); err != nil {
				return nil, fmt.Errorf("move a root file system of an earlier version: %w", err)
			}
		}
	}
	return keys, nil
}

// spread tells ext4 that the folders in dir have nothing to do with each other,
// so that it puts them in different block groups (chattr +T). In one group each
// new file is looked for among all that were deleted lately, which without a
// journal are passed over for a minute and more: on a node whose containers
// come and go, that was two thirds of a creation. A group for each container
// would do, too, but then many containers dirty bitmaps all over the disk.
func spread(dir string) error {
	const topdir = 0x20000 // FS_TOPDIR_FL
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Type != unix.EXT4_SUPER_MAGIC {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	flags, err := unix.IoctlGetInt(int(d.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil || flags&topdir != 0 {
		return err
	}
	return unix.IoctlSetPointerInt(int(d.Fd()), unix.FS_IOC_SETFLAGS, flags|topdir)
}

// readFolder tells of a root file system of an earlier life. One that a crash
// left unfinished has no base and can only be removed.
func (s *Store) readFolder(key string) root {
	r := root{snapshotter: snapshotterOverlay, folder: true}
	var f folder
	data, err := os.ReadFile(filepath.Join(s.folder(key), aboutName))
	if err == nil {
		err = json.Unmarshal(data, &f)
	}
	if err != nil {
		s.log.Warn("root file system is not whole", "key", key, "error", err)
		return r
	}
	r.volatile = f.Volatile
	if r.base = s.bases.byName[f.Base]; r.base != nil {
		r.base.users++
	}
	return r
}

// prepareFolder makes a root file system of an image with layers.
func (s *Store) prepareFolder(ctx context.Context, key string, img Image, volatile bool) (_ []mount.Mount, err error) {
	b := s.bases.hold(img.ChainID)
	dir := s.folder(key)
	made := false
	defer func() {
		if err != nil {
			s.bases.release(b)
			if made {
				err = errors.Join(err, os.RemoveAll(dir))
			}
		}
	}()
	template, err := s.makeBase(ctx, b, img)
	if err != nil {
		return nil, err
	}
	if err := os.Mkdir(dir, 0o700); errors.Is(err, fs.ErrExist) {
		return nil, errdefs.ErrAlreadyExists
	} else if err != nil {
		return nil, err
	}
	made = true
	about, err := json.Marshal(folder{Base: b.name, Volatile: volatile})
	if err != nil {
		return nil, err
	}
	if err := makeUpper(dir, template); err != nil {
		return nil, err
	}
	// Last: a folder without it is one that a crash left unfinished.
	if err := os.WriteFile(filepath.Join(dir, aboutName), about, 0o600); err != nil {
		return nil, err
	}
	s.roots.set(key, root{snapshotter: snapshotterOverlay, volatile: volatile, folder: true, base: b})
	return withVolatile(inFolder(template, dir), volatile), nil
}

// makeBase gives the mount of the base, which it makes for the first user.
func (s *Store) makeBase(ctx context.Context, b *base, img Image) ([]mount.Mount, error) {
	b.making.Lock()
	defer b.making.Unlock()
	if b.mounts != nil {
		return b.mounts, nil
	}
	sn := s.snapshotters[snapshotterOverlay]
	mounts, err := sn.Mounts(ctx, b.name) // of an earlier life
	if errdefs.IsNotFound(err) {
		mounts, err = s.snapshotOf(ctx, b.name, img, snapshotterOverlay, map[string]string{labelBase: "1"}, sn.Prepare)
	}
	if err != nil {
		return nil, fmt.Errorf("base of root file systems: %w", err)
	}
	if _, ok := option(mounts, optUpper); !ok || len(mounts) != 1 {
		return nil, fmt.Errorf("base of root file systems: snapshotter %s gives %v: %w", snapshotterOverlay, mounts, errdefs.ErrInternal)
	}
	b.mounts = mounts
	return mounts, nil
}

func option(mounts []mount.Mount, name string) (string, bool) {
	for _, m := range mounts {
		for _, o := range m.Options {
			if v, ok := strings.CutPrefix(o, name); ok {
				return v, true
			}
		}
	}
	return "", false
}

func upperOf(dir string) string { return filepath.Join(dir, "fs") }
func workOf(dir string) string  { return filepath.Join(dir, "work") }

// makeUpper makes the folders of an overlay's writable side; the root of the
// file system belongs to whom the snapshotter gave it.
func makeUpper(dir string, template []mount.Mount) error {
	for path, mode := range map[string]os.FileMode{upperOf(dir): 0o755, workOf(dir): 0o711} {
		if err := os.Mkdir(path, mode); err != nil {
			return err
		}
	}
	theirs, _ := option(template, optUpper)
	var st syscall.Stat_t
	if err := syscall.Stat(theirs, &st); err != nil {
		return &os.PathError{Op: "stat", Path: theirs, Err: err}
	}
	if st.Uid == 0 && st.Gid == 0 {
		return nil
	}
	return os.Lchown(upperOf(dir), int(st.Uid), int(st.Gid))
}

// inFolder turns a base's mount into one whose writable side is in dir.
func inFolder(template []mount.Mount, dir string) []mount.Mount {
	m := template[0]
	m.Options = slices.Clone(m.Options)
	for i, o := range m.Options {
		switch {
		case strings.HasPrefix(o, optUpper):
			m.Options[i] = optUpper + upperOf(dir)
		case strings.HasPrefix(o, optWork):
			m.Options[i] = optWork + workOf(dir)
		}
	}
	return []mount.Mount{m}
}

// folderMounts gives the mounts of an existing root file system.
func (s *Store) folderMounts(ctx context.Context, key string, r root) ([]mount.Mount, error) {
	if r.base == nil {
		return nil, fmt.Errorf("root file system %s is not whole: %w", quoted(key), errdefs.ErrNotFound)
	}
	template, err := s.makeBase(ctx, r.base, Image{ChainID: r.base.chain})
	if err != nil {
		return nil, err
	}
	return withVolatile(inFolder(template, s.folder(key)), r.volatile), nil
}

// dropFolder puts a root file system's folder aside for the collector.
func (s *Store) dropFolder(key string, r root) error {
	old := filepath.Join(s.foldersDir(), trashName, rand.Text())
	if err := os.Rename(s.folder(key), old); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("put root file system %s aside: %w", quoted(key), err)
	}
	if s.roots.delete(key) && r.base != nil { // not when another call was first
		s.bases.release(r.base)
	}
	return nil
}

// collectFolders frees what removed root file systems took, and lets go of
// layers that only they needed.
func (s *Store) collectFolders(ctx context.Context) error {
	trash := filepath.Join(s.foldersDir(), trashName)
	old, err := os.ReadDir(trash)
	if err != nil {
		return fmt.Errorf("list removed root file systems: %w", err)
	}
	for _, e := range old {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := os.RemoveAll(filepath.Join(trash, e.Name())); err != nil {
			return fmt.Errorf("free a removed root file system: %w", err)
		}
	}
	needed := map[string]bool{}
	for _, img := range s.List() {
		needed[img.ChainID] = true
	}
	var errs []error
	for _, b := range s.bases.idle(needed) {
		if err := s.snapshotters[snapshotterOverlay].Remove(ctx, b.name); err != nil && !errdefs.IsNotFound(err) {
			// It has its label, so the next start tries again.
			errs = append(errs, fmt.Errorf("remove base %s of root file systems: %w", b.name, err))
		}
	}
	return errors.Join(errs...)
}

func (s *Store) folderUsage(ctx context.Context, key string) (snapshots.Usage, error) {
	u, err := continuityfs.DiskUsage(ctx, upperOf(s.folder(key)))
	return snapshots.Usage(u), err
}

// foldersUsage is what all root file systems take.
func (s *Store) foldersUsage(ctx context.Context) (bytes, inodes uint64, err error) {
	for _, key := range s.roots.folders() {
		u, err := s.folderUsage(ctx, key)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, 0, fmt.Errorf("usage of root file system %s: %w", quoted(key), err)
		}
		bytes += uint64(max(u.Size, 0))
		inodes += uint64(max(u.Inodes, 0))
	}
	return bytes, inodes, nil
}

// snapshotOf makes a snapshot on an image's layers, which may have to be
// unpacked for this snapshotter first.
func (s *Store) snapshotOf(ctx context.Context, key string, img Image, snapshotter string, labels map[string]string, do prepareFunc) ([]mount.Mount, error) {
	labels[labelRoot] = time.Now().UTC().Format(time.RFC3339)
	opt := snapshots.WithLabels(labels)
	// Not within a transaction of ours, though it would save a flush: the
	// collector takes a snapshot whose record is not committed yet for an
	// orphan, and the snapshotter's lock ends before our commit would.
	mounts, err := do(ctx, key, img.ChainID, opt)
	if !errdefs.IsNotFound(err) || img.ChainID == "" || img.ID == "" {
		return mounts, err
	}
	if err := s.unpackStored(ctx, img, snapshotter); err != nil {
		return nil, err
	}
	return do(ctx, key, img.ChainID, opt)
}
