package shim

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
)

// external is one third-party shim process: the shim of one sandbox.
type external struct {
	dialer
	address string
	logs    io.Closer // our end of the shim's log FIFO
}

func (c *Client) newExternal(id, bundle, address string) *external {
	e := &external{address: address}
	e.connect = func(ctx context.Context) (*conn, error) { return dialExternal(ctx, address) }
	logs, err := c.openShimLog(id, bundle)
	if err != nil {
		c.log.Warn("what a shim says is not heard", "sandbox", id, "err", err)
	}
	e.logs = logs
	return e
}

func (e *external) close() {
	e.dialer.close()
	if e.logs != nil {
		// Nobody could do anything about an error.
		_ = e.logs.Close()
	}
}

// errGone is what calls to a shim that has ended answer. Its socket was
// listening before anybody knew of it and is never listened to again, so that
// there is nothing to wait for.
var errGone = fmt.Errorf("its shim has ended: %w", errdefs.ErrNotFound)

func dialExternal(ctx context.Context, address string) (*conn, error) {
	c, err := dial(ctx, address)
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w (%w)", errGone, err)
	}
	return c, err
}

// What is in a sandbox's folder, which is its shim's bundle: the spec is there
// from before the shim is started, the address from after.
const (
	groupSpecFile = "config.json"
	bootstrapFile = "bootstrap.json"
)

// startExternal runs the shim's start command in the sandbox's folder and
// connects to the address that it answers. When it fails, endExternal finds
// what is left.
func (c *Client) startExternal(ctx context.Context, h *Handler, id, bundle string) (*external, error) {
	if err := writeGroupSpec(id, bundle); err != nil {
		return nil, err
	}
	boot, err := c.runStart(ctx, h, id, bundle)
	if err != nil && ctx.Err() == nil { // it failed by itself, there is no shim
		err = errors.Join(err, os.Remove(filepath.Join(bundle, groupSpecFile)))
	}
	if err != nil {
		return nil, err
	}
	data, err := json.Marshal(boot)
	if err == nil {
		err = writeWhole(filepath.Join(bundle, bootstrapFile), data)
	}
	if err != nil {
		return nil, fmt.Errorf("note the address of the shim: %w", err)
	}
	e := c.newExternal(id, bundle, boot.Address)
	c.mu.Lock()
	c.externals[id] = e
	c.mu.Unlock()
	return e, nil
}

// writeWhole writes a file that is there as a whole or not at all.
func writeWhole(path string, data []byte) error {
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// runStart runs the start command. A repeat gets the address of the shim that
// is running.
func (c *Client) runStart(ctx context.Context, h *Handler, id, bundle string) (*bootapi.BootstrapResult, error) {
	// Shims open this FIFO for writing and would wait for a reader.
	logs, err := c.openShimLog(id, bundle)
	if err != nil {
		return nil, err
	}
	defer logs.Close()
	boot := &bootapi.BootstrapParams{
		InstanceID: id, Namespace: containerdNamespace, ContainerdVersion: "2.4.2", SocketDir: proto.String(c.socketDir()),
		ContainerdGrpcAddress: c.o.GRPCAddress, ContainerdTtrpcAddress: c.o.EventsAddress, ContainerdBinary: c.self,
	}
	if h.Runtime.ShimCgroup != "" { // the one option that a shim needs before its first task
		if err := boot.AddExtension(h.foreignOptions(TaskRequest{})); err != nil {
			return nil, fmt.Errorf("encode the handler's options: %w", err)
		}
	}
	params, err := proto.Marshal(boot)
	if err != nil {
		return nil, err
	}
	out, err := c.runShim(ctx, h, bundle, bytes.NewReader(params), c.shimArgs(id, "start")...)
	if err != nil {
		return nil, err
	}
	return parseBootstrap(out)
}

// runShim runs a command of the handler's shim in the sandbox's folder and
// gives what it printed.
func (c *Client) runShim(ctx context.Context, h *Handler, bundle string, stdin io.Reader, args ...string) ([]byte, error) {
	path, err := h.shimPath()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir = bundle
	cmd.Env = append(os.Environ(), "GOMAXPROCS=2", "MAX_SHIM_VERSION=3",
		"TTRPC_ADDRESS="+c.o.EventsAddress, "GRPC_ADDRESS="+c.o.GRPCAddress, "NAMESPACE="+containerdNamespace)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = leftOpen
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	began := time.Now()
	err = cmd.Run()
	action := args[len(args)-1]
	c.log.Debug("command of a shim", "action", action, "bundle", bundle, "took", time.Since(began), "err", err, "says", firstBytes(stderr.Bytes()))
	if err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		return nil, fmt.Errorf("%s %s (handler %q): %w: %s", path, action, h.Name, err, firstBytes(stderr.Bytes()))
	}
	return stdout.Bytes(), nil
}

