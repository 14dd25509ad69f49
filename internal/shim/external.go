package shim

import (
	"bytes"
	"context"
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

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
)

// external is one third-party shim process: the shim of one sandbox.
type external struct {
	dialer
	logs io.Closer // our end of the shim's log FIFO
}

func (e *external) close() {
	e.dialer.close()
	if e.logs != nil {
		e.logs.Close()
	}
}

const bootstrapFile = "bootstrap.json"

// startExternal runs the shim's start command in the sandbox's folder, which
// is its bundle, and connects to the address that it answers.
func (c *Client) startExternal(ctx context.Context, h *Handler, r SandboxRequest) (*dialer, error) {
	path, err := h.shimPath()
	if err != nil {
		return nil, err
	}
	if err := writeGroupSpec(r); err != nil {
		return nil, err
	}
	logs, err := c.openShimLog(r.ID, r.Bundle)
	if err != nil {
		return nil, err
	}
	boot, err := c.runStart(ctx, h, path, r)
	if err != nil {
		logs.Close()
		return nil, err
	}
	data, err := json.Marshal(boot)
	if err == nil {
		err = os.WriteFile(filepath.Join(r.Bundle, bootstrapFile), data, 0o600)
	}
	if err != nil {
		logs.Close()
		return nil, fmt.Errorf("note the address of the shim: %w", err)
	}
	e := &external{logs: logs}
	e.connect = func(ctx context.Context) (*conn, error) { return dial(ctx, boot.Address) }
	c.mu.Lock()
	c.externals[r.ID] = e
	c.mu.Unlock()
	return &e.dialer, nil
}

func (c *Client) runStart(ctx context.Context, h *Handler, path string, r SandboxRequest) (*bootapi.BootstrapResult, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	params, err := proto.Marshal(&bootapi.BootstrapParams{
		InstanceID: r.ID, Namespace: containerdNamespace, ContainerdVersion: "2.4.2",
		ContainerdGrpcAddress: c.o.GRPCAddress, ContainerdTtrpcAddress: c.o.EventsAddress, ContainerdBinary: self,
	})
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, c.shimArgs(self, r.ID, "start")...)
	cmd.Dir = r.Bundle
	cmd.Env = c.shimEnv()
	cmd.Stdin = bytes.NewReader(params)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s start (handler %q): %w: %s", path, h.Name, err, firstBytes(stderr.Bytes()))
	}
	return parseBootstrap(stdout.Bytes())
}

func (c *Client) shimArgs(self, id, action string) []string {
	return []string{"-namespace", containerdNamespace, "-address", c.o.GRPCAddress, "-publish-binary", self, "-id", id, action}
}

func (c *Client) shimEnv() []string {
	return append(os.Environ(), "GOMAXPROCS=2", "MAX_SHIM_VERSION=3",
		"TTRPC_ADDRESS="+c.o.EventsAddress, "GRPC_ADDRESS="+c.o.GRPCAddress, "NAMESPACE="+containerdNamespace)
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
func writeGroupSpec(r SandboxRequest) error {
	spec := specs.Spec{Version: specs.Version, Annotations: map[string]string{
		"io.kubernetes.cri.sandbox-id":     r.ID,
		"io.kubernetes.cri.container-type": "sandbox",
	}}
	data, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(r.Bundle, "config.json"), data, 0o600); err != nil {
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
func (c *Client) findExternal(ctx context.Context, id, bundle string) (*dialer, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.externals[id]; e != nil {
		return &e.dialer, nil
	}
	data, err := os.ReadFile(filepath.Join(bundle, bootstrapFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("sandbox %s has no shim: %w", id, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("read the address of the shim: %w", err)
	}
	boot, err := parseBootstrap(data)
	if err != nil {
		return nil, err
	}
	e := &external{}
	e.connect = func(ctx context.Context) (*conn, error) { return dial(ctx, boot.Address) }
	if logs, err := c.openShimLog(id, bundle); err == nil {
		e.logs = logs
	}
	c.externals[id] = e
	return &e.dialer, nil
}

// endExternal shuts the sandbox's shim down; when it does not answer, its
// delete command cleans up.
func (c *Client) endExternal(ctx context.Context, h *Handler, id, bundle string) error {
	d, err := c.findExternal(ctx, id, bundle)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	err = d.call(ctx, false, func(ctx context.Context, cn *conn) error {
		_, err := cn.task.Shutdown(ctx, &taskapi.ShutdownRequest{ID: id, Now: true})
		return err
	})
	c.mu.Lock()
	if e := c.externals[id]; e != nil {
		e.close()
		delete(c.externals, id)
	}
	c.mu.Unlock()
	if err == nil || errdefs.IsUnavailable(err) { // a shim that ends may not answer any more
		return c.runDelete(ctx, h, id, bundle)
	}
	return fmt.Errorf("shut down the shim of sandbox %s: %w", id, err)
}

func (c *Client) runDelete(ctx context.Context, h *Handler, id, bundle string) error {
	path, err := h.shimPath()
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, path, append([]string{"-bundle", bundle}, c.shimArgs(self, id, "delete")...)...)
	cmd.Dir = bundle
	cmd.Env = c.shimEnv()
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s delete: %w: %s", path, err, firstBytes(out))
	}
	return nil
}

// firstBytes bounds what a foreign program's output adds to an error.
func firstBytes(b []byte) string {
	b = bytes.TrimSpace(b)
	if len(b) > 512 {
		b = append(b[:512:512], "…"...)
	}
	return string(b)
}

// foreignOptions encodes a handler's options table for a shim that is not ours.
func (r Runtime) foreignOptions() proto.Message {
	if name, _, err := shimName(r.Type); err == nil && name == "runc" || strings.HasSuffix(r.Path, "containerd-shim-runc-v2") {
		return &runcoptions.Options{BinaryName: r.Binary, Root: r.Root, SystemdCgroup: r.SystemdCgroup, NoNewKeyring: r.NoNewKeyring}
	}
	if r.ConfigPath == "" && r.ConfigBody == "" {
		return nil
	}
	return &runtimeoptions.Options{TypeUrl: r.OptionsType, ConfigPath: r.ConfigPath, ConfigBody: []byte(r.ConfigBody)}
}
