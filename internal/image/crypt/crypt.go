// Package crypt encrypts and decrypts layers of container images in the form
// of the OCI image encryption specification, as skopeo, buildah and imgcrypt
// write it. It promises that a key never appears in an error, that no call
// outlives its context, and that nothing is decrypted before a key of the node
// has opened the layer's own key.
//
// The cryptography is github.com/containers/ocicrypt's. The package knows
// nothing of registries or stores.
package crypt

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containers/ocicrypt/blockcipher"
	"github.com/containers/ocicrypt/config"
	"github.com/containers/ocicrypt/keywrap"
	"github.com/containers/ocicrypt/keywrap/jwe"
	"github.com/containers/ocicrypt/keywrap/pgp"
	"github.com/containers/ocicrypt/keywrap/pkcs11"
	"github.com/containers/ocicrypt/keywrap/pkcs7"
)

const (
	// Prefix begins all annotations of an encrypted layer.
	Prefix = "org.opencontainers.image.enc."

	annotationPublic   = Prefix + "pubopts"
	annotationKeys     = Prefix + "keys."
	annotationProvider = annotationKeys + "provider."

	suffix    = "+encrypted"
	suffixOld = "+enc" // before the media types of OCI
)

// Encrypted says whether a layer of this media type is encrypted.
func Encrypted(mediaType string) bool {
	return strings.HasSuffix(mediaType, suffix) || strings.HasSuffix(mediaType, suffixOld)
}

// Plain is the media type of the layer that comes out of an encrypted one.
func Plain(mediaType string) string {
	return strings.TrimSuffix(strings.TrimSuffix(mediaType, suffix), suffixOld)
}

// Sealed is the media type of an encrypted layer.
func Sealed(mediaType string) string { return mediaType + suffix }

// Schemes lists the ways in which a layer's key was wrapped: "jwe", "pgp",
// "pkcs7", "pkcs11", "provider.NAME".
func Schemes(annotations map[string]string) []string {
	var out []string
	for a := range annotations {
		if s, ok := strings.CutPrefix(a, annotationKeys); ok {
			out = append(out, s)
		}
	}
	return out
}

// LayerKey is what decrypts one layer. It prints as nothing.
type LayerKey struct{ private, public []byte }

// String hides the key from logs.
func (LayerKey) String() string { return "layer key" }

// GoString hides the key from %#v.
func (k LayerKey) GoString() string { return k.String() }

// Decrypt gives the plain bytes of a layer. The reader ends with an error in
// place of io.EOF when the bytes are not those that were encrypted: whoever
// uses them must read to the end before they count.
func (k LayerKey) Decrypt(sealed io.Reader) (io.Reader, error) {
	var o blockcipher.LayerBlockCipherOptions
	if json.Unmarshal(k.private, &o.Private) != nil || len(k.public) > 0 && json.Unmarshal(k.public, &o.Public) != nil {
		return nil, fmt.Errorf("what was wrapped is not a layer's key: %w", errdefs.ErrInvalidArgument)
	}
	h, err := blockcipher.NewLayerBlockCipherHandler()
	if err != nil {
		return nil, err
	}
	plain, _, err := h.Decrypt(sealed, o)
	if err != nil {
		return nil, fmt.Errorf("decrypt layer: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return &checked{r: plain}, nil
}

// checked names what an error at the end of a decrypted stream means.
type checked struct{ r io.Reader }

func (c *checked) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		err = fmt.Errorf("decrypted layer is not what was encrypted (%w): %w", err, errdefs.ErrDataLoss)
	}
	return n, err
}

// wrappers are the schemes that need no configuration.
func wrappers() map[string]keywrap.KeyWrapper {
	return map[string]keywrap.KeyWrapper{
		"jwe": jwe.NewKeyWrapper(), "pgp": pgp.NewKeyWrapper(), "pkcs7": pkcs7.NewKeyWrapper(), "pkcs11": pkcs11.NewKeyWrapper(),
	}
}

// Open finds a key of the node that opens the layer whose annotations these are.
func (k Keys) Open(ctx context.Context, annotations map[string]string) (LayerKey, error) {
	if len(Schemes(annotations)) == 0 {
		return LayerKey{}, fmt.Errorf("encrypted layer without a wrapped key, which no key can open: %w", errdefs.ErrInvalidArgument)
	}
	ring, err := k.load()
	if err != nil {
		return LayerKey{}, err
	}
	var why []string
	for scheme, wrapped := range k.each(annotations) {
		private, err := ring.unwrap(ctx, scheme, wrapped)
		if err == nil {
			public, err := base64.StdEncoding.DecodeString(annotations[annotationPublic])
			if err != nil {
				return LayerKey{}, fmt.Errorf("annotation %s is not base64: %w", annotationPublic, errdefs.ErrInvalidArgument)
			}
			return LayerKey{private: private, public: public}, nil
		}
		if ctx.Err() != nil {
			return LayerKey{}, fmt.Errorf("open layer with scheme %s: %w", scheme, ctx.Err())
		}
		why = append(why, fmt.Sprintf("%s: %v", scheme, err))
	}
	why = append(why, ring.unused...)
	return LayerKey{}, fmt.Errorf("no key of this node opens the image: %s: %w", strings.Join(why, "; "), errdefs.ErrPermissionDenied)
}

// each yields the wrapped keys of a layer by scheme, the providers last: they
// may have to ask far away.
func (k Keys) each(annotations map[string]string) func(func(string, []byte) bool) {
	return func(yield func(string, []byte) bool) {
		for _, far := range []bool{false, true} {
			for _, scheme := range sorted(Schemes(annotations)) {
				if strings.HasPrefix(scheme, "provider.") != far {
					continue
				}
				for _, one := range strings.SplitN(annotations[annotationKeys+scheme], ",", maxWrapped) {
					b, err := base64.StdEncoding.DecodeString(one)
					if err == nil && !yield(scheme, b) {
						return
					}
				}
			}
		}
	}
}

func (r *ring) unwrap(ctx context.Context, scheme string, wrapped []byte) ([]byte, error) {
	if name, ok := strings.CutPrefix(scheme, "provider."); ok {
		p, ok := r.providers[name]
		if !ok {
			return nil, fmt.Errorf("no key provider %q is configured in %s", name, orNothing(r.providersFile))
		}
		return p.unwrap(ctx, wrapped)
	}
	w, ok := wrappers()[scheme]
	if !ok {
		return nil, errors.New("unknown scheme")
	}
	tried := 0
	for _, parameters := range r.parameters {
		if w.NoPossibleKeys(parameters) {
			continue
		}
		tried++
		// One key at a time: a key that cannot be read must not hide the next.
		if private, err := w.UnwrapKey(&config.DecryptConfig{Parameters: parameters}, wrapped); err == nil {
			return private, nil
		}
	}
	if scheme == "pkcs11" && !hasPKCS11 {
		return nil, errNoPKCS11
	}
	if tried == 0 {
		return nil, fmt.Errorf("no such private key in %s", orNothing(r.folder))
	}
	if scheme == "pkcs11" {
		// What the library says has the whole URI in it, and so the PIN.
		return nil, fmt.Errorf("none of %d descriptions of tokens in %s opens it: either the key does not fit, or a token, its PIN or its module cannot be used", tried, r.folder)
	}
	return nil, fmt.Errorf("none of %d private keys in %s fits", tried, r.folder)
}

func orNothing(path string) string {
	if path == "" {
		return "the configuration"
	}
	return path
}