// longestSocketDir leaves room for the names that shims give their sockets, 64
// characters, in the 107 that the kernel takes.
const longestSocketDir = 42

// socketDir is where external shims make their sockets; those of a state
// folder with a long name are in a folder that is named after it.
func (c *Client) socketDir() string {
	dir := filepath.Join(c.o.State, "s")
	if len(dir) <= longestSocketDir {
		return dir
	}
	sum := sha256.Sum256([]byte(dir))
	return fmt.Sprintf("/run/cloister-shims-%x", sum[:8])
}

func (c *Client) shimArgs(id, action string) []string {
	return []string{"-namespace", containerdNamespace, "-address", c.o.GRPCAddress, "-publish-binary", c.self, "-id", id, action}
}

// parseBootstrap reads what a shim's start command printed: the protobuf
// answer of the bootstrap protocol, its older JSON form, or a bare address.
func parseBootstrap(out []byte) (*bootapi.BootstrapResult, error) {
	var res bootapi.BootstrapResult
	if err := proto.Unmarshal(out, &res); err != nil || res.Address == "" {
		res = bootapi.BootstrapResult{}
		if err := json.Unmarshal(out, &res); err != nil {
			res = bootapi.BootstrapResult{Version: 2, Protocol: "ttrpc", Address: string(bytes.TrimSpace(out))}
		}
	}
	if res.Protocol != "ttrpc" || !strings.HasPrefix(res.Address, "unix://") {
		return nil, fmt.Errorf("shim answered protocol %q at %q; only ttrpc on a unix socket is supported: %w",
			res.Protocol, firstBytes([]byte(res.Address)), errdefs.ErrNotImplemented)
	}
	if res.Version < 3 {
		return nil, fmt.Errorf("shim speaks task API version %d, version 3 is needed: %w", res.Version, errdefs.ErrNotImplemented)
	}
	return &res, nil
}

// writeGroupSpec leaves a config.json that makes containerd's runc shim group
// the sandbox's containers in one process.
func writeGroupSpec(id, bundle string) error {
	spec := specs.Spec{Version: specs.Version, Annotations: map[string]string{
		"io.kubernetes.cri.sandbox-id":     id,
		"io.kubernetes.cri.container-type": "sandbox",
	}}
	data, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	if err := writeWhole(filepath.Join(bundle, groupSpecFile), data); err != nil {
		return fmt.Errorf("write the sandbox's spec for its shim: %w", err)
	}
	return nil
}

// openShimLog makes the FIFO into which a shim writes its own log lines and
// passes them to ours. It is opened read-write so that the shim's opening of
// it does not wait for us.
func (c *Client) openShimLog(id, bundle string) (io.Closer, error) {
	path := filepath.Join(bundle, "log")
	if err := syscall.Mkfifo(path, 0o600); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make the shim's log FIFO: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open the shim's log FIFO: %w", err)
	}
	go func() { // ends when f is closed
		buf := make([]byte, 4096)
		for {
			n, err := f.Read(buf)
			if err != nil {
				return
			}
			for line := range strings.Lines(string(buf[:n])) {
				c.log.Debug("external shim", "sandbox", id, "says", strings.TrimSpace(line))
			}
		}
	}()
	return f, nil
}

// findExternal gives the connection to the shim of a sandbox, after a restart
// of the daemon from the address noted in its folder.
func (c *Client) findExternal(id, bundle string) (*external, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.externals[id]; e != nil {
		return e, nil
	}
	data, err := os.ReadFile(filepath.Join(bundle, bootstrapFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("sandbox %s has no shim: %w", id, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("read the address of the shim: %w", err)
	}
	var boot bootapi.BootstrapResult
	if err := json.Unmarshal(data, &boot); err != nil {
		return nil, fmt.Errorf("read the address of the shim from %s: %w", filepath.Join(bundle, bootstrapFile), err)
	}
	e := c.newExternal(id, bundle, boot.Address)
	c.externals[id] = e
	return e, nil
}

// firstBytes bounds what a foreign program's output adds to an error.
func firstBytes(b []byte) string {
	b = bytes.TrimSpace(b)
	if len(b) > 512 {
		b = append(b[:512:512], "…"...)
	}
	return string(b)
}
