package image

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"cloister.dev/internal/image/untar"
)

// applier writes a layer of the content store into a prepared snapshot,
// decrypted, decompressed and hashed on the way. It satisfies containerd's diff.Applier.
type applier struct {
	content content.Provider
	track   *tracker
	syncFS  bool
	dirs    *unnamedDirs // nil: layers are written into mounts
	keys    layerKeys
}

func (a *applier) Apply(ctx context.Context, desc imagespec.Descriptor, mounts []mount.Mount, _ ...diff.ApplyOpt) (imagespec.Descriptor, error) {
	var none imagespec.Descriptor
	blob, err := a.content.ReaderAt(ctx, desc)
	if err != nil {
		return none, fmt.Errorf("read layer: %w", err)
	}
	defer blob.Close()
	opened, err := a.keys.open(desc, &countingReaderAt{r: blob, tell: func(n int64) { a.track.extracted(desc, n) }})
	if err != nil {
		return none, err
	}
	packed := bufio.NewReaderSize(opened, 64<<10)
	plain, err := decompress(packed)
	if err != nil {
		return none, fmt.Errorf("decompress layer: %w", err)
	}
	defer plain.Close()
	archived := newReadAhead(plain)
	defer archived.Close() // before plain: it is what reads there
	sum := digest.Canonical.Digester()
	out := &countingReader{r: io.TeeReader(archived, sum.Hash())}
	if err := a.extract(ctx, mounts, out); err != nil {
		return none, err
	}
	// What follows the archive's end belongs to its digest, and the end of an
	// encrypted layer says whether it is genuine.
	if _, err := io.Copy(io.Discard, out); err != nil {
		return none, err
	}
	if _, err := io.Copy(io.Discard, packed); err != nil {
		return none, err
	}
	return imagespec.Descriptor{MediaType: imagespec.MediaTypeImageLayer, Size: out.n, Digest: sum.Digest()}, nil
}

// extract writes an archive into a snapshot. Overlayfs gets it in the directory
// of the layer, so that nothing need be mounted.
func (a *applier) extract(ctx context.Context, mounts []mount.Mount, r io.Reader) error {
	dir, lowest, ok := layerDir(mounts)
	if !ok || a.dirs == nil {
		return mount.WithTempMount(ctx, mounts, func(root string) error {
			if _, err := archive.Apply(ctx, root, r); err != nil {
				return err
			}
			return a.sync(root)
		})
	}
	names := newNames()
	err := untar.Extract(ctx, dir, r, untar.Options{Lowest: lowest, Entry: names.header, Ignored: func(entry, what string) {
		log.G(ctx).WithField("entry", entry).WithField("what", what).Warn("part of a layer is ignored")
	}})
	if err != nil {
		return err
	}
	if !lowest {
		a.dirs.add(dir, names.unnamed())
	}
	return a.sync(dir)
}

func (a *applier) sync(dir string) error {
	if !a.syncFS {
		return nil
	}
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("flush the file system of %s: %w", dir, err)
	}
	return nil
}

// countingReader counts what was read.
type countingReader struct {
	r io.Reader
	n int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// countingReaderAt tells how far a blob has been read.
type countingReaderAt struct {
	r    io.ReaderAt
	tell func(int64)
}

func (c *countingReaderAt) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.r.ReadAt(p, off)
	c.tell(off + int64(n))
	return n, err
}
