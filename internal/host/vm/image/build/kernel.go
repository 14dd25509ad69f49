package build

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// Offsets of the boot protocol's header in a bzImage.
const (
	setupSectors  = 0x1f1
	magicAt       = 0x202
	payloadOffset = 0x248
	payloadLength = 0x24c
	headerEnd     = 0x250
)

// maxKernel bounds what a compressed kernel may grow to.
const maxKernel = 512 << 20

// bootable gives the form of a kernel that boots fastest: the ELF file that a
// bzImage carries compressed. A machine then starts it at its PVH entry, with
// no boot loader, no decompressor and no BIOS in between. What this package
// cannot unpack, or what has no such entry, stays as it is.
func bootable(kernel []byte) ([]byte, error) {
	if bytes.HasPrefix(kernel, []byte(elf.ELFMAG)) {
		return kernel, nil
	}
	if len(kernel) < headerEnd || string(kernel[magicAt:magicAt+4]) != "HdrS" {
		return nil, fmt.Errorf("neither a bzImage nor an ELF file: %w", errdefs.ErrInvalidArgument)
	}
	sectors := int(kernel[setupSectors])
	if sectors == 0 {
		sectors = 4
	}
	at := int64(sectors+1)*512 + int64(binary.LittleEndian.Uint32(kernel[payloadOffset:]))
	end := at + int64(binary.LittleEndian.Uint32(kernel[payloadLength:]))
	if end > int64(len(kernel)) || end-at < 8 {
		return nil, fmt.Errorf("the bzImage is cut off: its payload ends at byte %d of %d: %w", end, len(kernel), errdefs.ErrInvalidArgument)
	}
	vmlinux, err := decompress(kernel[at : end-4]) // the last four bytes are the size
	if errors.Is(err, errUnknownPacking) {
		return kernel, nil
	}
	if err != nil {
		return nil, fmt.Errorf("unpack the kernel: %w", err)
	}
	if !hasPVH(vmlinux) {
		return kernel, nil
	}
	return vmlinux, nil
}

var errUnknownPacking = errors.New("unknown packing")

func decompress(b []byte) ([]byte, error) {
	var r io.Reader
	var err error
	switch {
	case bytes.HasPrefix(b, []byte("\x7fELF")):
		return b, nil
	case bytes.HasPrefix(b, []byte{0x1f, 0x8b}):
		r, err = gzip.NewReader(bytes.NewReader(b))
	case bytes.HasPrefix(b, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		var d *zstd.Decoder
		if d, err = zstd.NewReader(bytes.NewReader(b), zstd.WithDecoderMaxMemory(maxKernel)); err == nil {
			defer d.Close()
			r = d
		}
	case bytes.HasPrefix(b, []byte{0x02, 0x21, 0x4c, 0x18}):
		r = lz4.NewReader(bytes.NewReader(b))
	default:
		return nil, errUnknownPacking
	}
	if err != nil {
		return nil, err
	}
	out, err := io.ReadAll(io.LimitReader(r, maxKernel))
	if len(out) == maxKernel {
		return nil, fmt.Errorf("it is larger than %d MiB: %w", maxKernel>>20, errdefs.ErrInvalidArgument)
	}
	return out, err
}

// notePVH is the type of Xen's ELF note with the 32-bit entry point.
const notePVH = 18

func hasPVH(vmlinux []byte) bool {
	f, err := elf.NewFile(bytes.NewReader(vmlinux))
	if err != nil {
		return false
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE || p.Filesz > 1<<20 {
			continue
		}
		notes, err := io.ReadAll(p.Open())
		if err != nil {
			return false
		}
		for len(notes) >= 12 {
			le := binary.LittleEndian
			name, desc, kind := align(le.Uint32(notes)), align(le.Uint32(notes[4:])), le.Uint32(notes[8:])
			if 12+name+desc > uint64(len(notes)) {
				break
			}
			if kind == notePVH && bytes.HasPrefix(notes[12:], []byte("Xen\x00")) {
				return true
			}
			notes = notes[12+name+desc:]
		}
	}
	return false
}

func align(n uint32) uint64 { return (uint64(n) + 3) &^ 3 }
