package images

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
)

// Bulk builds the images by which pulls are timed: bench/large:1, a gibibyte
// of files in ten layers, and bench/small:1, three thousand small files in
// three. They compress about as well as images of programs do.
func (b *Builder) Bulk(context.Context) (Set, error) {
	const mib = 1 << 20
	shapes := map[string]bulk{
		"bench/large:1": {layers: 10, files: 64, size: 1024 * mib / 10 / 64},
		"bench/small:1": {layers: 3, files: 1000, size: 8 << 10},
	}
	set := make(Set)
	for ref, shape := range shapes {
		layers, err := shape.build(uint64(len(ref)) << 8)
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", ref, err)
		}
		if set[ref], err = image(v1.Config{Cmd: []string{"/none"}}, layers...); err != nil {
			return nil, fmt.Errorf("image %s: %w", ref, err)
		}
	}
	return set, nil
}

// bulk is the shape of an image.
type bulk struct{ layers, files, size int }

func (s bulk) build(seed uint64) ([]v1.Layer, error) {
	out, errs := make([]v1.Layer, s.layers), make([]error, s.layers)
	var wg sync.WaitGroup
	for i := range s.layers {
		wg.Go(func() { out[i], errs[i] = s.layer(i, seed+uint64(i)) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (s bulk) layer(index int, seed uint64) (v1.Layer, error) {
	l := &packed{plain: sha256.New()}
	zw, err := gzip.NewWriterLevel(&l.data, gzip.DefaultCompression)
	if err != nil {
		return nil, err
	}
	tw := tar.NewWriter(io.MultiWriter(zw, l.plain))
	text := newProse(seed)
	body := make([]byte, s.size)
	dir := fmt.Sprintf("data/%02d", index)
	for i := range s.files {
		if i%100 == 0 {
			h := tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("%s/%02d/", dir, i/100), Mode: 0o755, ModTime: epoch}
			if err := tw.WriteHeader(&h); err != nil {
				return nil, err
			}
		}
		text.fill(body)
		h := tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("%s/%02d/%04d", dir, i/100, i), Mode: 0o644, Size: int64(len(body)), ModTime: epoch}
		if err := tw.WriteHeader(&h); err != nil {
			return nil, err
		}
		if _, err := tw.Write(body); err != nil {
			return nil, err
		}
	}
	if err := tw.Close(); err != nil {
		return nil, err
	}
	return l, zw.Close()
}

// prose makes bytes that compress like the files of an image.
type prose struct {
	rng   *rand.ChaCha8
	dice  *rand.Rand
	words [][]byte
}

func newProse(seed uint64) *prose {
	var key [32]byte
	key[0], key[1] = byte(seed), byte(seed>>8)
	p := &prose{rng: rand.NewChaCha8(key)}
	p.dice = rand.New(p.rng)
	for range 4096 {
		w := make([]byte, 4+p.dice.IntN(12))
		for i := range w {
			w[i] = "etaoinshrdlucmfwypvbgkjqxz"[p.dice.IntN(26)]
		}
		p.words = append(p.words, append(w, ' '))
	}
	return p
}

// fill writes blocks of 4 KiB: one in eight is noise, the others are words.
func (p *prose) fill(b []byte) {
	for len(b) > 0 {
		block := b[:min(len(b), 4096)]
		b = b[len(block):]
		if p.dice.IntN(8) == 0 {
			_, _ = p.rng.Read(block)
			continue
		}
		for len(block) > 0 {
			n := p.dice.IntN(len(p.words))
			block = block[copy(block, p.words[n*n/len(p.words)]):]
		}
	}
}

// packed is a layer in its compressed form.
type packed struct {
	data  bytes.Buffer
	plain hash.Hash
}

func (l *packed) Digest() (v1.Hash, error) {
	sum := sha256.Sum256(l.data.Bytes())
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum[:])}, nil
}

func (l *packed) DiffID() (v1.Hash, error) {
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(l.plain.Sum(nil))}, nil
}

func (l *packed) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.data.Bytes())), nil
}

func (l *packed) Uncompressed() (io.ReadCloser, error) {
	return gzip.NewReader(bytes.NewReader(l.data.Bytes()))
}

func (l *packed) Size() (int64, error)                { return int64(l.data.Len()), nil }
func (l *packed) MediaType() (types.MediaType, error) { return types.DockerLayer, nil }
