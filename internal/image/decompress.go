package image

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"

	"cloister.dev/internal/image/inflate"
)

// maxWindow is the most that a zstd layer may make this process hold. It is
// what "zstd --long" writes; the levels up to 19 need 8 MiB.
const maxWindow = 128 << 20

// decompress looks at the first bytes: media types are what a tool claims, and
// the digest of the archive, which is checked, decides in the end.
func decompress(r *bufio.Reader) (io.ReadCloser, error) {
	head, err := r.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		return inflate.NewReader(r)
	case isZstd(head):
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	case bytes.HasPrefix(head, []byte("BZh")), bytes.HasPrefix(head, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		return nil, fmt.Errorf("layer is compressed with bzip2 or xz, which images must not be; push it with gzip or zstd: %w", errdefs.ErrNotImplemented)
	}
	return io.NopCloser(r), nil
}

// isZstd knows zstd's frame, and the skippable frame that may come before it.
func isZstd(head []byte) bool {
	return bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}) ||
		len(head) >= 4 && head[0]&0xf0 == 0x50 && bytes.Equal(head[1:4], []byte{0x2a, 0x4d, 0x18})
}

const (
	aheadChunk = 128 << 10
	aheadDepth = 3
)

// readAhead reads from another reader in a goroutine of its own, a few chunks
// ahead, so that decompressing and writing a layer keep two cores busy. Close
// waits for the goroutine.
type readAhead struct {
	full  chan chunk
	free  chan []byte
	stop  chan struct{}
	done  sync.WaitGroup
	once  sync.Once
	chunk chunk // the one being read
	rest  []byte
}

type chunk struct {
	data []byte
	err  error
}

func newReadAhead(r io.Reader) *readAhead {
	a := &readAhead{full: make(chan chunk, aheadDepth), free: make(chan []byte, aheadDepth), stop: make(chan struct{})}
	for range aheadDepth {
		a.free <- make([]byte, aheadChunk)
	}
	a.done.Go(func() { a.fill(r) })
	return a
}

func (a *readAhead) fill(r io.Reader) {
	for {
		var b []byte
		select {
		case b = <-a.free:
		case <-a.stop:
			return
		}
		n, err := io.ReadFull(r, b[:aheadChunk])
		if errors.Is(err, io.ErrUnexpectedEOF) && n > 0 {
			// Either the end or a cut stream; reading on tells which.
			err = nil
		}
		a.full <- chunk{b[:n], err} // never blocks: there are no more chunks than places
		if err != nil {
			return
		}
	}
}

func (a *readAhead) Read(p []byte) (int, error) {
	for len(a.rest) == 0 {
		if a.chunk.err != nil {
			return 0, a.chunk.err
		}
		if a.chunk.data != nil {
			a.free <- a.chunk.data
		}
		a.chunk = <-a.full
		a.rest = a.chunk.data
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// Close ends the reading. Reads after it are not allowed.
func (a *readAhead) Close() {
	a.once.Do(func() { close(a.stop) })
	a.done.Wait()
}
