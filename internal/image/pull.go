package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/remotes"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"
)

// puller is one attempt at a pull.
type puller struct {
	s       *Store
	name    reference.Named
	req     PullRequest
	session *session
	track   *tracker
	fetcher remotes.Fetcher
	parts   remotes.Fetcher // for large layers; nil: none
	whole   atomic.Bool     // the registry cannot send parts
	pending *pending
	docs    []fetched // in the order in which they were read
}

// fetched is a small document and where it belongs.
type fetched struct {
	desc imagespec.Descriptor
	data []byte
}

// attempt pulls once, for all who wait for it.
func (s *Store) attempt(ctx context.Context, name reference.Named, req PullRequest, track *tracker) (_ Image, err error) {
	start := time.Now()
	p := &puller{s: s, name: name, req: req, track: track, pending: newPending(s.content)}
	if p.session, err = s.newSession(name, req.Auth); err != nil {
		return Image{}, fmt.Errorf("pull image %s: %w", quoted(name.String()), err)
	}
	defer p.session.close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if s.o.ProgressTimeout > 0 {
		s.wg.Go(func() { p.session.meter.watch(ctx, s.o.ProgressTimeout, cancel) })
	}
	img, err := p.run(ctx)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		err = explain(name.String(), err, p.session.secrets())
		s.log.Warn("image pull failed", "ref", name.String(), "took", time.Since(start), "error", err)
		return Image{}, err
	}
	s.log.Info("image pulled", "ref", name.String(), "image", img.ID, "bytes", img.Size, "took", time.Since(start))
	return img, nil
}

func (p *puller) run(ctx context.Context) (Image, error) {
	c, err := p.find(ctx)
	if err != nil {
		return Image{}, err
	}
	keys, err := p.s.authorise(ctx, c)
	if err != nil {
		return Image{}, err
	}
	lease, err := p.s.newLease(ctx, p.name.String())
	if err != nil {
		return Image{}, err
	}
	img, err := p.bring(leases.WithLease(ctx, lease.ID), c, keys, lease)
	if err != nil {
		p.s.abandon(lease, err)
	}
	return img, err
}

// find asks the registry what the name stands for. Nothing is stored yet.
func (p *puller) find(ctx context.Context) (chosen, error) {
	resolver := p.session.resolver(ctx)
	_, target, err := resolver.Resolve(ctx, pullRef(p.name))
	if err != nil {
		return chosen{}, fmt.Errorf("resolve: %w", err)
	}
	if d, ok := p.name.(reference.Digested); ok && d.Digest() != target.Digest {
		return chosen{}, fmt.Errorf("resolve: asked for %s, got %s: %w", d.Digest(), target.Digest, errLied)
	}
	if p.fetcher, p.parts, err = p.session.fetchers(ctx, resolver, pullRef(p.name)); err != nil {
		return chosen{}, fmt.Errorf("resolve: %w", err)
	}
	return follow(ctx, target, p.req.Platform, p.read)
}

// bring fetches, unpacks and records.
func (p *puller) bring(ctx context.Context, c chosen, keys layerKeys, lease leases.Lease) (_ Image, err error) {
	s := p.s
	defer func() {
		if err != nil {
			err = errors.Join(err, p.pending.wait())
		}
	}()
	for _, d := range p.docs {
		p.pending.write(ctx, d.desc, bytes.NewReader(d.data), func() {}, func() {})
	}
	p.track.layers(c.layers())
	if err := s.prove(ctx, c, s.snapshotters[p.req.Snapshotter], p.settled); err != nil {
		return Image{}, err
	}
	u := unpacking{c, p.pending, keys, p.req.Snapshotter, p.blob, p.track, !s.o.DiscardUnpackedLayers, p.name.String()}
	if err := s.unpack(ctx, u); err != nil {
		return Image{}, err
	}
	if err := p.pending.wait(); err != nil {
		return Image{}, err
	}
	return s.record(ctx, p.name, c, p.req, lease)
}

