package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	continuityfs "github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A power cut, a failing disk or a hand may damage what was good when it was
// written. Check reads all of it: blobs against their digests, and the files of
// unpacked layers against the layers that they came from.

// Finding is damage to an image.
type Finding struct {
	Kind     string // "blob" or "layer"
	ID       string // digest of the blob, or name of the snapshot
	Path     string // of the damaged file, if there is one
	Detail   string
	Repaired bool
	Err      string // why the repair failed
}

// maxFindings bounds the report on one layer.
const maxFindings = 100

// Check looks at the content of all images; with repair it fetches damaged
// blobs again, from the registries that the images' names tell, and writes
// damaged files of layers again. Containers may go on meanwhile.
func (s *Store) Check(ctx context.Context, repair bool) ([]Finding, error) {
	ctx = s.within(ctx)
	c := &checking{Store: s, repair: repair, seen: make(map[string]bool)}
	for _, img := range s.List() {
		if err := c.image(ctx, img); err != nil {
			return c.found, fmt.Errorf("check image %s: %w", img.ID, err)
		}
	}
	return c.found, nil
}

type checking struct {
	*Store
	repair bool
	seen   map[string]bool // blobs and snapshots
	found  []Finding
}

func (c *checking) image(ctx context.Context, img Image) error {
	// Documents first: without them nothing says what the layers are.
	for bad, ok := c.badDocument(ctx, img); ok; bad, ok = c.badDocument(ctx, img) {
		if !c.blob(ctx, img, bad, true) {
			return ctx.Err() // reported, and nothing more can be known
		}
	}
	all, err := c.stored(ctx, img.target, img.platform)
	if err != nil {
		c.report(Finding{Kind: "blob", ID: img.ID, Detail: "the image's documents cannot be read: " + err.Error()})
		return ctx.Err()
	}
	return c.parts(ctx, img, all)
}

// badDocument finds the first document on the way to the configuration that is
// not what its digest says.
func (c *checking) badDocument(ctx context.Context, img Image) (bad imagespec.Descriptor, found bool) {
	_, _ = follow(ctx, img.target, img.platform, func(ctx context.Context, d imagespec.Descriptor) ([]byte, error) {
		b, err := content.ReadBlob(ctx, c.content, d)
		if err == nil && d.Digest.Algorithm().FromBytes(b) != d.Digest {
			err = errLied
		}
		if err != nil {
			bad, found = d, true
		}
		return b, err
	})
	return bad, found
}

func (c *checking) parts(ctx context.Context, img Image, all chosen) error {
	chains := all.chains()
	for i, l := range all.layers() {
		if err := ctx.Err(); err != nil {
			return err
		}
		if !c.blob(ctx, img, l, !c.o.DiscardUnpackedLayers) {
			continue
		}
		if err := c.layer(ctx, all, i, chains[i]); err != nil {
			return err
		}
	}
	return nil
}

// blob says whether a blob is there and good in the end.
func (c *checking) blob(ctx context.Context, img Image, d imagespec.Descriptor, needed bool) bool {
	err := c.verify(ctx, d)
	if err == nil {
		return true
	}
	if !needed && errdefs.IsNotFound(err) || c.seen[d.Digest.String()] {
		return false
	}
	c.seen[d.Digest.String()] = true
	f := Finding{Kind: "blob", ID: d.Digest.String(), Detail: fmt.Sprintf("part of image %s: %v", img.ID, err)}
	if c.repair {
		if err := c.refetch(ctx, img, d); err != nil {
			f.Err = err.Error()
		} else {
			f.Repaired = true
		}
	}
	c.report(f)
	return f.Repaired
}

func (c *checking) report(f Finding) { c.found = append(c.found, f) }

// verify reads a blob.
func (s *Store) verify(ctx context.Context, d imagespec.Descriptor) error {
	r, err := s.content.ReaderAt(ctx, d)
	if err != nil {
		return err
	}
	defer r.Close()
	sum := d.Digest.Algorithm().Digester()
	if _, err := io.Copy(sum.Hash(), io.NewSectionReader(r, 0, r.Size())); err != nil {
		return err
	}
	if r.Size() != d.Size || sum.Digest() != d.Digest {
		return fmt.Errorf("the bytes on the disk are not those that were fetched: %w", errdefs.ErrDataLoss)
	}
	return nil
}

