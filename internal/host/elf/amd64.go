package elf

import "encoding/binary"

type amd64 struct{}

func (amd64) machine() uint16 { return 62 }

// load is "movabs reg, imm64" (10 bytes); the immediate is at 2.
func (amd64) load(code []byte, n int, v uint64) []byte {
	op := [...][2]byte{{0x48, 0xbf}, {0x48, 0xbe}, {0x48, 0xba}, {0x49, 0xba}, {0x49, 0xb8}, {0x49, 0xb9}} // rdi rsi rdx r10 r8 r9
	r := [2]byte{0x48, 0xb8}                                                                               // rax
	if n >= 0 {
		r = op[n]
	}
	return binary.LittleEndian.AppendUint64(append(code, r[0], r[1]), v)
}

func (amd64) patch(code []byte, at int, v uint64) {
	binary.LittleEndian.PutUint64(code[at+2:], v)
}

func (amd64) call(code []byte) []byte { return append(code, 0x0f, 0x05) }

// result is "mov rdi, rax" and, to negate, "neg rdi".
func (amd64) result(code []byte, n int, negate bool) []byte {
	code = append(code, 0x48, 0x89, 0xc0|byte([...]int{7, 6, 2}[n]))
	if negate {
		code = append(code, 0x48, 0xf7, 0xd8|byte([...]int{7, 6, 2}[n]))
	}
	return code
}

// jumpIf is "test rax, rax" and "jz"/"js rel32".
func (amd64) jumpIf(code []byte, negative bool) []byte {
	cc := byte(0x84)
	if negative {
		cc = 0x88
	}
	return append(code, 0x48, 0x85, 0xc0, 0x0f, cc, 0, 0, 0, 0)
}

func (amd64) jumpAlways(code []byte) []byte { return append(code, 0xe9, 0, 0, 0, 0) }

func (amd64) patchJump(code []byte, end, target int) {
	binary.LittleEndian.PutUint32(code[end-4:], uint32(int32(target-end)))
}

// storeResult is "movabs rdi, addr; mov [rdi], eax".
func (a amd64) storeResult(code []byte, addr uint64) ([]byte, int) {
	at := len(code)
	return append(a.load(code, 0, addr), 0x89, 0x07), at
}
