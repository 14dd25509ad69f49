package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Half of the time of pulling an image of small layers was waiting for the
// disk. So what is small is read as soon as its bytes are here and have the
// digest, while it is still written through. Nothing is recorded before that is
// done: neither the image nor that a layer was unpacked.
//
// Documents are kept in memory until then, layers in files without a name, of
// which nothing is left when the daemon dies.
const (
	smallBlob    = 8 << 20
	pendingBytes = 64 << 20 // of layers, for one pull
	writeTimeout = 5 * time.Minute
)

// pending is the content store as one pull sees it: with the blobs that are on
// their way into it.
type pending struct {
	content.Store

	mu    sync.Mutex
	blobs map[digest.Digest]*pendingBlob
	free  int64
	errs  []error
	wg    sync.WaitGroup
}

// pendingBlob is closed when the last of its users has closed it. users is
// guarded by pending.mu.
type pendingBlob struct {
	from    io.ReaderAt
	size    int64
	users   int
	close   func()
	written chan struct{}
	err     error // set before written is closed
}

func newPending(s content.Store) *pending {
	return &pending{Store: s, blobs: make(map[digest.Digest]*pendingBlob), free: pendingBytes}
}

// reserve takes room for a layer, if there is some.
func (p *pending) reserve(n int64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n > p.free {
		return false
	}
	p.free -= n
	return true
}

func (p *pending) release(n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free += n
}

// use finds a blob that is on its way. leave ends the use.
func (p *pending) use(d digest.Digest) *pendingBlob {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := p.blobs[d]
	if b != nil {
		b.users++
	}
	return b
}

func (p *pending) leave(b *pendingBlob) {
	p.mu.Lock()
	b.users--
	last := b.users == 0
	p.mu.Unlock()
	if last {
		b.close()
	}
}

// write makes a blob readable at once, and calls done when it is on the disk or
// could not be written, and end when nobody reads it any more. It goes on
// when ctx is cancelled: the next pull resumes.
func (p *pending) write(ctx context.Context, desc imagespec.Descriptor, from io.ReaderAt, done, end func()) {
	b := &pendingBlob{from: from, size: desc.Size, users: 1, close: end, written: make(chan struct{})}
	p.mu.Lock()
	if p.blobs[desc.Digest] != nil { // a document and a layer of the same bytes
		p.mu.Unlock()
		end()
		done()
		return
	}
	p.blobs[desc.Digest] = b
	p.mu.Unlock()
	p.wg.Go(func() {
		defer done()
		defer p.leave(b)
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), writeTimeout)
		defer cancel()
		err := content.WriteBlob(ctx, p.Store, remotes.MakeRefKey(ctx, desc), io.NewSectionReader(from, 0, desc.Size), desc)
		p.mu.Lock()
		defer p.mu.Unlock()
		if err != nil {
			b.err = fmt.Errorf("write %s to the content store: %w", desc.Digest, err)
			p.errs = append(p.errs, b.err)
		}
		delete(p.blobs, desc.Digest)
		close(b.written)
	})
}

// wait returns when all blobs have been written, or one could not be.
func (p *pending) wait() error {
	p.wg.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	return errors.Join(p.errs...)
}

// settle waits for one blob.
func (p *pending) settle(ctx context.Context, d digest.Digest) error {
	b := p.use(d)
	if b == nil {
		return nil
	}
	defer p.leave(b)
	select {
	case <-b.written:
		return b.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// ReaderAt reads what is on its way, too.
func (p *pending) ReaderAt(ctx context.Context, desc imagespec.Descriptor) (content.ReaderAt, error) {
	if b := p.use(desc.Digest); b != nil {
		return pendingReader{b, p}, nil
	}
	return p.Store.ReaderAt(ctx, desc)
}

// Update waits until there is something to update.
func (p *pending) Update(ctx context.Context, info content.Info, fields ...string) (content.Info, error) {
	if err := p.settle(ctx, info.Digest); err != nil {
		return content.Info{}, err
	}
	return p.Store.Update(ctx, info, fields...)
}

// pendingReader is one use of a blob that is on its way.
type pendingReader struct {
	b *pendingBlob
	p *pending
}

func (r pendingReader) ReadAt(b []byte, off int64) (int, error) { return r.b.from.ReadAt(b, off) }
func (r pendingReader) Size() int64                             { return r.b.size }

func (r pendingReader) Close() error {
	r.p.leave(r.b)
	return nil
}

// small fetches a layer into a file without a name, unless it is here already
// or was begun. It says whether it did. Locks keep other pulls from fetching it
// meanwhile.
func (p *puller) small(ctx context.Context, desc imagespec.Descriptor) (bool, error) {
	if desc.Size > smallBlob || p.inParts(desc) || !p.pending.reserve(desc.Size) {
		return false, nil
	}
	key := "write://" + desc.Digest.String()
	if err := p.s.blobs.Lock(ctx, key); err != nil {
		p.pending.release(desc.Size)
		return false, err
	}
	done := func() {
		p.s.blobs.Unlock(key)
		p.pending.release(desc.Size)
	}
	ref := remotes.MakeRefKey(ctx, desc)
	_, here := p.s.content.Info(ctx, desc.Digest)
	if _, begun := p.s.content.Status(ctx, ref); here == nil || begun == nil {
		done()
		return false, nil
	}
	fd, err := unix.Open(p.s.contentDir(), unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		done()
		return false, nil //nolint:nilerr // not every file system has such files
	}
	f := os.NewFile(uintptr(fd), "layer "+desc.Digest.String())
	n, err := p.download(ctx, desc, f)
	if err != nil {
		if n > 0 && !errors.Is(err, errLied) {
			err = errors.Join(err, p.keepPart(ctx, ref, desc, io.NewSectionReader(f, 0, n)))
		}
		_ = f.Close()
		done()
		return false, fmt.Errorf("fetch %s: %w", desc.Digest, err)
	}
	p.pending.write(ctx, desc, f, done, func() { _ = f.Close() })
	return true, nil
}

// download fetches a blob and compares it with its digest. It returns how much
// was written, which is the blob's beginning unless the error is errLied.
func (p *puller) download(ctx context.Context, desc imagespec.Descriptor, to io.Writer) (int64, error) {
	rc, err := p.tracked().Fetch(ctx, desc)
	if err != nil {
		return 0, err
	}
	defer rc.Close()
	sum := desc.Digest.Algorithm().Digester()
	n, err := io.CopyN(io.MultiWriter(to, sum.Hash()), rc, desc.Size)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return n, err
	}
	more, err := rc.Read(make([]byte, 1))
	if more > 0 || errdefs.IsFailedPrecondition(err) || sum.Digest() != desc.Digest {
		return n, errLied
	}
	return n, nil
}

// keepPart keeps the beginning of a blob, with which the next pull goes on.
func (p *puller) keepPart(ctx context.Context, ref string, desc imagespec.Descriptor, data io.Reader) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaseTimeout)
	defer cancel()
	w, err := p.s.content.Writer(ctx, content.WithRef(ref), content.WithDescriptor(desc))
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = io.Copy(w, data)
	return errors.Join(err, w.Close())
}