// refetch replaces a blob by what a registry has.
func (s *Store) refetch(ctx context.Context, img Image, d imagespec.Descriptor) error {
	last := fmt.Errorf("the image has no name to fetch it by: %w", errdefs.ErrNotFound)
	for _, ref := range img.RepoDigests {
		name, err := parseName(ref)
		if err != nil {
			continue
		}
		if last = s.refetchFrom(ctx, name, d); last == nil {
			return nil
		}
	}
	return last
}

func (s *Store) refetchFrom(ctx context.Context, name reference.Named, d imagespec.Descriptor) error {
	session, err := s.newSession(name, nil)
	if err != nil {
		return err
	}
	defer session.close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if s.o.ProgressTimeout > 0 {
		s.wg.Go(func() { session.meter.watch(ctx, s.o.ProgressTimeout, cancel) })
	}
	fetcher, err := session.resolver(ctx).Fetcher(ctx, pullRef(name))
	if err != nil {
		return explain(name.String(), err, session.secrets())
	}
	rc, err := fetcher.Fetch(ctx, d)
	if err != nil {
		return explain(name.String(), err, session.secrets())
	}
	defer rc.Close()
	if err := s.replaceBlob(ctx, d, rc); err != nil {
		return explain(name.String(), err, session.secrets())
	}
	return nil
}

// replaceBlob writes a blob in the place of a damaged one, at once and only
// when the bytes are proven. What refers to it in the database stays.
func (s *Store) replaceBlob(ctx context.Context, d imagespec.Descriptor, r io.Reader) (err error) {
	if _, err := s.content.Info(ctx, d.Digest); errdefs.IsNotFound(err) {
		return content.WriteBlob(ctx, s.content, "refetch-"+d.Digest.String(), io.LimitReader(r, d.Size+1), d)
	}
	place := filepath.Join(s.contentDir(), "blobs", d.Digest.Algorithm().String(), d.Digest.Encoded())
	f, err := os.CreateTemp(filepath.Join(s.contentDir(), "ingest"), "refetch-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()); _ = os.Remove(f.Name()) }() // gone when it was renamed
	sum := d.Digest.Algorithm().Digester()
	n, err := io.Copy(io.MultiWriter(f, sum.Hash()), io.LimitReader(r, d.Size+1))
	if err != nil {
		return err
	}
	if n != d.Size || sum.Digest() != d.Digest {
		return errLied
	}
	if err := errors.Join(f.Chmod(0o444), f.Sync()); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(place), 0o755); err != nil {
		return err
	}
	return os.Rename(f.Name(), place)
}

// layer compares the files of a snapshot with the layer that they came from.
func (c *checking) layer(ctx context.Context, all chosen, i int, chain string) error {
	sn := c.snapshotters[snapshotterOverlay]
	if sn == nil || c.seen[chain] {
		return nil
	}
	c.seen[chain] = true
	upper, err := c.upperOf(ctx, sn, chain)
	if upper == "" || err != nil {
		return err
	}
	keys, err := c.authorise(ctx, all)
	if err != nil {
		return nil //nolint:nilerr // encrypted, and the key is gone: nothing to compare with
	}
	bad, err := c.compare(ctx, keys, all.layers()[i], upper)
	if err != nil {
		return err
	}
	if len(bad) == 0 {
		return nil
	}
	var why string
	if c.repair {
		if err := c.rewrite(ctx, keys, all.layers()[i], upper, bad); err != nil {
			why = err.Error()
		}
	}
	n := 0
	for name, detail := range bad {
		if n++; n > maxFindings {
			c.report(Finding{Kind: "layer", ID: chain, Detail: fmt.Sprintf("and %d files more", len(bad)-maxFindings), Repaired: c.repair && why == "", Err: why})
			break
		}
		c.report(Finding{Kind: "layer", ID: chain, Path: path.Join(upper, name), Detail: detail, Repaired: c.repair && why == "", Err: why})
	}
	return nil
}

