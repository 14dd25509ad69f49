// Package copy takes images from one place to another, a registry or an OCI
// layout on disk, and encrypts or decrypts their layers on the way. It
// promises that nothing appears at the destination before all layers have been
// made, and that the files it makes meanwhile are its user's alone and gone in
// the end.
//
// It needs no daemon and knows of none.
package copy

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/match"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// refName names an image within a layout.
const refName = "org.opencontainers.image.ref.name"

// Place is where an image is, or shall be.
type Place struct {
	dir, tag string         // of a layout
	ref      name.Reference // of a registry
}

// String is what was parsed.
func (p Place) String() string {
	if p.ref != nil {
		return p.ref.String()
	}
	return "oci:" + p.dir + ":" + p.tag
}

// Parse takes "oci:FOLDER[:TAG]", "docker://NAME" and NAME. A plain registry is
// asked over HTTP.
func Parse(s string, plainHTTP bool) (Place, error) {
	if rest, ok := strings.CutPrefix(s, "oci:"); ok {
		dir, tag, _ := strings.Cut(rest, ":")
		if dir == "" {
			return Place{}, fmt.Errorf("%q names no folder, want oci:FOLDER[:TAG]: %w", s, errdefs.ErrInvalidArgument)
		}
		return Place{dir: dir, tag: tag}, nil
	}
	var opts []name.Option
	if plainHTTP {
		opts = append(opts, name.Insecure)
	}
	ref, err := name.ParseReference(strings.TrimPrefix(s, "docker://"), opts...)
	if err != nil {
		return Place{}, fmt.Errorf("%q is neither oci:FOLDER[:TAG] nor an image name: %v: %w", s, err, errdefs.ErrInvalidArgument)
	}
	return Place{ref: ref}, nil
}

// Image is an image of one platform, or an index of several.
type Image struct {
	one  v1.Image
	many v1.ImageIndex
}

func options(ctx context.Context) []remote.Option {
	return []remote.Option{remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain)}
}

// Load finds an image. Layers are read when they are needed.
func Load(ctx context.Context, p Place) (Image, error) {
	var img Image
	var err error
	if p.ref != nil {
		img, err = loadRemote(ctx, p.ref)
	} else {
		img, err = loadLayout(p)
	}
	if err != nil {
		return Image{}, fmt.Errorf("image %s: %w", p, err)
	}
	return img, nil
}

func loadRemote(ctx context.Context, ref name.Reference) (Image, error) {
	d, err := remote.Get(ref, options(ctx)...)
	if err != nil {
		return Image{}, err
	}
	if d.MediaType.IsIndex() {
		many, err := d.ImageIndex()
		return Image{many: many}, err
	}
	one, err := d.Image()
	return Image{one: one}, err
}

func loadLayout(p Place) (Image, error) {
	l, err := layout.FromPath(p.dir)
	if err != nil {
		return Image{}, err
	}
	index, err := l.ImageIndex()
	if err != nil {
		return Image{}, err
	}
	m, err := index.IndexManifest()
	if err != nil {
		return Image{}, err
	}
	var found []v1.Descriptor
	for _, d := range m.Manifests {
		if p.tag == "" || d.Annotations[refName] == p.tag {
			found = append(found, d)
		}
	}
	if len(found) != 1 {
		return Image{}, fmt.Errorf("%d images fit, name one as oci:FOLDER:TAG: %w", len(found), errdefs.ErrNotFound)
	}
	if found[0].MediaType.IsIndex() {
		many, err := index.ImageIndex(found[0].Digest)
		return Image{many: many}, err
	}
	one, err := index.Image(found[0].Digest)
	return Image{one: one}, err
}

// Save writes an image. A layout's image of the same tag is replaced.
func Save(ctx context.Context, p Place, img Image) error {
	if err := save(ctx, p, img); err != nil {
		return fmt.Errorf("write image %s: %w", p, err)
	}
	return nil
}

func save(ctx context.Context, p Place, img Image) error {
	if p.ref != nil {
		if img.many != nil {
			return remote.WriteIndex(p.ref, img.many, options(ctx)...)
		}
		return remote.Write(p.ref, img.one, options(ctx)...)
	}
	l, err := layout.FromPath(p.dir)
	if err != nil {
		if err := os.MkdirAll(p.dir, 0o755); err != nil {
			return err
		}
		if l, err = layout.Write(p.dir, empty.Index); err != nil {
			return err
		}
	}
	tag := p.tag
	if tag == "" {
		tag = "latest"
	}
	o := layout.WithAnnotations(map[string]string{refName: tag})
	if img.many != nil {
		return l.ReplaceIndex(img.many, match.Name(tag), o)
	}
	return l.ReplaceImage(img.one, match.Name(tag), o)
}

// Change makes another layer out of one of an image's; nil leaves it.
type Change func(ctx context.Context, i, n int, l v1.Layer, d v1.Descriptor) (*Layer, error)

// Convert changes the layers of an image, of every platform that it has or of
// the one that is named, "os/arch[/variant]". Nothing changed is an error.
func Convert(ctx context.Context, img Image, platform string, change Change) (Image, error) {
	if img.one != nil {
		one, n, err := convertImage(ctx, img.one, change)
		if err == nil && n == 0 {
			err = errNothing
		}
		return Image{one: one}, err
	}
	want, err := parsePlatform(platform)
	if err != nil {
		return Image{}, err
	}
	m, err := img.many.IndexManifest()
	if err != nil {
		return Image{}, err
	}
	out := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	total := 0
	for _, d := range m.Manifests {
		if !d.MediaType.IsImage() || want != nil && (d.Platform == nil || !d.Platform.Satisfies(*want)) {
			continue
		}
		one, err := img.many.Image(d.Digest)
		if err != nil {
			return Image{}, err
		}
		one, n, err := convertImage(ctx, one, change)
		if err != nil {
			return Image{}, err
		}
		if want != nil {
			if n == 0 {
				return Image{}, errNothing
			}
			return Image{one: one}, nil
		}
		total += n
		out = mutate.AppendManifests(out, mutate.IndexAddendum{Add: one, Descriptor: v1.Descriptor{Platform: d.Platform, Annotations: d.Annotations}})
	}
	if total == 0 {
		return Image{}, errNothing
	}
	return Image{many: out}, nil
}

var errNothing = fmt.Errorf("no layer of the image was to be changed: %w", errdefs.ErrFailedPrecondition)

func parsePlatform(s string) (*v1.Platform, error) {
	if s == "" {
		return nil, nil
	}
	p, err := v1.ParsePlatform(s)
	if err != nil {
		return nil, fmt.Errorf("platform %q: %v: %w", s, err, errdefs.ErrInvalidArgument)
	}
	return p, nil
}
