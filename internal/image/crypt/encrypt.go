package crypt

import (
	"context"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containers/ocicrypt/blockcipher"
	"github.com/containers/ocicrypt/config"
	"github.com/containers/ocicrypt/config/pkcs11config"
	"github.com/containers/ocicrypt/utils"
	"github.com/opencontainers/go-digest"
	"go.yaml.in/yaml/v3"
)

// Recipients are those whose keys shall open a layer.
type Recipients struct {
	parameters map[string][][]byte
	providers  map[string]provider
	chosen     []string // providers
}

// ParseRecipients takes what skopeo takes: "jwe:FILE" with a public key,
// "pkcs7:FILE" with a certificate, "pkcs11:FILE" with a public key or a PKCS11
// description, "provider:NAME[:PARAMETER]" of the providers file, and
// "pgp:FILE:NAME", the name or address of a key in an exported key ring.
func ParseRecipients(list []string, providers string) (*Recipients, error) {
	r := &Recipients{parameters: map[string][][]byte{}}
	var err error
	if r.providers, err = readProviders(providers); err != nil {
		return nil, err
	}
	for _, one := range list {
		if err := r.add(one); err != nil {
			return nil, fmt.Errorf("recipient %q: %w", one, err)
		}
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("encrypt for whom? name a recipient: %w", errdefs.ErrInvalidArgument)
	}
	return r, nil
}

func (r *Recipients) add(one string) error {
	scheme, value, _ := strings.Cut(one, ":")
	put := func(key string, b []byte) { r.parameters[key] = append(r.parameters[key], b) }
	if scheme == "provider" {
		name, parameter, _ := strings.Cut(value, ":")
		if _, ok := r.providers[name]; !ok {
			return fmt.Errorf("no such key provider is configured: %w", errdefs.ErrNotFound)
		}
		if parameter == "" {
			parameter = "Enabled"
		}
		put(name, []byte(parameter))
		r.chosen = append(r.chosen, name)
		return nil
	}
	file, who, _ := strings.Cut(value, ":")
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	switch {
	case scheme == "jwe" && utils.IsPublicKey(b):
		put("pubkeys", b)
	case scheme == "pkcs7" && utils.IsCertificate(b):
		put("x509s", b)
	case scheme == "pkcs11" && utils.IsPkcs11PublicKey(b):
		put("pkcs11-yamls", b)
	case scheme == "pkcs11" && utils.IsPublicKey(b):
		put("pkcs11-pubkeys", b)
	case scheme == "pgp" && who != "":
		if ring := r.parameters["gpg-pubkeyringfile"]; len(ring) > 0 {
			b = append(ring[0], b...)
		}
		r.parameters["gpg-pubkeyringfile"] = [][]byte{b}
		put("gpg-recipients", []byte(who))
	default:
		return fmt.Errorf("want jwe:PUBLIC-KEY, pkcs7:CERTIFICATE, pkcs11:PUBLIC-KEY, pgp:KEYRING:NAME or provider:NAME: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// Encrypt gives the encrypted bytes of a layer. When they have been read to
// their end, annotations gives what the layer's descriptor has to carry.
func (r *Recipients) Encrypt(plain io.Reader, plainDigest digest.Digest) (sealed io.Reader, annotations func(context.Context) (map[string]string, error), err error) {
	h, err := blockcipher.NewLayerBlockCipherHandler()
	if err != nil {
		return nil, nil, err
	}
	sealed, finish, err := h.Encrypt(plain, blockcipher.AES256CTR)
	if err != nil {
		return nil, nil, fmt.Errorf("encrypt layer: %w", err)
	}
	return sealed, func(ctx context.Context) (map[string]string, error) {
		o, err := finish()
		if err != nil {
			return nil, fmt.Errorf("encrypt layer: %w", err)
		}
		o.Private.Digest = plainDigest
		private, err := json.Marshal(o.Private)
		if err != nil {
			return nil, err
		}
		public, err := json.Marshal(o.Public)
		if err != nil {
			return nil, err
		}
		out, err := r.wrap(ctx, private)
		if err != nil {
			return nil, err
		}
		out[annotationPublic] = base64.StdEncoding.EncodeToString(public)
		return out, nil
	}, nil
}

// wrap encrypts a layer's key for every recipient.
func (r *Recipients) wrap(ctx context.Context, key []byte) (map[string]string, error) {
	ec := &config.EncryptConfig{Parameters: r.parameters}
	if r.parameters["pkcs11-yamls"] != nil {
		c, err := pkcs11config.GetUserPkcs11Config()
		if err != nil {
			return nil, err
		}
		y, err := yaml.Marshal(c)
		if err != nil {
			return nil, err
		}
		ec.DecryptConfig.Parameters = map[string][][]byte{"pkcs11-config": {y}}
	}
	out := make(map[string]string)
	for scheme, w := range wrappers() {
		b, err := w.WrapKeys(ec, key)
		if errors.Is(err, rsa.ErrMessageTooLong) {
			return nil, fmt.Errorf("wrap the layer's key with scheme %s: the RSA key is too short for it, take one of 3072 bits or more: %w", scheme, errdefs.ErrInvalidArgument)
		}
		if err != nil {
			return nil, fmt.Errorf("wrap the layer's key with scheme %s: %w", scheme, err)
		}
		if len(b) > 0 {
			out[w.GetAnnotationID()] = base64.StdEncoding.EncodeToString(b)
		}
	}
	for _, name := range r.chosen {
		b, err := r.providers[name].wrap(ctx, r.parameters, key)
		if err != nil {
			return nil, fmt.Errorf("wrap the layer's key with provider %s: %w", name, err)
		}
		out[annotationProvider+name] = base64.StdEncoding.EncodeToString(b)
	}
	if len(out) == 0 {
		return nil, errors.New("no recipient took the layer's key")
	}
	return out, nil
}
