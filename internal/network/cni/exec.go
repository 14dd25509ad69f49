package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"cloister.dev/internal/network/cni/plugin"
)

const (
	// builtinPrefix marks the path of a plugin that runs inside the process.
	builtinPrefix = "builtin:"
	// programTime bounds a program whose caller set no deadline.
	programTime = 2 * time.Minute
	// killTime is how long the pipes of a killed program may stay open.
	killTime  = time.Second
	maxOutput = 4 << 20
	maxStderr = 4 << 10
)

// executor implements libcni's Exec: the standard types inside the process,
// others as programs.
type executor struct {
	version.PluginDecoder
	plugins *plugin.Set
	path    []string
}

var _ invoke.Exec = (*executor)(nil)

// FindInPath implements invoke.Exec.
func (e *executor) FindInPath(typ string, paths []string) (string, error) {
	if e.plugins.Has(typ) {
		return builtinPrefix + typ, nil
	}
	path, err := invoke.FindInPath(typ, paths)
	if err != nil {
		return "", fmt.Errorf("plugin %q is neither built in nor in %s: install it there: %w",
			typ, strings.Join(paths, ", "), errdefs.ErrFailedPrecondition)
	}
	return path, nil
}

// ExecPlugin implements invoke.Exec.
func (e *executor) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	typ, inside := strings.CutPrefix(path, builtinPrefix)
	if !inside {
		return run(ctx, path, stdin, environ)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	out, err := e.plugins.Run(ctx, typ, e.call(stdin, environ))
	if errors.Is(err, plugin.ErrNeedsProgram) {
		program, missing := invoke.FindInPath(typ, e.path)
		if missing != nil {
			return nil, fmt.Errorf("plugin %s is built in, but %w, which is not in %s: install it there or remove the keys: %w",
				typ, err, strings.Join(e.path, ", "), errdefs.ErrFailedPrecondition)
		}
		return run(ctx, program, stdin, environ)
	}
	return out, err
}

// call reads the protocol's variables.
func (e *executor) call(stdin []byte, environ []string) plugin.Call {
	c := plugin.Call{Stdin: stdin, Exec: e, Path: e.path}
	for _, kv := range environ {
		k, v, _ := strings.Cut(kv, "=")
		switch k {
		case "CNI_COMMAND":
			c.Command = v
		case "CNI_CONTAINERID":
			c.ContainerID = v
		case "CNI_NETNS":
			c.NetNS = v
		case "CNI_IFNAME":
			c.IfName = v
		case "CNI_ARGS":
			c.Args = v
		}
	}
	return c
}

// run runs a program and all that it starts, no longer than ctx allows.
func run(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, programTime)
		defer cancel()
	}
	name := filepath.Base(path)
	for try := 0; ; try++ {
		stdout, stderr := &limited{max: maxOutput}, &limited{max: maxStderr}
		cmd := exec.CommandContext(ctx, path)
		cmd.Env = environ
		cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), stdout, stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
		cmd.WaitDelay = killTime
		err := cmd.Run()
		switch {
		case ctx.Err() != nil:
			return nil, fmt.Errorf("plugin %s (%s) did not finish and was killed: see its log: %w", name, path, ctx.Err())
		case errors.Is(err, syscall.ETXTBSY) && try < 5:
			// It is being installed.
			select {
			case <-time.After(100 * time.Millisecond << try):
			case <-ctx.Done():
			}
			continue
		case err != nil && !errors.Is(err, exec.ErrWaitDelay):
			return nil, failure(name, path, err, stdout, stderr)
		case stdout.cut:
			return nil, fmt.Errorf("plugin %s (%s) printed more than %d bytes", name, path, maxOutput)
		}
		if needsResult(environ) && !isResult(stdout.Bytes()) {
			return nil, fmt.Errorf("plugin %s (%s) printed %s instead of a CNI result: is it a CNI plugin, of a version that knows this configuration?",
				name, path, excerpt(stdout.Bytes()))
		}
		return stdout.Bytes(), nil
	}
}

// failure is the error that a program reported, in the protocol's form if it
// kept to it.
func failure(name, path string, err error, stdout, stderr *limited) error {
	var e types.Error
	if isObject(stdout.Bytes()) && json.Unmarshal(stdout.Bytes(), &e) == nil && (e.Msg != "" || e.Code != 0) {
		e.Msg = fmt.Sprintf("plugin %s: %s", name, e.Msg)
		return &e
	}
	said := stderr.Bytes()
	if len(bytes.TrimSpace(said)) == 0 {
		said = stdout.Bytes()
	}
	if len(bytes.TrimSpace(said)) == 0 {
		return fmt.Errorf("plugin %s (%s) failed without a message: %w", name, path, err)
	}
	return fmt.Errorf("plugin %s (%s) failed: %w: %s", name, path, err, excerpt(said))
}

func needsResult(environ []string) bool {
	for _, kv := range environ {
		if kv == "CNI_COMMAND=ADD" || kv == "CNI_COMMAND=VERSION" {
			return true
		}
	}
	return false
}

func isObject(b []byte) bool {
	b = bytes.TrimSpace(b)
	return len(b) > 0 && b[0] == '{' && json.Valid(b)
}

// isResult tells whether it is worth to be parsed as a result: an object, with
// no null where the library expects something.
func isResult(b []byte) bool {
	var shape struct {
		Interfaces []json.RawMessage `json:"interfaces"`
		IPs        []json.RawMessage `json:"ips"`
		Routes     []json.RawMessage `json:"routes"`
	}
	if !isObject(b) || json.Unmarshal(b, &shape) != nil {
		return false
	}
	return !slices.ContainsFunc(slices.Concat(shape.Interfaces, shape.IPs, shape.Routes), func(m json.RawMessage) bool { return string(m) == "null" })
}

// excerpt quotes the beginning of what a program printed.
func excerpt(b []byte) string {
	const most = 300
	if len(b) > most {
		return fmt.Sprintf("%q…", b[:most])
	}
	return fmt.Sprintf("%q", bytes.TrimSpace(b))
}

// limited keeps the beginning of what is written to it.
type limited struct {
	buf bytes.Buffer // not embedded: its ReadFrom would know no limit
	max int
	cut bool
}

func (l *limited) Bytes() []byte { return l.buf.Bytes() }

func (l *limited) Write(p []byte) (int, error) {
	room := max(l.max-l.buf.Len(), 0)
	if room < len(p) {
		l.cut = true
	}
	l.buf.Write(p[:min(room, len(p))])
	return len(p), nil
}
