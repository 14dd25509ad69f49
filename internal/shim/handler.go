package shim

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/anypb"

	hostv1 "cloister.dev/api/host/v1"
)

// Runtime describes a runtime handler as the administrator configured it.
type Runtime struct {
	Type           string // runtime_type, such as io.containerd.runc.v2
	Path           string // absolute path of an external shim; empty: looked up
	Binary         string // BinaryName of the OCI runtime
	Root           string // state folder of the OCI runtime
	SystemdCgroup  bool
	NoNewKeyring   bool
	ForceExternal  bool           // use containerd-shim-… even for a type that the resident shim serves
	Options        map[string]any // all options of the table, for external shims
	ConfigPath     string         // options.ConfigPath of external shims other than runc's
	ConfigBody     string         // text that stands in for ConfigPath
	OptionsType    string         // type URL that such a shim knows its configuration by
	Snapshotter    string
	BaseSpec       string
	PodAnnotations []string
	CtrAnnotations []string
	NoHostDevices  bool // privileged_without_host_devices
	AllDevices     bool // …_all_devices_allowed
	CgroupWritable bool
	Machine        *hostv1.MachineOptions // how virtual machines are made
}

// Types that resident shims serve.
const (
	containerType = "io.containerd.runc.v2"
	machineType   = "io.containerd.cloister-vm.v2"
)

func (r Runtime) resident() bool {
	return (r.Type == containerType || r.Type == machineType) && r.Path == "" && !r.ForceExternal
}

// Machine tells whether each sandbox is a virtual machine of our own.
func (h *Handler) Machine() bool { return h.Runtime.Type == machineType && h.Runtime.resident() }

// home is the resident shim of the handler's sandboxes; for external shims it
// is the one that keeps their streams.
func (h *Handler) home() *resident {
	if h.Machine() {
		return h.client.machine
	}
	return h.client.container
}

// Trace is what of a runtime is needed to end what runs on it.
func (r Runtime) Trace() Runtime {
	return Runtime{Type: r.Type, Path: r.Path, ForceExternal: r.ForceExternal, SystemdCgroup: r.SystemdCgroup}
}

// Found gives a handler for each OCI runtime in PATH: what a node has whose
// administrator configured none.
func Found() map[string]Runtime {
	found := map[string]Runtime{}
	for handler, program := range map[string]string{"runc": "runc", "crun": "crun", "gvisor": "runsc"} {
		if _, err := exec.LookPath(program); err == nil {
			found[handler] = Runtime{Type: containerType, Binary: program}
		}
	}
	return found
}

// Features is what a probe found a handler able to do.
type Features struct {
	Works             bool
	Reason            string // why not
	Path, Version     string
	OCIVersion        string
	RecursiveReadOnly bool
	UserNamespaces    bool
	IDMappedMounts    bool
	Millis            uint32
}

// Options configure a Client.
type Options struct {
	State         string       // folder for shim sockets and records
	Binary        string       // the cloister-shim program
	GRPCAddress   string       // told to external shims
	EventsAddress string       // where external shims send their events
	Events        *EventServer // that takes them there
	LogLevel      string
	Runtimes      map[string]Runtime
	Default       string // handler for "", empty: the best one that works
	Log           *slog.Logger
}

// Client knows the handlers of the node and their shims.
type Client struct {
	o         Options
	container *resident
	machine   *resident
	handlers  map[string]*Handler
	log       *slog.Logger

	mu        sync.Mutex // guards def and externals
	def       *Handler
	externals map[string]*external // by sandbox id

	probes sync.WaitGroup
	cancel context.CancelFunc
}

// Handler runs sandboxes of one configured runtime.
type Handler struct {
	Name    string
	Runtime Runtime
	client  *Client

	probed   chan struct{} // closed when features is final
	features Features
}

