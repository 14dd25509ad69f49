package elf

import "encoding/binary"

type arm64 struct{}

func (arm64) machine() uint16 { return 183 }

func word(code []byte, w uint32) []byte { return binary.LittleEndian.AppendUint32(code, w) }

// load is one movz and three movk (16 bytes).
func (arm64) load(code []byte, n int, v uint64) []byte {
	reg := uint32(8)
	if n >= 0 {
		reg = uint32(n)
	}
	for i := range uint32(4) {
		op := uint32(0xf2800000) // movk
		if i == 0 {
			op = 0xd2800000 // movz
		}
		code = word(code, op|i<<21|uint32(v>>(16*i)&0xffff)<<5|reg)
	}
	return code
}

func (arm64) patch(code []byte, at int, v uint64) {
	for i := range 4 {
		p := code[at+4*i:]
		w := binary.LittleEndian.Uint32(p)
		binary.LittleEndian.PutUint32(p, w&^(0xffff<<5)|uint32(v>>(16*i)&0xffff)<<5)
	}
}

func (arm64) call(code []byte) []byte { return word(code, 0xd4000001) }

// result is "mov xn, x0" or "neg xn, x0".
func (arm64) result(code []byte, n int, negate bool) []byte {
	if negate {
		return word(code, 0xcb0003e0|uint32(n))
	}
	return word(code, 0xaa0003e0|uint32(n))
}

// jumpIf is "cbz x0" or "tbnz x0, #63".
func (arm64) jumpIf(code []byte, negative bool) []byte {
	if negative {
		return word(code, 0xb7f80000)
	}
	return word(code, 0xb4000000)
}

func (arm64) jumpAlways(code []byte) []byte { return word(code, 0x14000000) }

func (arm64) patchJump(code []byte, end, target int) {
	p := code[end-4:]
	w := binary.LittleEndian.Uint32(p)
	off := uint32(target-(end-4)) / 4
	if int32(target-(end-4)) < 0 {
		off = uint32(int32(target-(end-4)) / 4)
	}
	switch w >> 24 {
	case 0x14:
		w |= off & 0x3ffffff
	case 0xb4:
		w |= off & 0x7ffff << 5
	default:
		w |= off & 0x3fff << 5
	}
	binary.LittleEndian.PutUint32(p, w)
}

// storeResult is "mov x9, #addr; str w0, [x9]" through the loading code of
// argument register 9, which no call uses.
func (a arm64) storeResult(code []byte, addr uint64) ([]byte, int) {
	at := len(code)
	return word(a.load(code, 9, addr), 0xb9000120), at
}
