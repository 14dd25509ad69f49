package teec

import (
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
)

// Error is what the library, or loading it, answered.
type Error struct {
	Call   string `json:"call"`           // such as TEEC_OpenSession
	Code   uint32 `json:"code,omitempty"` // 0: the call could not even be made
	Origin uint32 `json:"origin,omitempty"`
	Text   string `json:"text,omitempty"`
}

// Codes of the GlobalPlatform TEE client API, and two of iTrustee.
const (
	CodeGeneric       uint32 = 0xffff0000
	CodeAccessDenied  uint32 = 0xffff0001
	CodeBadParameters uint32 = 0xffff0006
	CodeItemNotFound  uint32 = 0xffff0008
	CodeNotSupported  uint32 = 0xffff000a
	CodeOutOfMemory   uint32 = 0xffff000c
	CodeBusy          uint32 = 0xffff000d
	CodeCommunication uint32 = 0xffff000e
	CodeTargetDead    uint32 = 0xffff3024
)

// meaning says what a code means for the administrator.
func meaning(code uint32) string {
	switch code {
	case CodeGeneric:
		return "the TEE says no more than that it failed"
	case CodeAccessDenied:
		return "the trusted application does not take this caller; it knows its callers by path and user, see helper and login"
	case CodeBadParameters:
		return "the trusted application does not know the question; is ta_uuid the memory application's?"
	case CodeItemNotFound:
		return "the TEE has no trusted application of this UUID; check ta_uuid and ta_path"
	case CodeNotSupported:
		return "the TEE does not support it"
	case CodeOutOfMemory:
		return "the TEE is out of memory"
	case CodeBusy:
		return "the TEE is busy"
	case CodeCommunication:
		return "the TEE's daemon cannot be reached; is teecd running?"
	case CodeTargetDead:
		return "the trusted application died"
	}
	return "a code of the vendor's"
}

func (e *Error) Error() string {
	if e.Code == 0 {
		return fmt.Sprintf("%s: %s", e.Call, e.Text)
	}
	return fmt.Sprintf("%s gave %#08x, origin %d: %s", e.Call, e.Code, e.Origin, meaning(e.Code))
}

// Unwrap gives the class of the error.
func (e *Error) Unwrap() error {
	switch e.Code {
	case 0, CodeAccessDenied, CodeBadParameters, CodeNotSupported:
		return errdefs.ErrFailedPrecondition
	case CodeItemNotFound:
		return errdefs.ErrNotFound
	case CodeOutOfMemory:
		return errdefs.ErrResourceExhausted
	}
	return errdefs.ErrUnavailable
}

func asError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return &Error{Call: "load the TEE client library", Text: err.Error()}
}
