package image

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"

	"cloister.dev/internal/image/crypt"
)

// Encrypted images. A key of the node has to open every encrypted layer before
// anything is fetched, each time that the image is pulled and each time that a
// root file system is made of it: what one pull decrypted stays on the node
// and must not serve those whose key was taken away.
//
// The configuration of an encrypted image is readable, and names the digests
// of the plain layers. So another image could claim them, and would get the
// snapshots of the encrypted one without having their content. Snapshots of
// decrypted layers are marked; an image whose own layer is not encrypted gets
// such a one only when its bytes have that digest.
const (
	labelDecrypted  = "cloister.dev/decrypted"
	maxAnnotations  = 64
	maxAnnotation   = 256 << 10
	errWrongContent = "layer %s does not hold what the image configuration promises, diff ID %s: %w"
)

// Decryption says which keys open encrypted layers.
type Decryption struct {
	// Accepts lists the media types it is for; empty means all encrypted ones.
	Accepts []string
	Keys    crypt.Keys
}

// encryption is the part of a descriptor's annotations that is believed.
type encryption map[string]string

func (e *encryption) UnmarshalJSON(b []byte) error {
	var all map[string]string
	if err := json.Unmarshal(b, &all); err != nil {
		return err
	}
	*e = nil
	for k, v := range all {
		if !strings.HasPrefix(k, crypt.Prefix) {
			continue
		}
		if len(*e) == maxAnnotations || len(v) > maxAnnotation {
			return fmt.Errorf("annotations of an encrypted layer are too large: %w", errdefs.ErrResourceExhausted)
		}
		if *e == nil {
			*e = make(encryption)
		}
		(*e)[k] = v
	}
	return nil
}

// layerKeys are the opened keys of an image's encrypted layers.
type layerKeys map[digest.Digest]crypt.LayerKey

func (d descriptor) sealed() bool { return crypt.Encrypted(d.MediaType) }

func (c chosen) sealed() bool { return slices.ContainsFunc(c.manifest.Layers, descriptor.sealed) }

// authorise opens the keys of all encrypted layers, or says why it cannot.
func (s *Store) authorise(ctx context.Context, c chosen) (layerKeys, error) {
	keys := make(layerKeys)
	for _, l := range c.manifest.Layers {
		if !l.sealed() {
			continue
		}
		if _, ok := keys[l.Digest]; ok {
			continue
		}
		k, err := s.open(ctx, l)
		if err != nil {
			return nil, fmt.Errorf("encrypted layer %s: %w", l.Digest, err)
		}
		keys[l.Digest] = k
	}
	return keys, nil
}

func (s *Store) open(ctx context.Context, l descriptor) (crypt.LayerKey, error) {
	var why []error
	for _, d := range s.hosts.Load().Decryption {
		if len(d.Accepts) > 0 && !slices.Contains(d.Accepts, l.MediaType) {
			continue
		}
		k, err := d.Keys.Open(ctx, l.Encryption)
		if err == nil {
			return k, nil
		}
		why = append(why, err)
	}
	switch len(why) {
	case 0:
		return crypt.LayerKey{}, fmt.Errorf("this node decrypts no images of type %s; set key_model and the keys' folder: %w", quoted(l.MediaType), errdefs.ErrPermissionDenied)
	case 1:
		return crypt.LayerKey{}, why[0]
	}
	return crypt.LayerKey{}, errors.Join(why...)
}

// open gives the bytes of a layer as they were before they were encrypted.
func (k layerKeys) open(d imagespec.Descriptor, r io.ReaderAt) (io.Reader, error) {
	raw := io.NewSectionReader(r, 0, d.Size)
	key, ok := k[d.Digest]
	if !ok {
		return raw, nil
	}
	return key.Decrypt(bufio.NewReaderSize(raw, 64<<10))
}

// decrypted are the names of the snapshots into which encrypted layers go.
func (c chosen) decrypted() map[string]bool {
	out := make(map[string]bool)
	for i, chain := range c.chains() {
		if c.manifest.Layers[i].sealed() {
			out[chain] = true
		}
	}
	return out
}

// chains are the names of an image's snapshots, by layer.
func (c chosen) chains() []string {
	ids := identity.ChainIDs(slices.Clone(c.config.RootFS.DiffIDs))
	out := make([]string, len(ids))
	for i, d := range ids {
		out[i] = d.String()
	}
	return out
}

// prove checks the layers of an image that would get a snapshot of a decrypted
// layer without being encrypted itself.
func (s *Store) prove(ctx context.Context, c chosen, sn snapshots.Snapshotter, fetch func(context.Context, imagespec.Descriptor) error) error {
	for i, chain := range c.chains() {
		l := c.manifest.Layers[i]
		if l.sealed() {
			continue
		}
		info, err := sn.Stat(ctx, chain)
		if errdefs.IsNotFound(err) {
			return nil // nor are those above it
		}
		if err != nil {
			return fmt.Errorf("snapshot %s: %w", chain, err)
		}
		if info.Labels[labelDecrypted] == "" {
			continue
		}
		if err := fetch(ctx, l.plain()); err != nil {
			return err
		}
		if err := s.checkContent(ctx, l.plain(), c.config.RootFS.DiffIDs[i]); err != nil {
			return err
		}
	}
	return nil
}

// checkContent compares the plain bytes of a stored layer with its diff ID.
func (s *Store) checkContent(ctx context.Context, l imagespec.Descriptor, want digest.Digest) error {
	blob, err := s.content.ReaderAt(ctx, l)
	if err != nil {
		return fmt.Errorf("read layer %s: %w", l.Digest, err)
	}
	defer blob.Close()
	plain, err := decompress(bufio.NewReaderSize(io.NewSectionReader(blob, 0, l.Size), 64<<10))
	if err != nil {
		return fmt.Errorf("layer %s: %w", l.Digest, err)
	}
	defer plain.Close()
	sum := digest.Canonical.Digester()
	if _, err := io.Copy(sum.Hash(), plain); err != nil {
		return fmt.Errorf("layer %s: %w", l.Digest, err)
	}
	if sum.Digest() != want {
		return fmt.Errorf(errWrongContent, l.Digest, want, errdefs.ErrInvalidArgument)
	}
	return nil
}

// mayUse checks again that the node may use an encrypted image that it has.
func (s *Store) mayUse(ctx context.Context, img Image) error {
	if !img.encrypted {
		return nil
	}
	c, err := s.stored(ctx, img.target, img.platform)
	if err != nil {
		return fmt.Errorf("image %s is no longer complete, pull it again: %w", img.ID, err)
	}
	if _, err := s.authorise(ctx, c); err != nil {
		return fmt.Errorf("image %s: %w", img.ID, err)
	}
	return nil
}
