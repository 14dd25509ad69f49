package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Half of the time of pulling an image of small layers was waiting for the
// disk. So what is small is read from memory as soon as its bytes are here and
// have the digest, while it is still written through. Nothing is recorded
// before that is done: neither the image nor that a layer was unpacked.
const (
	smallBlob    = 4 << 20
	pendingBytes = 16 << 20 // of layers, for one pull
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

type pendingBlob struct {
	data    []byte
	written chan struct{}
	err     error // set before written is closed
}

func newPending(s content.Store) *pending {
	return &pending{Store: s, blobs: make(map[digest.Digest]*pendingBlob), free: pendingBytes}
}

// reserve takes memory for a blob. write gives it back.
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

func (p *pending) get(d digest.Digest) *pendingBlob {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.blobs[d]
}

// write makes a blob readable at once, and calls done when it is on the disk or
// could not be written. It goes on when ctx is cancelled: the next pull resumes.
func (p *pending) write(ctx context.Context, desc imagespec.Descriptor, data []byte, done func()) {
	b := &pendingBlob{data: data, written: make(chan struct{})}
	p.mu.Lock()
	if p.blobs[desc.Digest] != nil { // a document and a layer of the same bytes
		p.mu.Unlock()
		done()
		return
	}
	p.blobs[desc.Digest] = b
	p.mu.Unlock()
	p.wg.Go(func() {
		defer done()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), writeTimeout)
		defer cancel()
		err := content.WriteBlob(ctx, p.Store, remotes.MakeRefKey(ctx, desc), bytes.NewReader(data), desc)
		p.mu.Lock()
		defer p.mu.Unlock()
		if err != nil {
			b.err = fmt.Errorf("write %s to the content store: %w", desc.Digest, err)
			p.errs = append(p.errs, b.err)
		} else {
			delete(p.blobs, desc.Digest)
		}
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
	b := p.get(d)
	if b == nil {
		return nil
	}
	select {
	case <-b.written:
		return b.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// ReaderAt reads what is on its way, too.
func (p *pending) ReaderAt(ctx context.Context, desc imagespec.Descriptor) (content.ReaderAt, error) {
	if b := p.get(desc.Digest); b != nil {
		return memory{bytes.NewReader(b.data)}, nil
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

type memory struct{ *bytes.Reader }

func (memory) Close() error { return nil }

// small fetches a layer into memory, unless it is here already or was begun. It
// says whether it did. Locks keep other pulls from fetching it meanwhile.
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
	data, err := p.download(ctx, desc)
	if err != nil {
		if len(data) > 0 && !errors.Is(err, errLied) {
			err = errors.Join(err, p.keepPart(ctx, ref, desc, data))
		}
		done()
		return false, fmt.Errorf("fetch %s: %w", desc.Digest, err)
	}
	p.pending.write(ctx, desc, data, done)
	return true, nil
}

// download fetches a blob into memory and compares it with its digest. With an
// error it returns what came, which is its beginning unless the error is errLied.
func (p *puller) download(ctx context.Context, desc imagespec.Descriptor) ([]byte, error) {
	rc, err := p.tracked().Fetch(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	data := make([]byte, desc.Size)
	n, err := io.ReadFull(rc, data)
	if errors.Is(err, io.EOF) && n == 0 {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return data[:n], err
	}
	more, err := rc.Read(make([]byte, 1))
	if more > 0 || errdefs.IsFailedPrecondition(err) || desc.Digest.Algorithm().FromBytes(data) != desc.Digest {
		return nil, errLied
	}
	return data, nil
}

// keepPart keeps the beginning of a blob, with which the next pull goes on.
func (p *puller) keepPart(ctx context.Context, ref string, desc imagespec.Descriptor, data []byte) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaseTimeout)
	defer cancel()
	w, err := p.s.content.Writer(ctx, content.WithRef(ref), content.WithDescriptor(desc))
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = w.Write(data)
	return errors.Join(err, w.Close())
}
