// Package elf assembles programs of a few hundred bytes for the machine that
// it runs on: a holder of a PID namespace, and probes that run inside a
// container without any image. A program is a list of system calls; there is
// no stack, no heap and no library, so a running one costs two pages.
//
// It knows nothing of containers.
package elf

import (
	"encoding/binary"
	"fmt"
	"runtime"
)

// base is where the program is mapped: one page, readable and executable, or
// writable where a system call stores a result.
const base = 0x400000

const headSize = 64 + 56 // ELF header and one program header

// Arg is an argument of a system call.
type Arg struct {
	value uint64
	data  []byte // when not nil: the argument is its address
}

// Int is a number as an argument.
func Int[T ~int | ~int32 | ~uint32 | ~uint64 | ~uintptr](v T) Arg { return Arg{value: uint64(v)} }

// Data is an argument that points to a copy of b.
func Data(b []byte) Arg { return Arg{data: b} }

// Str is an argument that points to a string with its final zero.
func Str(s string) Arg { return Arg{data: append([]byte(s), 0)} }

// Program collects code and the data it points to.
type Program struct {
	asm  assembler
	code []byte
	// fixups are places in code that hold the number of a piece of data.
	data   []byte
	fixups []fixup
	labels map[string]int
	jumps  []jump
}

type fixup struct{ at, offset int }
type jump struct {
	at    int
	label string
}

// assembler is what differs between machines.
type assembler interface {
	machine() uint16
	// load puts a 64-bit number into argument register n; reg syscallReg is
	// the number of the call. The number's place is found by patch.
	load(code []byte, n int, v uint64) []byte
	patch(code []byte, at int, v uint64)
	call(code []byte) []byte
	// result moves the last call's result into argument register n.
	result(code []byte, n int, negate bool) []byte
	// jumpIf appends a jump taken when the last result is zero (or negative).
	jumpIf(code []byte, negative bool) []byte
	jumpAlways(code []byte) []byte
	patchJump(code []byte, end, target int)
	// storeResult writes the low 32 bits of the last result to an address.
	storeResult(code []byte, addr uint64) (out []byte, addrAt int)
}

const syscallReg = -1

// New gives an empty program for this machine, or an error on machines that
// the package does not know.
func New() (*Program, error) {
	p := &Program{labels: map[string]int{}}
	switch runtime.GOARCH {
	case "amd64":
		p.asm = amd64{}
	case "arm64":
		p.asm = arm64{}
	default:
		return nil, fmt.Errorf("no tiny programs for %s", runtime.GOARCH)
	}
	return p, nil
}

// Call appends a system call.
func (p *Program) Call(nr int, args ...Arg) *Program {
	for i, a := range args {
		at := len(p.code)
		p.code = p.asm.load(p.code, i, a.value)
		if a.data != nil {
			p.fixups = append(p.fixups, fixup{at, p.place(a.data)})
		}
	}
	p.code = p.asm.load(p.code, syscallReg, uint64(nr))
	p.code = p.asm.call(p.code)
	return p
}

func (p *Program) place(b []byte) int {
	for len(p.data)%8 != 0 {
		p.data = append(p.data, 0)
	}
	at := len(p.data)
	p.data = append(p.data, b...)
	return at
}

// ExitWithErrno ends the program with 0 when the last call's result was not
// negative, else with the error number.
func (p *Program) ExitWithErrno(exit int) *Program {
	p.jump(true, "errno")
	p.Call(exit, Int(0))
	p.Label("errno")
	p.code = p.asm.result(p.code, 0, true)
	p.code = p.asm.load(p.code, syscallReg, uint64(exit))
	p.code = p.asm.call(p.code)
	return p
}

// IfZero continues at label when the last result is zero.
func (p *Program) IfZero(label string) *Program { return p.jump(false, label) }

// IfNegative continues at label when the last result is an error.
func (p *Program) IfNegative(label string) *Program { return p.jump(true, label) }

func (p *Program) jump(negative bool, label string) *Program {
	p.code = p.asm.jumpIf(p.code, negative)
	p.jumps = append(p.jumps, jump{len(p.code), label})
	return p
}

// Goto continues at label.
func (p *Program) Goto(label string) *Program {
	p.code = p.asm.jumpAlways(p.code)
	p.jumps = append(p.jumps, jump{len(p.code), label})
	return p
}

// Label names this place.
func (p *Program) Label(name string) *Program {
	p.labels[name] = len(p.code)
	return p
}

// WriteResult writes the last result, four bytes, to file descriptor fd.
func (p *Program) WriteResult(write, fd int) *Program {
	off := p.place(make([]byte, 4))
	var at int
	p.code, at = p.asm.storeResult(p.code, 0)
	p.fixups = append(p.fixups, fixup{at, off})
	p.Call(write, Int(fd), Arg{}, Int(4))
	// The address argument of the call just made is the same cell.
	p.fixups = append(p.fixups, fixup{p.argAt(1, 3), off})
	return p
}

// argAt finds where argument i of the last call, which had n, is loaded.
func (p *Program) argAt(i, n int) int {
	size := len(p.asm.load(nil, 0, 0))
	tail := len(p.asm.load(nil, syscallReg, 0)) + len(p.asm.call(nil))
	return len(p.code) - tail - (n-i)*size
}

// Bytes gives the ELF file.
func (p *Program) Bytes() []byte {
	code := append([]byte(nil), p.code...)
	for len(code)%8 != 0 {
		code = append(code, 0)
	}
	dataAt := uint64(base + headSize + len(code))
	for _, f := range p.fixups {
		p.asm.patch(code, f.at, dataAt+uint64(f.offset))
	}
	for _, j := range p.jumps {
		p.asm.patchJump(code, j.at, p.labels[j.label])
	}
	size := uint64(headSize + len(code) + len(p.data))
	le := binary.LittleEndian
	out := make([]byte, headSize, size)
	copy(out, "\x7fELF\x02\x01\x01") // 64 bits, little endian
	le.PutUint16(out[16:], 2)        // ET_EXEC
	le.PutUint16(out[18:], p.asm.machine())
	le.PutUint32(out[20:], 1)
	le.PutUint64(out[24:], base+headSize) // entry
	le.PutUint64(out[32:], 64)            // program headers
	le.PutUint16(out[52:], 64)
	le.PutUint16(out[54:], 56)
	le.PutUint16(out[56:], 1)
	ph := out[64:]
	le.PutUint32(ph, 1)     // PT_LOAD
	le.PutUint32(ph[4:], 7) // readable, writable (for results), executable
	le.PutUint64(ph[16:], base)
	le.PutUint64(ph[24:], base)
	le.PutUint64(ph[32:], size)
	le.PutUint64(ph[40:], size)
	le.PutUint64(ph[48:], 0x1000)
	out = append(out, code...)
	return append(out, p.data...)
}