// New starts probing all handlers in the background; Close ends it. Running
// shims are not touched by Close.
func New(o Options) (*Client, error) {
	c := &Client{o: o, log: o.Log, handlers: map[string]*Handler{}, externals: map[string]*external{}}
	c.container = newResident(filepath.Join(o.State, "container"), "container", o)
	c.machine = newResident(filepath.Join(o.State, "vm"), "vm", o)
	ctx, cancel := context.WithCancel(context.Background())
	c.cancel = cancel
	for name, r := range o.Runtimes {
		if _, _, err := shimName(r.Type); err != nil && r.Path == "" {
			cancel()
			return nil, fmt.Errorf("handler %q: %w", name, err)
		}
		c.handlers[name] = &Handler{Name: name, Runtime: r, client: c, probed: make(chan struct{})}
	}
	if o.Default != "" && c.handlers[o.Default] == nil {
		cancel()
		return nil, fmt.Errorf("default_runtime_name %q: no such handler; configured are %s: %w",
			o.Default, strings.Join(c.names(), ", "), errdefs.ErrInvalidArgument)
	}
	for _, h := range c.handlers {
		c.probes.Go(func() { h.probe(ctx) })
	}
	return c, nil
}

// Close ends connections and probes; shims and their containers stay.
func (c *Client) Close() {
	c.cancel()
	c.probes.Wait()
	c.container.close()
	c.machine.close()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.externals {
		e.close()
	}
}

func (c *Client) names() []string { return slices.Sorted(maps.Keys(c.handlers)) }

// Handlers gives all handlers by name.
func (c *Client) Handlers() []*Handler {
	var hs []*Handler
	for _, n := range c.names() {
		hs = append(hs, c.handlers[n])
	}
	return hs
}

// Lookup gives the handler called name without asking whether it works.
func (c *Client) Lookup(name string) (*Handler, error) {
	h := c.handlers[name]
	if h == nil {
		return nil, fmt.Errorf("runtime handler %q is not configured; there are %s: %w",
			name, strings.Join(c.names(), ", "), errdefs.ErrInvalidArgument)
	}
	return h, nil
}

// Former gives a handler that is not configured any more for what still runs
// on it: that can be watched, stopped and removed, but nothing can be started.
func (c *Client) Former(name string, r Runtime) *Handler {
	if r.Type == "" {
		r.Type = containerType
	}
	h := &Handler{Name: name, Runtime: r, client: c, probed: make(chan struct{}), features: Features{Reason: "not configured any more"}}
	close(h.probed)
	return h
}

// Configured tells whether the handler is one of the client's, or a former one.
func (h *Handler) Configured() bool { return h.client.handlers[h.Name] == h }

// Handler gives the handler called name ("" is the default one), once its
// probe has found it working.
func (c *Client) Handler(ctx context.Context, name string) (*Handler, error) {
	if name == "" {
		return c.Default(ctx)
	}
	h, err := c.Lookup(name)
	if err != nil {
		return nil, err
	}
	f, err := h.Features(ctx)
	if err != nil {
		return nil, err
	}
	if !f.Works {
		return nil, fmt.Errorf("runtime handler %q does not work on this node: %s: %w", name, f.Reason, errdefs.ErrFailedPrecondition)
	}
	return h, nil
}

// preference orders the handlers that may become the default one: the faster
// runtime first.
var preference = [...]string{"crun", "runc"}

// Default gives the handler for pods that name none.
func (c *Client) Default(ctx context.Context) (*Handler, error) {
	if c.o.Default != "" {
		return c.Handler(ctx, c.o.Default)
	}
	c.mu.Lock()
	def := c.def
	c.mu.Unlock()
	if def != nil {
		return def, nil
	}
	var reasons []string
	order := slices.Clone(preference[:])
	for _, n := range c.names() {
		if !slices.Contains(order, n) && c.handlers[n].Runtime.Type == containerType {
			order = append(order, n)
		}
	}
	for _, n := range order {
		h := c.handlers[n]
		if h == nil {
			continue
		}
		f, err := h.Features(ctx)
		if err != nil {
			return nil, err
		}
		if f.Works {
			c.mu.Lock()
			c.def = h
			c.mu.Unlock()
			return h, nil
		}
		reasons = append(reasons, n+": "+f.Reason)
	}
	return nil, fmt.Errorf("no OCI runtime works on this node (%s); install crun or runc: %w",
		strings.Join(reasons, "; "), errdefs.ErrFailedPrecondition)
}

// Features waits for the handler's probe and gives its result.
func (h *Handler) Features(ctx context.Context) (Features, error) {
	select {
	case <-h.probed:
		return h.features, nil
	case <-ctx.Done():
		return Features{}, fmt.Errorf("wait for the probe of handler %q: %w", h.Name, ctx.Err())
	}
}

