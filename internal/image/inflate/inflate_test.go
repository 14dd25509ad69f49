package inflate

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"testing/iotest"

	kgzip "github.com/klauspost/compress/gzip"
)

// compare decompresses with this package and with compress/gzip.
func compare(t *testing.T, b []byte) {
	t.Helper()
	const most = 4 << 20
	read := func(r io.Reader, err error) ([]byte, error) {
		if err != nil {
			return nil, err
		}
		return io.ReadAll(io.LimitReader(r, most))
	}
	want, wantErr := read(gzip.NewReader(bytes.NewReader(b)))
	sources := map[string]io.Reader{"whole": bytes.NewReader(b), "data with EOF": iotest.DataErrReader(bytes.NewReader(b))}
	if len(b) < 10_000 { // slow
		sources["bytes"] = iotest.OneByteReader(bytes.NewReader(b))
	}
	for name, src := range sources {
		got, err := read(NewReader(src))
		if (err == nil) != (wantErr == nil) {
			t.Fatalf("%s: error %v, compress/gzip says %v; %d and %d bytes", name, err, wantErr, len(got), len(want))
		}
		if err == nil && !bytes.Equal(got, want) {
			t.Fatalf("%s: %d bytes, want %d", name, len(got), len(want))
		}
		if err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("%s: error %v", name, err)
		}
	}
}

// samples compress in different ways.
func samples() map[string][]byte {
	rng := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, 150_000)
	for i := range noise {
		noise[i] = byte(rng.Uint32())
	}
	var prose, runs bytes.Buffer
	for range 30_000 {
		fmt.Fprintf(&prose, "%x ", rng.IntN(1<<uint(1+rng.IntN(12))))
	}
	for runs.Len() < 200_000 {
		runs.Write(bytes.Repeat([]byte{byte(rng.IntN(4))}, 1+rng.IntN(1000)))
		runs.Write(noise[:1+rng.IntN(20)])
	}
	skewed := make([]byte, 150_000) // codes of 15 bits
	for i := range skewed {
		skewed[i] = byte(rng.ExpFloat64() * 8)
	}
	return map[string][]byte{
		"empty": {}, "one": {1}, "noise": noise, "zeros": make([]byte, 400_000), "prose": prose.Bytes(), "runs": runs.Bytes(), "skewed": skewed,
		"periods": []byte(strings.Repeat("ab", 500) + strings.Repeat("abc", 500) + strings.Repeat("abcdefg", 500) + strings.Repeat("abcdefgh", 5000)),
	}
}

func pack(t testing.TB, b []byte, level int) []byte {
	t.Helper()
	var buf bytes.Buffer
	w, err := gzip.NewWriterLevel(&buf, level)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestAgainstStandardLibrary(t *testing.T) {
	for name, b := range samples() {
		t.Run(name, func(t *testing.T) {
			for _, level := range []int{gzip.NoCompression, gzip.HuffmanOnly, 1, 6, 9} {
				z := pack(t, b, level)
				compare(t, z)
				compare(t, append(bytes.Clone(z), z...))                 // two members
				compare(t, append(bytes.Clone(z), 0, 0, 0))              // and something
				compare(t, append(bytes.Clone(z), "not gzip at all"...)) // else
			}
			var fast bytes.Buffer
			w := kgzip.NewWriter(&fast)
			if _, err := w.Write(b); err != nil {
				t.Fatal(err)
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			compare(t, fast.Bytes())
		})
	}
}

// Every cut and every flipped bit is noticed, as compress/gzip notices it.
func TestDamage(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for name, b := range samples() {
		z := pack(t, b[:min(len(b), 3000)], 6)
		for range 30 {
			compare(t, z[:rng.IntN(len(z))])
			bad := bytes.Clone(z)
			bad[rng.IntN(len(bad))] ^= 1 << rng.IntN(8)
			compare(t, bad)
		}
		for n := range len(z) {
			if r, err := NewReader(bytes.NewReader(z[:n])); err == nil {
				if _, err := io.Copy(io.Discard, r); !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Fatalf("%s cut at %d of %d: %v", name, n, len(z), err)
				}
			}
		}
	}
}

func TestHeaders(t *testing.T) {
	z := pack(t, []byte("hello"), 6)
	with := func(flags byte, fields ...byte) []byte {
		h := append([]byte{0x1f, 0x8b, 8, flags, 0, 0, 0, 0, 0, 0}, fields...)
		return append(h, z[10:]...)
	}
	for name, b := range map[string][]byte{
		"name": with(8, 'n', 0), "comment": with(16, 'c', 0), "both": with(24, 'n', 0, 'c', 0), "extra": with(4, 2, 0, 'a', 'b'),
		"sum": with(2, 0, 0), "endless name": with(8, bytes.Repeat([]byte{'n'}, 600)...), "cut extra": with(4, 255, 255), "method": {0x1f, 0x8b, 7, 0, 0, 0, 0, 0, 0, 0},
	} {
		t.Run(name, func(t *testing.T) { compare(t, b) })
	}
}

func FuzzInflate(f *testing.F) {
	for _, b := range samples() {
		f.Add(pack(f, b[:min(len(b), 2000)], 6))
		f.Add(pack(f, b[:min(len(b), 500)], gzip.HuffmanOnly))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		compare(t, b)
		// What follows a valid header reaches deeper.
		compare(t, append([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0}, b...))
	})
}

func BenchmarkInflate(b *testing.B) {
	mixed, err := os.ReadFile("/proc/self/exe") // a program, as images hold many
	if err != nil {
		b.Fatal(err)
	}
	z := pack(b, mixed, 6)
	for name, open := range map[string]func(io.Reader) (io.Reader, error){
		"this":      func(r io.Reader) (io.Reader, error) { return NewReader(r) },
		"klauspost": func(r io.Reader) (io.Reader, error) { return kgzip.NewReader(r) },
		"standard":  func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) },
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(mixed)))
			for range b.N {
				r, err := open(bytes.NewReader(z))
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, r); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
