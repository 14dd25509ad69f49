// Package native calls a TEE client library (GlobalPlatform TEE Client API)
// that is loaded at run time, without cgo. It is for the helper process alone:
// what the library does, it does to the whole process.
//
// The structures of the API are laid out by hand in memory that the garbage
// collector does not know. Contexts and sessions differ between vendors and are
// the library's own affair, so they get more room than any vendor needs; the
// operation is the same for iTrustee and OP-TEE on 64-bit machines, and others
// are refused.
package native

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"runtime"
	"strings"
	"unsafe"

	"github.com/ebitengine/purego"
	"golang.org/x/sys/unix"

	"cloister.dev/internal/tee/teec"
)

// Login methods and kinds of parameters.
const (
	loginPublic    = 0
	loginIdentify  = 7 // TEEC_LOGIN_IDENTIFY of iTrustee
	valueOutput    = 0x2
	tempMemoryOut  = 0x6
	memoryQuestion = tempMemoryOut | valueOutput<<12 // parameter 0 and parameter 3
)

// Where things lie in the arena.
const (
	contextAt   = 0
	taPathAt    = 8 // ta_path in iTrustee's TEEC_Context, after a descriptor
	sessionAt   = 4096
	operationAt = 8192
	resultAt    = 9216
	uuidAt      = 9472
	originAt    = 9600
	pathAt      = 10240
	arenaSize   = 16384
)

// Layout of TEEC_Operation.
const (
	opStarted    = 0
	opParamTypes = 4
	opParams     = 8
	paramSize    = 24
)

// library is a loaded library with the functions that are needed.
type library struct {
	initialize, finalize, open, close, invoke uintptr
	o                                         teec.Options
	arena                                     []byte
}

// Open loads the library and gives the function that asks the trusted
// application for its memory: a session for each question, as nothing else
// notices a daemon that was restarted.
func Open(o teec.Options) (func() (teec.Memory, error), error) {
	if unsafe.Sizeof(uintptr(0)) != 8 {
		return nil, errors.New("TEE client libraries of 32-bit machines are not supported")
	}
	if err := o.Check(); err != nil {
		return nil, err
	}
	// dlerror tells the thread that failed, and no other.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	handle, err := purego.Dlopen(o.Library, purego.RTLD_NOW|purego.RTLD_LOCAL)
	if err != nil {
		return nil, fmt.Errorf("%w; set library in [device_plugin.trustzone]", err)
	}
	l := &library{o: o}
	for name, at := range map[string]*uintptr{
		"TEEC_InitializeContext": &l.initialize, "TEEC_FinalizeContext": &l.finalize,
		"TEEC_OpenSession": &l.open, "TEEC_CloseSession": &l.close, "TEEC_InvokeCommand": &l.invoke,
	} {
		if *at, err = purego.Dlsym(handle, name); err != nil {
			// The handle is worth nothing, and what closing it says is worth less.
			_ = purego.Dlclose(handle)
			return nil, fmt.Errorf("%s has no %s; it is not a TEE client library", o.Library, name)
		}
	}
	if l.arena, err = unix.Mmap(-1, 0, arenaSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE); err != nil {
		return nil, fmt.Errorf("memory for the library: %w", err)
	}
	return l.memory, nil
}

func (l *library) at(offset int) uintptr { return uintptr(unsafe.Pointer(&l.arena[offset])) }

func (l *library) memory() (teec.Memory, error) {
	clear(l.arena)
	if err := l.putUUID(); err != nil {
		return teec.Memory{}, err
	}
	if code := call(l.initialize, 0, l.at(contextAt)); code != 0 {
		return teec.Memory{}, &teec.Error{Call: "TEEC_InitializeContext", Code: code}
	}
	defer purego.SyscallN(l.finalize, l.at(contextAt))
	if l.o.TAPath != "" {
		copy(l.arena[pathAt:arenaSize-1], l.o.TAPath)
		l.putPointer(contextAt+taPathAt, l.at(pathAt))
	}
	login := uintptr(loginIdentify)
	if l.o.Login == teec.LoginPublic {
		login = loginPublic
	}
	l.put32(operationAt+opStarted, 1)
	if code := call(l.open, l.at(contextAt), l.at(sessionAt), l.at(uuidAt), login, 0, l.at(operationAt), l.at(originAt)); code != 0 {
		return teec.Memory{}, &teec.Error{Call: "TEEC_OpenSession", Code: code, Origin: l.get32(originAt)}
	}
	defer purego.SyscallN(l.close, l.at(sessionAt))
	return l.question()
}

// question asks for two 64-bit figures, total and free, and the size of what
// they count.
func (l *library) question() (teec.Memory, error) {
	clear(l.arena[operationAt:resultAt])
	const param0, param3 = operationAt + opParams, operationAt + opParams + 3*paramSize
	l.put32(operationAt+opStarted, 1)
	l.put32(operationAt+opParamTypes, memoryQuestion)
	l.putPointer(param0, l.at(resultAt))
	l.putPointer(param0+8, 16)
	if code := call(l.invoke, l.at(sessionAt), uintptr(l.o.Command), l.at(operationAt), l.at(originAt)); code != 0 {
		return teec.Memory{}, &teec.Error{Call: "TEEC_InvokeCommand", Code: code, Origin: l.get32(originAt)}
	}
	total, free := binary.NativeEndian.Uint64(l.arena[resultAt:]), binary.NativeEndian.Uint64(l.arena[resultAt+8:])
	unit := uint64(l.get32(param3))
	t, err := kib(total, unit)
	if err != nil {
		return teec.Memory{}, err
	}
	f, err := kib(free, unit)
	return teec.Memory{TotalKiB: t, FreeKiB: f}, err
}

// kib rounds down as the original does: the figure first, then times the unit.
func kib(n, unit uint64) (int64, error) {
	n /= 1024
	if unit == 0 || n > math.MaxInt64/unit {
		return 0, &teec.Error{Call: "TEEC_InvokeCommand", Text: fmt.Sprintf("the trusted application told %d KiB times %d, which makes no sense", n, unit)}
	}
	return int64(n * unit), nil
}

// putUUID writes TEEC_UUID: 32, 16 and 16 bits as numbers, then eight bytes.
func (l *library) putUUID() error {
	b, err := hex.DecodeString(strings.ReplaceAll(l.o.UUID, "-", ""))
	if err != nil || len(b) != 16 {
		return fmt.Errorf("ta_uuid %q is not a UUID", l.o.UUID)
	}
	l.put32(uuidAt, binary.BigEndian.Uint32(b))
	binary.NativeEndian.PutUint16(l.arena[uuidAt+4:], binary.BigEndian.Uint16(b[4:]))
	binary.NativeEndian.PutUint16(l.arena[uuidAt+6:], binary.BigEndian.Uint16(b[6:]))
	copy(l.arena[uuidAt+8:], b[8:])
	return nil
}

func (l *library) put32(at int, v uint32) { binary.NativeEndian.PutUint32(l.arena[at:], v) }
func (l *library) get32(at int) uint32    { return binary.NativeEndian.Uint32(l.arena[at:]) }

func (l *library) putPointer(at int, p uintptr) {
	binary.NativeEndian.PutUint64(l.arena[at:], uint64(p))
}

// call makes a call that answers with a TEEC_Result.
func call(f uintptr, args ...uintptr) uint32 {
	r, _, _ := purego.SyscallN(f, args...)
	return uint32(r)
}