// External tells whether each sandbox has a shim process of its own, whose end
// is the sandbox's.
func (h *Handler) External() bool { return !h.Runtime.resident() }

// Supports gives the features of a handler that Client.Handler returned, whose
// probe is therefore done.
func (h *Handler) Supports() Features { return h.features }

func (h *Handler) probe(ctx context.Context) {
	defer close(h.probed)
	if !h.Runtime.resident() {
		h.features = h.probeExternal(ctx)
	} else {
		h.features = h.probeRuntime(ctx, h.Runtime.Binary)
	}
	f := h.features
	h.client.log.Info("handler probed", "handler", h.Name, "works", f.Works, "runtime", f.Path, "version", f.Version, "millis", f.Millis, "reason", f.Reason)
}

// probeRuntime lets the resident shim try an OCI runtime.
func (h *Handler) probeRuntime(ctx context.Context, binary string) Features {
	extra, err := h.Runtime.extra()
	if err != nil {
		return Features{Reason: err.Error()}
	}
	var resp *hostv1.ProbeResponse
	err = h.home().call(ctx, true, func(ctx context.Context, c *conn) (err error) {
		resp, err = c.host.Probe(ctx, &hostv1.ProbeRequest{
			Binary: binary, Root: h.Runtime.Root, SystemdCgroup: h.Runtime.SystemdCgroup, Extra: extra})
		return err
	})
	if err != nil {
		return Features{Reason: err.Error()}
	}
	return Features{Works: resp.Works, Reason: resp.Reason, Path: resp.Path, Version: resp.Version, OCIVersion: resp.OciVersion,
		RecursiveReadOnly: resp.RecursiveReadOnly, UserNamespaces: resp.UserNamespaces, IDMappedMounts: resp.IdmappedMounts, Millis: resp.Millis}
}

// extra are the options that the resident shim's backend alone understands.
func (r Runtime) extra() (*anypb.Any, error) {
	if r.Machine == nil {
		return nil, nil
	}
	return anypb.New(r.Machine)
}

// probeExternal looks for the shim's program and tries the OCI runtime behind
// containerd's own shim. What another shim runs is its own affair: a sandbox of
// it may need a machine image.
func (h *Handler) probeExternal(ctx context.Context) Features {
	path, err := h.shimPath()
	if err != nil {
		return Features{Reason: err.Error()}
	}
	if !h.runsRunc() {
		return Features{Works: true, Path: path, OCIVersion: "1.1.0"}
	}
	binary := h.Runtime.Binary
	if binary == "" {
		binary = "runc" // what that shim takes
	}
	return h.probeRuntime(ctx, binary)
}

var shimType = regexp.MustCompile(`^io\.containerd\.([a-z0-9-]+)\.(v[0-9]+)$`)

// shimName splits a runtime_type into the name and version that its shim
// program carries.
func shimName(runtimeType string) (name, version string, err error) {
	m := shimType.FindStringSubmatch(runtimeType)
	if m == nil {
		return "", "", fmt.Errorf("runtime_type %q is not of the form io.containerd.NAME.VERSION: %w", runtimeType, errdefs.ErrInvalidArgument)
	}
	return m[1], m[2], nil
}

func (h *Handler) shimPath() (string, error) {
	if h.Runtime.Path != "" {
		if !filepath.IsAbs(h.Runtime.Path) {
			return "", fmt.Errorf("runtime_path %q of handler %q is not absolute: %w", h.Runtime.Path, h.Name, errdefs.ErrInvalidArgument)
		}
		if _, err := os.Stat(h.Runtime.Path); err != nil {
			return "", fmt.Errorf("runtime_path of handler %q: %w", h.Name, err)
		}
		return h.Runtime.Path, nil
	}
	name, version, err := shimName(h.Runtime.Type)
	if err != nil {
		return "", err
	}
	program := "containerd-shim-" + name + "-" + version
	path, err := exec.LookPath(program)
	if err != nil {
		return "", fmt.Errorf("handler %q needs the program %s in PATH, or runtime_path: %w", h.Name, program, errdefs.ErrNotFound)
	}
	return path, nil
}
