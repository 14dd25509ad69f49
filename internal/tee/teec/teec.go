// Package teec asks a trusted application for the memory of its TEE. The TEE
// client library is a vendor's code that may hang, crash or call exit, so it is
// loaded by a helper program, cloister-teec, and this package only talks with
// the helper: it starts it when it is needed, ends it when it does not answer
// in time, and says what happened.
//
// One question is under way at a time. It knows nothing of units and pods.
package teec

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
)

// Helper is the name of the helper program.
const Helper = "cloister-teec"

// Ways of login to the trusted application.
const (
	LoginPublic   = "public"
	LoginIdentify = "identify" // iTrustee's: the application sees the caller's path and user
)

// Options tell where the trusted application is and how it is reached.
type Options struct {
	// Program is the helper; empty is Helper beside this program, then in PATH. A
	// trusted application that knows its callers by path sees this one.
	Program string
	// Library is the TEE client library, a path or a name for the dynamic linker.
	Library string
	// UUID of the trusted application.
	UUID string
	// TAPath is the application's file, for iTrustee, where it is not in the
	// default place; empty where the TEE finds it by its UUID.
	TAPath string
	// Login is LoginPublic or LoginIdentify.
	Login string
	// Command is the number of the application's command that tells its memory.
	Command uint32
}

// Memory is what the trusted application told.
type Memory struct {
	TotalKiB int64 `json:"totalKiB"`
	FreeKiB  int64 `json:"freeKiB"`
}

var uuidForm = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)

// Check judges what can be judged without the library.
func (o Options) Check() error {
	if !uuidForm.MatchString(o.UUID) {
		return fmt.Errorf("ta_uuid is %q; a UUID is written 8-4-4-4-12 hexadecimal digits: %w", o.UUID, errdefs.ErrInvalidArgument)
	}
	if o.Login != LoginPublic && o.Login != LoginIdentify {
		return fmt.Errorf("login is %q; allowed are %q and %q: %w", o.Login, LoginPublic, LoginIdentify, errdefs.ErrInvalidArgument)
	}
	for name, path := range map[string]string{"library": o.Library, "ta_path": o.TAPath, "helper": o.Program} {
		if strings.ContainsAny(path, "\x00\n") || len(path) > 4095 {
			return fmt.Errorf("%s is not a path: %w", name, errdefs.ErrInvalidArgument)
		}
	}
	if o.Library == "" {
		return fmt.Errorf("library is empty; name the TEE client library, such as libteec.so: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// program finds the helper.
func (o Options) program() (string, error) {
	if o.Program != "" {
		return o.Program, nil
	}
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), Helper)
		if _, err := os.Stat(beside); err == nil {
			return beside, nil
		}
	}
	path, err := exec.LookPath(Helper)
	if err != nil {
		return "", fmt.Errorf("find %s beside this program or in PATH: %w; install it, or set helper in [device_plugin.trustzone]", Helper, errdefs.ErrNotFound)
	}
	return path, nil
}

// Client asks; it may be used from several goroutines.
type Client struct {
	o    Options
	turn chan *helper // holds the helper, or nil, while nobody asks
}

// New makes a client. The helper is started with the first question.
func New(o Options) (*Client, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	c := &Client{o: o, turn: make(chan *helper, 1)}
	c.turn <- nil
	return c, nil
}

// Memory asks the trusted application. The helper does not survive an answer
// that is late.
func (c *Client) Memory(ctx context.Context) (Memory, error) {
	var h *helper
	select {
	case h = <-c.turn:
	case <-ctx.Done():
		return Memory{}, fmt.Errorf("wait for the question before this one: %w", ctx.Err())
	}
	defer func() { c.turn <- h }()
	switch {
	case h == nil:
	case h.ended():
		h.end()
		h = nil
	case h.killed: // a second one would hang as well
		return Memory{}, fmt.Errorf("the TEE hangs: %s: %w", h.stuck(), errdefs.ErrUnavailable)
	}
	if h == nil {
		path, err := c.o.program()
		if err != nil {
			return Memory{}, err
		}
		if h, err = startHelper(path, c.o); err != nil {
			h = nil
			return Memory{}, err
		}
	}
	reply, err := h.ask(ctx, request{Op: opMemory})
	if err != nil {
		return Memory{}, fmt.Errorf("%w%s", err, h.end())
	}
	if reply.Error != nil {
		return Memory{}, reply.Error
	}
	if reply.Memory == nil || reply.Memory.TotalKiB < 0 || reply.Memory.FreeKiB < 0 {
		return Memory{}, fmt.Errorf("the helper's answer makes no sense: %w", errdefs.ErrInternal)
	}
	return *reply.Memory, nil
}

// Close ends the helper.
func (c *Client) Close() error {
	h := <-c.turn
	if h != nil {
		h.end()
	}
	c.turn <- h
	return nil
}
