package image

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"

	"cloister.dev/internal/image/crypt"
)

// Bounds on what a registry may make this process hold in memory, or the node
// mount. Overlayfs takes 500 lower layers, and a mount one page of options.
const (
	maxDocument = 8 << 20 // a manifest, an index or a configuration
	maxLayers   = 400
	maxIndex    = 4096 // manifests in one index
	maxNesting  = 3    // indexes within indexes
	maxBlob     = 1 << 46
)

// bounded is a JSON list that stops decoding at its limit, before a small
// document of empty elements grows to a hundred times its size.
type bounded[T any] []T

func (l *bounded[T]) UnmarshalJSON(b []byte) error {
	*l = nil
	if bytes.Equal(b, []byte("null")) {
		return nil
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	if tok, err := dec.Token(); err != nil {
		return err
	} else if tok != json.Delim('[') {
		return fmt.Errorf("list expected, found %v", tok)
	}
	for dec.More() {
		if len(*l) == maxIndex {
			return fmt.Errorf("more than %d elements: %w", maxIndex, errdefs.ErrResourceExhausted)
		}
		var v T
		if err := dec.Decode(&v); err != nil {
			return err
		}
		*l = append(*l, v)
	}
	return nil
}

// descriptor is the part of a descriptor that is believed. URLs would let an
// image send the node to any address; annotations, but for those of encrypted
// layers, and data steer containerd's libraries.
type descriptor struct {
	MediaType    string              `json:"mediaType"`
	Digest       digest.Digest       `json:"digest"`
	Size         int64               `json:"size"`
	Platform     *imagespec.Platform `json:"platform"`
	ArtifactType string              `json:"artifactType"`
	Encryption   encryption          `json:"annotations"`
}

func (d descriptor) plain() imagespec.Descriptor {
	return imagespec.Descriptor{MediaType: crypt.Plain(d.MediaType), Digest: d.Digest, Size: d.Size}
}

func (d descriptor) check(what string, most int64) error {
	if err := d.Digest.Validate(); err != nil {
		return fmt.Errorf("%s has digest %s: %v: %w", what, quoted(d.Digest.String()), err, errdefs.ErrInvalidArgument)
	}
	if d.Size <= 0 {
		return fmt.Errorf("%s %s has size %d: %w", what, d.Digest, d.Size, errdefs.ErrInvalidArgument)
	}
	if d.Size > most {
		return fmt.Errorf("%s %s has %d bytes, the limit is %d: %w", what, d.Digest, d.Size, most, errdefs.ErrResourceExhausted)
	}
	return nil
}

// document is a manifest or an index, before it is known which.
type document struct {
	MediaType    string              `json:"mediaType"`
	ArtifactType string              `json:"artifactType"`
	Config       *descriptor         `json:"config"`
	Layers       bounded[descriptor] `json:"layers"`
	Manifests    bounded[descriptor] `json:"manifests"`
	FSLayers     json.RawMessage     `json:"fsLayers"`
}

// parseDocument decodes and refuses what is neither a manifest nor an index,
// or both: a document of two meanings lets two tools see two images.
func parseDocument(mediaType string, b []byte) (document, error) {
	var d document
	if err := json.Unmarshal(b, &d); err != nil {
		if errdefs.IsResourceExhausted(err) {
			return document{}, err
		}
		return document{}, fmt.Errorf("%s is not valid JSON: %v: %w", quoted(mediaType), err, errdefs.ErrInvalidArgument)
	}
	index := images.IsIndexType(mediaType)
	switch {
	case len(d.FSLayers) != 0:
		return document{}, errSchema1
	case index && (d.Config != nil || d.Layers != nil), !index && d.Manifests != nil,
		index && images.IsManifestType(d.MediaType), !index && images.IsIndexType(d.MediaType):
		return document{}, fmt.Errorf("ambiguous document of type %s: it has the parts of both an image manifest and an index: %w", quoted(mediaType), errdefs.ErrInvalidArgument)
	case !index && d.Config == nil:
		return document{}, fmt.Errorf("image manifest without a configuration: %w", errdefs.ErrInvalidArgument)
	}
	return d, nil
}

// pick chooses the manifest of an index for a platform.
func (d document) pick(want platforms.MatchComparer, name string) (descriptor, error) {
	var best *descriptor
	var has []string
	for i := range d.Manifests {
		m := &d.Manifests[i]
		if !images.IsManifestType(m.MediaType) && !images.IsIndexType(m.MediaType) {
			continue
		}
		if m.Platform != nil {
			if len(has) < 16 {
				has = append(has, platforms.Format(*m.Platform))
			}
			if !want.Match(*m.Platform) {
				continue
			}
		}
		switch {
		case best == nil, best.Platform == nil && m.Platform != nil:
			best = m
		case m.Platform != nil && want.Less(*m.Platform, *best.Platform):
			best = m
		}
	}
	if best == nil {
		return descriptor{}, fmt.Errorf("no image for platform %s in the index, it has [%s]: %w", name, quoted(strings.Join(has, " ")), errdefs.ErrNotFound)
	}
	return *best, nil
}

// checkImage refuses manifests that describe something else than a container
// image that this node can run.
func (d document) checkImage() error {
	switch mt := d.Config.MediaType; {
	case images.IsConfigType(mt), mt == "application/octet-stream" && d.ArtifactType == "":
	case mt == imagespec.MediaTypeEmptyJSON || d.ArtifactType != "":
		return fmt.Errorf("artifact of type %s, not a container image: %w", quoted(d.ArtifactType), errdefs.ErrInvalidArgument)
	default:
		return fmt.Errorf("image configuration of type %s is not supported: %w", quoted(mt), errdefs.ErrNotImplemented)
	}
	if err := d.Config.check("image configuration", maxDocument); err != nil {
		return err
	}
	if len(d.Layers) > maxLayers {
		return fmt.Errorf("%d layers, the limit is %d: %w", len(d.Layers), maxLayers, errdefs.ErrResourceExhausted)
	}
	for _, l := range d.Layers {
		if err := l.check("layer", maxBlob); err != nil {
			return err
		}
		if mt := crypt.Plain(l.MediaType); !images.IsLayerType(mt) || mt == images.MediaTypeErofsLayer {
			return fmt.Errorf("layer %s of type %s is not supported, only archives of files are: %w", l.Digest, quoted(l.MediaType), errdefs.ErrNotImplemented)
		}
	}
	return nil
}

// config is the part of an image configuration that is used. History may be
// long and is of no use here.
type config struct {
	imagespec.Platform
	Config imagespec.ImageConfig `json:"config"`
	RootFS struct {
		Type    string                 `json:"type"`
		DiffIDs bounded[digest.Digest] `json:"diff_ids"`
	} `json:"rootfs"`
}

func parseConfig(b []byte, layers int) (config, error) {
	var c config
	if err := json.Unmarshal(b, &c); err != nil {
		if errdefs.IsResourceExhausted(err) {
			return config{}, err
		}
		return config{}, fmt.Errorf("image configuration is not valid JSON: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	if c.RootFS.Type != "" && c.RootFS.Type != "layers" {
		return config{}, fmt.Errorf("image configuration with root file system type %s: %w", quoted(c.RootFS.Type), errdefs.ErrNotImplemented)
	}
	if len(c.RootFS.DiffIDs) != layers {
		return config{}, fmt.Errorf("manifest has %d layers, image configuration %d: %w", layers, len(c.RootFS.DiffIDs), errdefs.ErrInvalidArgument)
	}
	for _, d := range c.RootFS.DiffIDs {
		if err := d.Validate(); err != nil || d.Algorithm() != digest.Canonical {
			return config{}, fmt.Errorf("image configuration with layer digest %s: %w", quoted(d.String()), errdefs.ErrInvalidArgument)
		}
	}
	return c, nil
}

// matches checks the platform that the configuration claims. An image without
// one, made from nothing, is taken as fitting.
func (c config) matches(want platforms.MatchComparer, name string) error {
	if c.Architecture == "" || want.Match(platforms.Normalize(c.Platform)) {
		return nil
	}
	return fmt.Errorf("image is for platform %s, this pull is for %s: %w", quoted(platforms.Format(c.Platform)), name, errdefs.ErrNotFound)
}

// platform returns the matcher for "os/arch", or for this machine.
func platform(name string) (platforms.MatchComparer, string, error) {
	if name == "" {
		return platforms.Default(), platforms.Format(platforms.DefaultSpec()), nil
	}
	p, err := platforms.Parse(name)
	if err != nil {
		return nil, "", fmt.Errorf("platform %s: %v: %w", quoted(name), err, errdefs.ErrInvalidArgument)
	}
	return platforms.Only(p), platforms.Format(p), nil
}

// chosen is an image that has been followed from its target to its layers.
type chosen struct {
	parents  []parent // target first, the manifest last
	manifest document
	config   config
	raw      []byte // of the configuration
}

// parent is a document and the descriptors of the children that are kept.
type parent struct {
	desc     imagespec.Descriptor
	children []imagespec.Descriptor
}

// configDesc is the configuration's descriptor with the type that containerd's
// unpacker knows; old registries call it application/octet-stream.
func (c chosen) configDesc() imagespec.Descriptor {
	d := c.manifest.Config.plain()
	if !images.IsConfigType(d.MediaType) {
		d.MediaType = imagespec.MediaTypeImageConfig
	}
	return d
}

func (c chosen) layers() []imagespec.Descriptor {
	out := make([]imagespec.Descriptor, len(c.manifest.Layers))
	for i, l := range c.manifest.Layers {
		out[i] = l.plain()
	}
	return out
}

func (c chosen) manifestDesc() imagespec.Descriptor { return c.parents[len(c.parents)-1].desc }

// follow walks from a target to the configuration for a platform. read fetches
// a document, or finds it in the content store.
func follow(ctx context.Context, target imagespec.Descriptor, platformName string, read func(context.Context, imagespec.Descriptor) ([]byte, error)) (chosen, error) {
	want, name, err := platform(platformName)
	if err != nil {
		return chosen{}, err
	}
	var c chosen
	at := descriptor{MediaType: target.MediaType, Digest: target.Digest, Size: target.Size}
	for range maxNesting + 1 {
		if at.MediaType == images.MediaTypeDockerSchema1Manifest {
			return chosen{}, errSchema1
		}
		if !images.IsManifestType(at.MediaType) && !images.IsIndexType(at.MediaType) {
			return chosen{}, fmt.Errorf("%s is of type %s, neither an image manifest nor an index: %w", at.Digest, quoted(at.MediaType), errdefs.ErrInvalidArgument)
		}
		if err := at.check("manifest", maxDocument); err != nil {
			return chosen{}, err
		}
		b, err := read(ctx, at.plain())
		if err != nil {
			return chosen{}, err
		}
		d, err := parseDocument(at.MediaType, b)
		if err != nil {
			return chosen{}, err
		}
		if images.IsManifestType(at.MediaType) {
			return c.finish(ctx, at, d, want, name, read)
		}
		next, err := d.pick(want, name)
		if err != nil {
			return chosen{}, err
		}
		c.parents = append(c.parents, parent{at.plain(), []imagespec.Descriptor{next.plain()}})
		at = next
	}
	return chosen{}, fmt.Errorf("more than %d indexes within one another: %w", maxNesting, errdefs.ErrInvalidArgument)
}

func (c chosen) finish(ctx context.Context, at descriptor, d document, want platforms.MatchComparer, name string, read func(context.Context, imagespec.Descriptor) ([]byte, error)) (chosen, error) {
	if err := d.checkImage(); err != nil {
		return chosen{}, err
	}
	c.manifest = d
	c.parents = append(c.parents, parent{at.plain(), append([]imagespec.Descriptor{c.configDesc()}, c.layers()...)})
	raw, err := read(ctx, c.configDesc())
	if err != nil {
		return chosen{}, err
	}
	c.raw = raw
	if c.config, err = parseConfig(raw, len(d.Layers)); err != nil {
		return chosen{}, err
	}
	return c, c.config.matches(want, name)
}

// image makes the exported form, names aside.
func (c chosen) image(platformName string) Image {
	target := c.parents[0].desc
	img := Image{
		ID:         c.manifest.Config.Digest.String(),
		Config:     c.config.Config,
		Target:     target.Digest,
		ConfigJSON: c.raw,
		target:     target,
		platform:   platformName,
		encrypted:  c.sealed(),
	}
	img.UID, img.Username = parseUser(c.config.Config.User)
	if ids := c.config.RootFS.DiffIDs; len(ids) > 0 {
		img.ChainID = identity.ChainID(ids).String()
	}
	for _, p := range c.parents {
		img.Size += uint64(p.desc.Size)
	}
	img.Size += uint64(c.manifest.Config.Size)
	for _, l := range c.manifest.Layers {
		img.Size += uint64(l.Size)
	}
	return img
}

// stored follows a target within the content store.
func (s *Store) stored(ctx context.Context, target imagespec.Descriptor, platformName string) (chosen, error) {
	return follow(ctx, target, platformName, func(ctx context.Context, d imagespec.Descriptor) ([]byte, error) {
		return content.ReadBlob(ctx, s.content, d)
	})
}

func (s *Store) describe(ctx context.Context, target imagespec.Descriptor, platformName string) (Image, error) {
	c, err := s.stored(ctx, target, platformName)
	if err != nil {
		return Image{}, err
	}
	return c.image(platformName), nil
}