// read returns a small document, from the content store when it is there.
func (p *puller) read(ctx context.Context, desc imagespec.Descriptor) ([]byte, error) {
	data, err := content.ReadBlob(ctx, p.s.content, desc)
	if errdefs.IsNotFound(err) {
		var b bytes.Buffer
		if _, err = p.download(ctx, desc, &b); err != nil {
			err = fmt.Errorf("fetch %s: %w", desc.Digest, err)
		}
		data = b.Bytes()
	}
	if err != nil {
		return nil, err
	}
	p.docs = append(p.docs, fetched{desc, data})
	return data, nil
}

// settled is locked for those who read the content store itself.
func (p *puller) settled(ctx context.Context, desc imagespec.Descriptor) error {
	if err := p.locked(ctx, desc); err != nil {
		return err
	}
	return p.pending.settle(ctx, desc.Digest)
}

// locked is blob with the lock that containerd's unpacker holds around it.
func (p *puller) locked(ctx context.Context, desc imagespec.Descriptor) error {
	key := "blob://" + desc.Digest.String()
	if err := p.s.blobs.Lock(ctx, key); err != nil {
		return err
	}
	defer p.s.blobs.Unlock(key)
	return p.blob(ctx, desc)
}

// blob brings a blob into the content store, going on where an earlier attempt
// stopped. Bytes that do not give the digest are thrown away, and when some of
// them were an earlier attempt's, asked for once more.
func (p *puller) blob(ctx context.Context, desc imagespec.Descriptor) error {
	if done, err := p.small(ctx, desc); done || err != nil {
		if done {
			p.track.fetched(desc)
		}
		return err
	}
	ref := remotes.MakeRefKey(ctx, desc)
	for {
		before, _ := p.s.content.Status(ctx, ref)
		err := remotes.Fetch(ctx, p.s.content, p.tracked(), desc)
		if err == nil || errdefs.IsAlreadyExists(err) {
			p.track.fetched(desc)
			return nil
		}
		if p.inParts(desc) && refusesRange(err) {
			p.whole.Store(true)
			continue
		}
		wrong := errdefs.IsFailedPrecondition(err)
		if !wrong && (before.Offset == 0 || !refusesRange(err)) {
			return fmt.Errorf("fetch %s: %w", desc.Digest, err)
		}
		if err := p.s.content.Abort(ctx, ref); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("drop wrong bytes of %s: %w", desc.Digest, err)
		}
		if before.Offset == 0 {
			return fmt.Errorf("fetch %s: %v: %w", desc.Digest, err, errLied)
		}
	}
}

// inParts says whether a blob is asked for in several parts at a time.
func (p *puller) inParts(desc imagespec.Descriptor) bool {
	return p.parts != nil && desc.Size > int64(p.session.chunk) && !p.whole.Load()
}

// refusesRange tells the answers of registries that cannot send a part of a
// blob and, instead of sending all of it, refuse.
func refusesRange(err error) bool {
	var status remoteerrors.ErrUnexpectedStatus
	return errors.As(err, &status) &&
		(status.StatusCode == http.StatusRequestedRangeNotSatisfiable || status.StatusCode == http.StatusBadRequest)
}

// label makes the documents refer to their children, for garbage collection. An
// index gets one label for each platform that was pulled.
func (s *Store) label(ctx context.Context, c chosen) error {
	for _, p := range c.parents {
		names := images.ChildGCLabels
		if s.o.DiscardUnpackedLayers {
			names = images.ChildGCLabelsFilterLayers
		}
		if images.IsIndexType(p.desc.MediaType) {
			names = func(d imagespec.Descriptor) []string { return []string{indexLabel(d)} }
		}
		children := func(context.Context, imagespec.Descriptor) ([]imagespec.Descriptor, error) { return p.children, nil }
		if _, err := images.SetChildrenMappedLabels(s.content, children, names)(ctx, p.desc); err != nil {
			return fmt.Errorf("label %s: %w", p.desc.Digest, err)
		}
	}
	return nil
}

