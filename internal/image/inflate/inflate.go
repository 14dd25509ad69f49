// Package inflate decompresses gzip (RFC 1952, RFC 1951), as the layers of most
// images are, twice as fast as the libraries for Go: unpacking an image is
// mostly this. It promises to take what compress/gzip takes and to refuse what
// that refuses, to use a fixed amount of memory, and to check every sum; it is
// fuzzed against compress/gzip.
//
// What makes it fast: bits are taken from a 64-bit word that is refilled
// without a branch, a table entry tells all about a symbol at once, matches are
// copied in words, and the input always has so many bytes ahead that the inner
// loop need not look for its end.
package inflate

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
)

// ErrCorrupt is wrong data; a stream that is cut ends with io.ErrUnexpectedEOF.
var ErrCorrupt = errors.New("corrupt gzip stream")

const (
	inSize   = 64 << 10
	window   = 32 << 10
	outSize  = 4 * window
	maxMatch = 258
	slack    = 16 // bytes that a match copied in words may write too many
	ahead    = 32 // bytes of input that one turn of the inner loop may look at
)

// state says what comes next in the stream.
type state int

const (
	atHeader state = iota
	atBlock
	inStored
	inHuffman
	atTrailer
)

// Reader decompresses a stream of one or more gzip members.
type Reader struct {
	src io.Reader
	err error // of the stream, once all before it has been read

	in      [inSize + ahead]byte
	pos, n  int  // in[pos:n] is not in the bit buffer yet
	srcDone bool // in[n:] is zeros from here on
	bits    uint64
	nbits   uint

	out    [outSize + maxMatch + slack]byte
	r, w   int // out[r:w] is for the caller; up to a window before is history
	oldest int // where the history of this member begins
	sum    uint32
	size   uint32

	state  state
	last   bool // block
	stored int  // bytes left of a stored block
	lit    [litTable]entry
	dist   [distTable]entry
}

// NewReader reads the first header.
func NewReader(src io.Reader) (*Reader, error) {
	d := &Reader{src: src}
	if err := d.header(); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return d, nil
}

// Read implements io.Reader.
func (d *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for d.r == d.w {
		if d.err != nil {
			return 0, d.err
		}
		d.makeRoom()
		from := d.w
		d.err = d.step()
		made := d.out[from:d.w]
		d.sum, d.size = crc32.Update(d.sum, crc32.IEEETable, made), d.size+uint32(len(made))
	}
	n := copy(p, d.out[d.r:d.w])
	d.r += n
	return n, nil
}

// Close implements io.Closer. The source is its owner's.
func (d *Reader) Close() error { return nil }

// makeRoom moves the history to the front.
func (d *Reader) makeRoom() {
	if d.w <= outSize-window {
		return
	}
	copy(d.out[:window], d.out[d.w-window:d.w])
	d.oldest = max(0, d.oldest-(d.w-window))
	d.r, d.w = window, window
}

// step goes on until the output is full or a part of the stream ends.
func (d *Reader) step() error {
	switch d.state {
	case atHeader:
		return d.header()
	case atBlock:
		return d.block()
	case inStored:
		return d.copyStored()
	case inHuffman:
		return d.huffman()
	default:
		return d.trailer()
	}
}

// more makes at least ahead bytes lie before the position, zeros after the
// stream's end.
func (d *Reader) more() error {
	if d.n-d.pos >= ahead {
		return nil
	}
	if d.srcDone {
		if d.pos > d.n+8 { // the bit buffer holds eight bytes at most
			return io.ErrUnexpectedEOF
		}
		return nil
	}
	keep := min(d.pos, 8) // align may give back what is in the bit buffer
	d.n = copy(d.in[:], d.in[d.pos-keep:d.n])
	d.pos = keep
	for empty := 0; d.n-d.pos < ahead; {
		n, err := d.src.Read(d.in[d.n:inSize])
		d.n += n
		if errors.Is(err, io.EOF) {
			d.srcDone = true
			clear(d.in[d.n:])
			return nil
		}
		if err != nil {
			return err
		}
		if n > 0 {
			empty = 0
		} else if empty++; empty > 100 {
			return io.ErrNoProgress
		}
	}
	return nil
}

// refill fills the bit buffer to at least 56 bits.
func (d *Reader) refill() error {
	if err := d.more(); err != nil {
		return err
	}
	d.bits |= binary.LittleEndian.Uint64(d.in[d.pos:]) << d.nbits
	d.pos += int((63 - d.nbits) >> 3)
	d.nbits |= 56
	return nil
}

// overrun says whether more bits were taken than the stream has.
func (d *Reader) overrun() bool { return d.srcDone && d.pos-int(d.nbits>>3) > d.n }

// take gives up to 32 bits.
func (d *Reader) take(n uint) (uint32, error) {
	if d.nbits < n {
		if err := d.refill(); err != nil {
			return 0, err
		}
	}
	v := uint32(d.bits & (1<<n - 1))
	d.bits >>= n
	d.nbits -= n
	if d.overrun() {
		return 0, io.ErrUnexpectedEOF
	}
	return v, nil
}

// align drops bits up to the next byte and gives back to the input what the
// bit buffer holds beyond.
func (d *Reader) align() {
	d.pos -= int(d.nbits >> 3)
	d.bits, d.nbits = 0, 0
}

