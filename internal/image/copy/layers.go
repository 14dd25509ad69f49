package copy

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"

	"cloister.dev/internal/image/crypt"
)

// Layer is a changed layer, in a file.
type Layer struct {
	v1.Layer  // the one it was made of
	file      string
	digest    v1.Hash
	size      int64
	mediaType types.MediaType
	notes     map[string]string
}

// The bytes are the file's, the diff ID is the original's.

// Digest is that of the file.
func (l *Layer) Digest() (v1.Hash, error) { return l.digest, nil }

// Size is that of the file.
func (l *Layer) Size() (int64, error) { return l.size, nil }

// Compressed reads the file.
func (l *Layer) Compressed() (io.ReadCloser, error) { return os.Open(l.file) }

// MediaType is the changed one.
func (l *Layer) MediaType() (types.MediaType, error) { return l.mediaType, nil }

// Encrypt returns a change that encrypts layers for recipients: all, or those
// whose number is listed, a negative one counting from the last. Files are made
// in dir.
func Encrypt(r *crypt.Recipients, only []int, dir string) Change {
	return func(ctx context.Context, i, n int, l v1.Layer, d v1.Descriptor) (*Layer, error) {
		if len(only) > 0 && !slices.Contains(only, i) && !slices.Contains(only, i-n) || crypt.Encrypted(string(d.MediaType)) {
			return nil, nil
		}
		plain, err := l.Compressed()
		if err != nil {
			return nil, err
		}
		defer plain.Close()
		sealed, annotate, err := r.Encrypt(plain, digest.Digest(d.Digest.String()))
		if err != nil {
			return nil, err
		}
		out := &Layer{Layer: l, mediaType: types.MediaType(crypt.Sealed(string(ociType(d.MediaType))))}
		if err := out.write(dir, sealed); err != nil {
			return nil, err
		}
		out.notes, err = annotate(ctx)
		return out, err
	}
}

// Decrypt returns a change that decrypts the encrypted layers.
func Decrypt(k crypt.Keys, dir string) Change {
	return func(ctx context.Context, _, _ int, l v1.Layer, d v1.Descriptor) (*Layer, error) {
		if !crypt.Encrypted(string(d.MediaType)) {
			return nil, nil
		}
		key, err := k.Open(ctx, d.Annotations)
		if err != nil {
			return nil, err
		}
		sealed, err := l.Compressed()
		if err != nil {
			return nil, err
		}
		defer sealed.Close()
		plain, err := key.Decrypt(sealed)
		if err != nil {
			return nil, err
		}
		out := &Layer{Layer: l, mediaType: types.MediaType(crypt.Plain(string(d.MediaType)))}
		return out, out.write(dir, plain)
	}
}

func (l *Layer) write(dir string, r io.Reader) (err error) {
	f, err := os.CreateTemp(dir, "layer-") // mode 0600
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	sum := sha256.New()
	if l.size, err = io.Copy(io.MultiWriter(f, sum), r); err != nil {
		return err
	}
	l.file, l.digest = f.Name(), v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum.Sum(nil))}
	return nil
}

// ociType is the OCI name of a layer type: encrypted layers have no other.
func ociType(t types.MediaType) types.MediaType {
	switch t {
	case types.DockerLayer:
		return types.OCILayer
	case types.DockerUncompressedLayer:
		return types.OCIUncompressedLayer
	case types.DockerForeignLayer:
		return types.OCIRestrictedLayer
	case "application/vnd.docker.image.rootfs.diff.tar.zstd":
		return types.OCILayerZStd
	}
	return t
}

// converted is an image with other layers and the same configuration.
type converted struct {
	v1.Image
	layers   []v1.Layer
	manifest *v1.Manifest
	raw      []byte
}