// indexLabel is how an index refers to one of its manifests.
func indexLabel(d imagespec.Descriptor) string {
	return "containerd.io/gc.ref.content.m." + d.Digest.Encoded()
}

// record makes the image known, under its ID and its names, and ends the lease
// and what an earlier failure kept, in one transaction.
func (s *Store) record(ctx context.Context, name reference.Named, c chosen, req PullRequest, lease leases.Lease) (Image, error) {
	img := c.image(req.Platform)
	names := []string{img.ID, repoDigest(name, img.Target)}
	if t := repoTag(name); t != "" {
		names = append(names, t)
	}
	labels := map[string]string{labelManaged: labelManagedYes}
	if img.platform != "" {
		labels[labelPlatform] = img.platform
	}
	for k, v := range req.Labels {
		labels[k] = v
	}
	pinned := labels[labelPinned] == labelPinnedYes || slices.ContainsFunc(names, func(n string) bool { return s.index.pinned[n] })
	for i, n := range names[1:] {
		names[i+1] = recordName(n, img.platform)
	}
	if pinned {
		labels[labelPinned] = labelPinnedYes
	}
	s.records.Lock()
	defer s.records.Unlock()
	err := s.update(ctx, func(ctx context.Context) error {
		if err := s.label(ctx, c); err != nil {
			return err
		}
		for _, n := range names {
			record := images.Image{Name: n, Target: img.target, Labels: labels}
			_, err := s.images.Get(ctx, n)
			if err == nil {
				_, err = s.images.Update(ctx, record)
			} else if errdefs.IsNotFound(err) {
				_, err = s.images.Create(ctx, record)
			}
			if err != nil {
				return fmt.Errorf("record image %q: %w", n, err)
			}
		}
		return s.endLeases(ctx, lease, resumeLease(name.String()))
	})
	if err != nil {
		return Image{}, err
	}
	if s.o.DiscardUnpackedLayers {
		s.gc.kick()
	}
	return s.index.put(img, pinned, names...), nil
}

// limiter bounds the layers of one image in flight.
func (s *Store) limiter() *semaphore.Weighted {
	return semaphore.NewWeighted(int64(s.o.MaxConcurrentDownloads))
}

// Pull brings an image to the node, or up to date. Equal pulls at the same
// time are one: it goes on while anyone waits for it, and ends when the last
// one leaves.
func (s *Store) Pull(ctx context.Context, req PullRequest) (Image, error) {
	name, err := parsePullName(req.Ref)
	if err != nil {
		return Image{}, err
	}
	if _, _, err := platform(req.Platform); err != nil {
		return Image{}, err
	}
	if req.Snapshotter, _, err = s.snapshotter(req.Snapshotter); err != nil {
		return Image{}, err
	}
	if err := ctx.Err(); err != nil {
		return Image{}, fmt.Errorf("pull image %s: %w", quoted(name.String()), err)
	}
	f, leave, err := s.join(name, req)
	if err != nil {
		return Image{}, err
	}
	defer leave()
	defer f.track.subscribe(req.Progress)()
	select {
	case <-f.done:
		return f.image, f.err
	case <-ctx.Done():
		return Image{}, fmt.Errorf("pull image %s: %w", quoted(name.String()), ctx.Err())
	}
}

// flightKey tells equal pulls. Credentials are part of it: one caller's do not
// fetch for another.
func flightKey(name reference.Named, req PullRequest) flightID {
	id := flightID{name: name.String(), snapshotter: req.Snapshotter, platform: req.Platform}
	if req.Auth != nil {
		id.auth = *req.Auth
	}
	pairs := make([]string, 0, len(req.Labels))
	for k, v := range req.Labels {
		pairs = append(pairs, k+"="+v)
	}
	slices.Sort(pairs)
	id.labels = strings.Join(pairs, "\x00")
	return id
}

// isClosing says whether the store has been closed.
func (s *Store) isClosing() bool { return errors.Is(s.ctx.Err(), context.Canceled) }