// upperOf is the directory that holds a committed layer's files, "" if there
// is no such layer.
func (s *Store) upperOf(ctx context.Context, sn snapshots.Snapshotter, chain string) (string, error) {
	if _, err := sn.Stat(ctx, chain); err != nil {
		if errdefs.IsNotFound(err) {
			return "", nil
		}
		return "", err
	}
	key := "check-" + chain
	mounts, err := sn.View(ctx, key, chain)
	if err != nil {
		return "", fmt.Errorf("view of layer %s: %w", chain, err)
	}
	dirs := lowerDirs(mounts)
	if err := sn.Remove(ctx, key); err != nil && !errdefs.IsNotFound(err) { // the collector may have been first
		return "", fmt.Errorf("view of layer %s: %w", chain, err)
	}
	if len(dirs) == 0 {
		return "", nil
	}
	return dirs[0], nil
}

// plain opens a layer's archive.
func (s *Store) plain(ctx context.Context, keys layerKeys, l imagespec.Descriptor) (io.ReadCloser, error) {
	blob, err := s.content.ReaderAt(ctx, l)
	if err != nil {
		return nil, err
	}
	opened, err := keys.open(l, blob)
	if err != nil {
		return nil, errors.Join(err, blob.Close())
	}
	plain, err := decompress(bufio.NewReaderSize(opened, 64<<10))
	if err != nil {
		return nil, errors.Join(err, blob.Close())
	}
	return struct {
		io.Reader
		io.Closer
	}{plain, closers{plain, blob}}, nil
}

type closers []io.Closer

func (c closers) Close() (err error) {
	for _, one := range c {
		err = errors.Join(err, one.Close())
	}
	return err
}

// compare lists the regular files of a layer that are not as the layer has
// them. The last entry of a name counts.
func (s *Store) compare(ctx context.Context, keys layerKeys, l imagespec.Descriptor, upper string) (map[string]string, error) {
	plain, err := s.plain(ctx, keys, l)
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	bad := make(map[string]string)
	for r := tar.NewReader(plain); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return bad, nil
		}
		if err != nil {
			return nil, fmt.Errorf("layer %s: %w", l.Digest, err)
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		name := path.Clean("/" + h.Name)
		delete(bad, name)
		if h.Typeflag != tar.TypeReg {
			continue
		}
		if base := path.Base(name); len(base) > 4 && base[:4] == ".wh." {
			continue
		}
		if detail := differs(upper, name, r, h.Size); detail != "" {
			bad[name] = detail
		}
	}
}

func differs(upper, name string, want io.Reader, size int64) string {
	dir, err := continuityfs.RootPath(upper, path.Dir(name))
	if err != nil {
		return "its folder cannot be found: " + err.Error()
	}
	file := path.Join(dir, path.Base(name))
	fi, err := os.Lstat(file)
	if err != nil {
		return "the file is gone"
	}
	if !fi.Mode().IsRegular() || fi.Size() != size {
		return fmt.Sprintf("the file has %d bytes, the layer %d", fi.Size(), size)
	}
	f, err := os.Open(file)
	if err != nil {
		return "the file cannot be read: " + err.Error()
	}
	defer f.Close()
	a, b := make([]byte, 32<<10), make([]byte, 32<<10)
	for {
		n, err := io.ReadFull(want, a)
		if _, ferr := io.ReadFull(f, b[:n]); ferr != nil || !bytes.Equal(a[:n], b[:n]) {
			return "the file does not hold the layer's bytes"
		}
		if err != nil {
			return ""
		}
	}
}

// rewrite unpacks the damaged files of a layer again. A container that has one
// of them open keeps the damaged one until it opens it anew.
func (s *Store) rewrite(ctx context.Context, keys layerKeys, l imagespec.Descriptor, upper string, bad map[string]string) error {
	plain, err := s.plain(ctx, keys, l)
	if err != nil {
		return err
	}
	defer plain.Close()
	_, err = archive.Apply(ctx, upper, plain, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout),
		archive.WithFilter(func(h *tar.Header) (bool, error) {
			_, ok := bad[path.Clean("/"+h.Name)]
			return ok, nil
		}))
	return err
}
