// Package stock lets a stock containerd use the resident shim: it is what
// happens when containerd runs containerd-shim-cloister-vm-v2. It promises that
// all pods of one containerd meet in one resident shim, which is started when
// the first one comes, and that a shim which containerd believes dead leaves
// nothing of its sandbox.
//
// It knows nothing of machines; options of a handler are opaque to it.
package stock

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	sandboxapi "github.com/containerd/containerd/api/runtime/sandbox/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	runtimeopts "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"cloister.dev/internal/host"
)

// Call is how containerd runs a shim's program.
type Call struct {
	Backend   string // from the program's name
	ID        string // of the sandbox
	Namespace string
	Address   string // containerd's
	State     string // folder of all resident shims
	Program   string // cloister-shim, to start one
}

// Backend tells which backend a program's name asks for; "" is none.
func Backend(program string) string {
	name, ours := strings.CutPrefix(filepath.Base(program), "containerd-shim-cloister")
	name, shim := strings.CutSuffix(name, "-v2")
	if !ours || !shim {
		return ""
	}
	if name == "" {
		return "container"
	}
	backend, _ := strings.CutPrefix(name, "-")
	return backend
}

// dir is where the resident shim of this containerd and namespace lives. Its
// path is short for the sockets in it.
func (c Call) dir() string {
	sum := sha256.Sum256([]byte(c.Address + "\x00" + c.Namespace))
	return filepath.Join(c.State, hex.EncodeToString(sum[:6]), c.Backend)
}

// Options finds the handler's options in what containerd writes to the
// program's standard input: a message of its own since 2.3, the bare options
// before. path and body are those of the handler's table in containerd's
// configuration; a path is the administrator's own file.
func Options(input io.Reader) (path string, body []byte, err error) {
	const most = 4 << 20
	b, err := io.ReadAll(io.LimitReader(input, most))
	if err != nil {
		return "", nil, fmt.Errorf("read containerd's request: %w", err)
	}
	var o runtimeopts.Options
	var params bootapi.BootstrapParams
	if proto.Unmarshal(b, &params) == nil && params.InstanceID != "" {
		if _, err := params.FindExtension(&o); err != nil {
			return "", nil, fmt.Errorf("read the handler's options: %w", err)
		}
		return o.ConfigPath, o.ConfigBody, nil
	}
	var old anypb.Any
	if len(b) == 0 || proto.Unmarshal(b, &old) != nil || !strings.HasSuffix(old.TypeUrl, string(o.ProtoReflect().Descriptor().FullName())) {
		return "", nil, nil //nolint:nilerr // options of another kind are none
	}
	if err := proto.Unmarshal(old.Value, &o); err != nil {
		return "", nil, fmt.Errorf("read the handler's options: %w", err)
	}
	return o.ConfigPath, o.ConfigBody, nil
}

// Info writes what the shim is.
func (c Call) Info(out io.Writer, version string) error {
	b, err := proto.Marshal(&types.RuntimeInfo{Name: "io.containerd.cloister-" + c.Backend + ".v2", Version: &types.RuntimeVersion{Version: version}})
	if err != nil {
		return err
	}
	_, err = out.Write(b)
	return err
}

// startTime bounds the time from starting the resident shim to its first
// answer.
const startTime = 15 * time.Second

// Start makes sure that the resident shim runs and writes to out where it is.
func (c Call) Start(ctx context.Context, out io.Writer) error {
	conn, err := c.dialOrStart(ctx)
	if err != nil {
		return err
	}
	conn.Close()
	return json.NewEncoder(out).Encode(map[string]any{"version": 3, "address": "unix://" + host.Socket(c.dir()), "protocol": "ttrpc"})
}

// Delete ends what is left of a sandbox, and writes how a task ended that is
// gone.
func (c Call) Delete(ctx context.Context, out io.Writer) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", host.Socket(c.dir()))
	if err == nil {
		defer conn.Close()
		client := ttrpc.NewClient(conn)
		defer client.Close()
		_, err = sandboxapi.NewTTRPCSandboxClient(client).ShutdownSandbox(ctx, &sandboxapi.ShutdownSandboxRequest{SandboxID: c.ID})
		if err = errgrpc.ToNative(err); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("end sandbox %s: %w", c.ID, err)
		}
	}
	b, err := proto.Marshal(&taskapi.DeleteResponse{ExitStatus: 128 + uint32(syscall.SIGKILL), ExitedAt: timestamppb.Now()})
	if err != nil {
		return err
	}
	_, err = out.Write(b)
	return err
}

func (c Call) dialOrStart(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	path := host.Socket(c.dir())
	if conn, err := d.DialContext(ctx, "unix", path); err == nil {
		return conn, nil
	}
	if err := c.spawn(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		conn, err := d.DialContext(ctx, "unix", path)
		if err == nil {
			return conn, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("no answer from cloister-shim on %s within %v (its log: %s): %w", path, startTime, c.logFile(), errors.Join(err, ctx.Err()))
		}
	}
}

func (c Call) logFile() string { return filepath.Join(c.dir(), "shim.log") }

// spawn starts a keeper, which does nothing when another one is alive.
func (c Call) spawn() error {
	if err := os.MkdirAll(c.dir(), 0o711); err != nil {
		return fmt.Errorf("make the shim's folder: %w", err)
	}
	log, err := os.OpenFile(c.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open the shim's log: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(c.Program, "keep", "--state", c.dir(), "--backend", c.Backend)
	cmd.Args[0] = "cloister-shim"
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the resident shim: %w", err)
	}
	return cmd.Process.Release()
}