// block reads the header of a block.
func (d *Reader) block() error {
	if d.last {
		d.state = atTrailer
		return nil
	}
	h, err := d.take(3)
	if err != nil {
		return err
	}
	d.last = h&1 != 0
	switch h >> 1 {
	case 0:
		d.align()
		n, err := d.take(32)
		if err != nil {
			return err
		}
		if uint16(n) != ^uint16(n>>16) {
			return ErrCorrupt
		}
		d.align()
		d.stored, d.state = int(uint16(n)), inStored
	case 1:
		d.fixed()
		d.state = inHuffman
	case 2:
		if err := d.dynamic(); err != nil {
			return err
		}
		d.state = inHuffman
	default:
		return ErrCorrupt
	}
	return nil
}

// copyStored passes the bytes of a stored block on.
func (d *Reader) copyStored() error {
	for d.stored > 0 && d.w < outSize {
		if err := d.more(); err != nil {
			return err
		}
		n := min(d.stored, d.n-d.pos, outSize-d.w)
		if n <= 0 {
			return io.ErrUnexpectedEOF
		}
		copy(d.out[d.w:], d.in[d.pos:d.pos+n])
		d.pos, d.w, d.stored = d.pos+n, d.w+n, d.stored-n
	}
	if d.stored == 0 {
		d.state = atBlock
	}
	return nil
}

// huffman decodes symbols until the block ends or the output is full.
func (d *Reader) huffman() error { //nolint:funlen // in parts, its variables would not stay in registers
	bits, nbits, pos, w := d.bits, d.nbits, d.pos, d.w
	in, out := &d.in, &d.out
	for w < outSize {
		if d.n-pos < ahead {
			// Kept in variables of its own, and not in d, all this stays in registers.
			d.bits, d.nbits, d.pos, d.w = bits, nbits, pos, w
			if err := d.more(); err != nil {
				return err
			}
			pos = d.pos
		}
		bits |= binary.LittleEndian.Uint64(in[pos:]) << (nbits & 63)
		pos += int((63 - nbits) >> 3)
		nbits |= 56
		e := d.lit[bits&litMask]
		// Two literals at most come before what may be a match: 22 bits, and the
		// 20 of a length are there too.
		if e&isLiteral != 0 {
			bits >>= e & lenMask
			nbits -= uint(e & lenMask)
			out[w] = byte(e >> valueShift)
			w++
			e = d.lit[bits&litMask]
			if e&isLiteral != 0 {
				bits >>= e & lenMask
				nbits -= uint(e & lenMask)
				out[w] = byte(e >> valueShift)
				w++
				e = d.lit[bits&litMask]
			}
		}
		if e&isSpecial != 0 {
			if e&isSub == isSub {
				e = d.lit[e>>valueShift+entry(bits>>litBits)&(1<<(e>>extraShift&extraMask)-1)]
			}
			if e&isSpecial != 0 {
				bits >>= e & lenMask
				nbits -= uint(e & lenMask)
				d.bits, d.nbits, d.pos, d.w = bits, nbits, pos, w
				if e&isEnd != isEnd {
					return d.orCut(ErrCorrupt)
				}
				d.state = atBlock
				return d.orCut(nil)
			}
		}
		if e&isLiteral != 0 {
			bits >>= e & lenMask
			nbits -= uint(e & lenMask)
			out[w] = byte(e >> valueShift)
			w++
			continue
		}
		code, extra := e&lenMask, e>>extraShift&extraMask
		length := int(e>>valueShift&valueMask) + int(bits>>code&(1<<extra-1))
		bits >>= code + extra
		nbits -= uint(code + extra)
		// A distance takes 28 bits.
		bits |= binary.LittleEndian.Uint64(in[pos:]) << (nbits & 63)
		pos += int((63 - nbits) >> 3)
		nbits |= 56
		e = d.dist[bits&distMask]
		if e&isSub == isSub {
			e = d.dist[e>>valueShift+entry(bits>>distBits)&(1<<(e>>extraShift&extraMask)-1)]
		}
		code, extra = e&lenMask, e>>extraShift&extraMask
		distance := int(e>>valueShift&valueMask) + int(bits>>code&(1<<extra-1))
		bits >>= code + extra
		nbits -= uint(code + extra)
		if e&isSpecial != 0 || distance > w-d.oldest {
			d.bits, d.nbits, d.pos, d.w = bits, nbits, pos, w
			return d.orCut(ErrCorrupt)
		}
		w = match(out, w, distance, length)
	}
	d.bits, d.nbits, d.pos, d.w = bits, nbits, pos, w
	return d.orCut(nil)
}

// orCut tells a stream that is cut from one that is wrong.
func (d *Reader) orCut(err error) error {
	if d.overrun() {
		return io.ErrUnexpectedEOF
	}
	return err
}

// match copies what was written before, which may overlap what is written.
func match(out *[outSize + maxMatch + slack]byte, w, distance, length int) int {
	from, end := w-distance, w+length
	switch {
	case distance >= 8:
		for w < end {
			binary.LittleEndian.PutUint64(out[w:], binary.LittleEndian.Uint64(out[from:]))
			w, from = w+8, from+8
		}
	case distance == 1:
		word := uint64(out[from]) * 0x0101010101010101
		for w < end {
			binary.LittleEndian.PutUint64(out[w:], word)
			w += 8
		}
	default:
		for w < end {
			out[w] = out[from]
			w, from = w+1, from+1
		}
	}
	return end
}