func convertImage(ctx context.Context, base v1.Image, change Change) (v1.Image, int, error) {
	m, err := base.Manifest()
	if err != nil {
		return nil, 0, err
	}
	layers, err := base.Layers()
	if err != nil {
		return nil, 0, err
	}
	if len(layers) != len(m.Layers) {
		return nil, 0, fmt.Errorf("%d layers in the manifest, %d in the configuration: %w", len(m.Layers), len(layers), errdefs.ErrInvalidArgument)
	}
	m = m.DeepCopy()
	m.MediaType = types.OCIManifestSchema1
	if m.Config.MediaType == types.DockerConfigJSON {
		m.Config.MediaType = types.OCIConfigJSON
	}
	n := 0
	for i := range layers {
		changed, err := change(ctx, i, len(layers), layers[i], m.Layers[i])
		if err != nil {
			return nil, 0, fmt.Errorf("layer %s: %w", m.Layers[i].Digest, err)
		}
		m.Layers[i].MediaType = ociType(m.Layers[i].MediaType)
		if changed == nil {
			continue
		}
		n++
		layers[i] = changed
		notes := maps.Clone(m.Layers[i].Annotations)
		maps.DeleteFunc(notes, func(k, _ string) bool { return strings.HasPrefix(k, crypt.Prefix) })
		if notes == nil {
			notes = make(map[string]string)
		}
		maps.Copy(notes, changed.notes)
		m.Layers[i] = v1.Descriptor{MediaType: changed.mediaType, Size: changed.size, Digest: changed.digest, Annotations: notes}
	}
	raw, err := json.Marshal(m)
	return &converted{base, layers, m, raw}, n, err
}

// What follows overrides what the layers change of an image.

func (c *converted) Layers() ([]v1.Layer, error)             { return c.layers, nil }
func (c *converted) MediaType() (types.MediaType, error)     { return types.OCIManifestSchema1, nil }
func (c *converted) Manifest() (*v1.Manifest, error)         { return c.manifest, nil }
func (c *converted) RawManifest() ([]byte, error)            { return c.raw, nil }
func (c *converted) Size() (int64, error)                    { return int64(len(c.raw)), nil }
func (c *converted) Digest() (v1.Hash, error)                { return partial.Digest(c) }
func (c *converted) LayerByDiffID(v1.Hash) (v1.Layer, error) { return nil, errdefs.ErrNotImplemented }

func (c *converted) LayerByDigest(h v1.Hash) (v1.Layer, error) {
	for i, d := range c.manifest.Layers {
		if d.Digest == h {
			return c.layers[i], nil
		}
	}
	if h == c.manifest.Config.Digest {
		return partial.ConfigLayer(c)
	}
	return nil, fmt.Errorf("layer %s: %w", h, errdefs.ErrNotFound)
}

// LayerInfo is what there is to say of one layer.
type LayerInfo struct {
	Platform  string   `json:"platform"`
	Digest    string   `json:"digest"`
	MediaType string   `json:"mediaType"`
	Size      int64    `json:"size"`
	Encrypted bool     `json:"encrypted"`
	Schemes   []string `json:"schemes,omitempty"`
	// Opens says whether a key opens it: "yes", or why not.
	Opens string `json:"opens,omitempty"`
}

// Inspect lists the layers of an image, and tries keys where they are given.
func Inspect(ctx context.Context, img Image, keys *crypt.Keys) ([]LayerInfo, error) {
	if img.one != nil {
		return inspect(ctx, img.one, "", keys)
	}
	m, err := img.many.IndexManifest()
	if err != nil {
		return nil, err
	}
	var out []LayerInfo
	for _, d := range m.Manifests {
		if !d.MediaType.IsImage() {
			continue
		}
		one, err := img.many.Image(d.Digest)
		if err != nil {
			return nil, err
		}
		platform := ""
		if d.Platform != nil {
			platform = d.Platform.String()
		}
		list, err := inspect(ctx, one, platform, keys)
		if err != nil {
			return nil, err
		}
		out = append(out, list...)
	}
	return out, nil
}

func inspect(ctx context.Context, img v1.Image, platform string, keys *crypt.Keys) ([]LayerInfo, error) {
	m, err := img.Manifest()
	if err != nil {
		return nil, err
	}
	out := make([]LayerInfo, 0, len(m.Layers))
	for _, d := range m.Layers {
		l := LayerInfo{Platform: platform, Digest: d.Digest.String(), MediaType: string(d.MediaType), Size: d.Size,
			Encrypted: crypt.Encrypted(string(d.MediaType)), Schemes: crypt.Schemes(d.Annotations)}
		slices.Sort(l.Schemes)
		if l.Encrypted && keys != nil {
			l.Opens = "yes"
			if _, err := keys.Open(ctx, d.Annotations); err != nil {
				l.Opens = err.Error()
			}
		}
		out = append(out, l)
	}
	return out, nil
}
