package shim

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/osutil"
)

// Runtime describes a runtime handler as the administrator configured it.
type Runtime struct {
	Type           string              `json:",omitempty"` // runtime_type, such as io.containerd.runc.v2
	Path           string              `json:",omitempty"` // absolute path of an external shim; empty: looked up
	Binary         string              `json:",omitempty"` // BinaryName of the OCI runtime
	Root           string              `json:",omitempty"` // state folder of the OCI runtime
	SystemdCgroup  bool                `json:",omitempty"`
	NoNewKeyring   bool                `json:",omitempty"`
	NoPivotRoot    bool                `json:",omitempty"`
	NoCgroup       bool                `json:",omitempty"` // the node's cgroups are left alone
	ShimCgroup     string              `json:",omitempty"` // of external shims of runc's kind
	IOUid, IOGid   uint32              `json:",omitempty"` // own the pipes of containers; 0: root of the pod
	ForceExternal  bool                `json:",omitempty"` // use containerd-shim-… even for a type that the resident shim serves
	Options        map[string]any      `json:",omitempty"` // all options of the table, for external shims
	ConfigPath     string              `json:",omitempty"` // options.ConfigPath of external shims other than runc's
	ConfigBody     string              `json:",omitempty"` // text that stands in for ConfigPath
	OptionsType    string              `json:",omitempty"` // type URL that such a shim knows its configuration by
	Snapshotter    string              `json:",omitempty"`
	Platform       string              `json:",omitempty"` // of its images; empty: the node's own
	BaseSpec       string              `json:",omitempty"`
	PodAnnotations []string            `json:",omitempty"`
	CtrAnnotations []string            `json:",omitempty"`
	NoHostDevices  bool                `json:",omitempty"` // privileged_without_host_devices
	AllDevices     bool                `json:",omitempty"` // …_all_devices_allowed
	CgroupWritable bool                `json:",omitempty"`
	ReadOnlyMounts string              `json:",omitempty"` // treat_ro_mounts_as_rro
	Rlimits        []specs.POSIXRlimit `json:",omitempty"`
	// Machine says how virtual machines are made.
	Machine *hostv1.MachineOptions `json:",omitempty"`
	Found   bool                   `json:",omitempty"` // nobody configured it: it is on the machine
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

// Expect tells that a container of a sandbox on this node's own kernel will be
// started soon. It only makes that start quicker.
func (h *Handler) Expect() {
	if !h.Machine() {
		h.client.moves.Expect()
	}
}

// home is the resident shim of the handler's sandboxes; for external shims it
// is the one that keeps their streams.
func (h *Handler) home() *resident {
	if h.Machine() {
		return h.client.machine
	}
	return h.client.container
}

// Found gives a handler for each OCI runtime in PATH: what a node has beside
// the handlers that its administrator configured.
func Found() map[string]Runtime {
	found := map[string]Runtime{}
	for handler, program := range map[string]string{"runc": "runc", "crun": "crun", "gvisor": "runsc"} {
		if _, err := exec.LookPath(program); err == nil {
			found[handler] = Runtime{Type: containerType, Binary: program, Found: true}
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
	// Ready tells why a handler that works cannot be used now, as when the device
	// that it needs is lost. It is asked again and again and may be nil.
	Ready func(handler string) error
	Log   *slog.Logger
}

// Client knows the handlers of the node and their shims.
type Client struct {
	o         Options
	self      string // this program, which external shims are told of
	container *resident
	machine   *resident
	log       *slog.Logger
	moves     *osutil.CgroupMoves

	mu        sync.Mutex // guards what follows
	set       handlerSet
	kept      map[string]*Handler  // of recovered pods, see Kept
	externals map[string]*external // by sandbox id

	probes sync.WaitGroup
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
}

// Handler runs sandboxes of one configured runtime.
type Handler struct {
	Name    string
	Runtime Runtime
	client  *Client
	trial   *trial
	former  bool // what is known of it does for its end alone
}

// trial is what a probe finds, for all handlers that differ in nothing that a
// probe sees.
type trial struct {
	done     chan struct{} // closed when features is final
	features Features
}

// New starts probing all handlers in the background; Close ends it. Running
// shims are not touched by Close.
func New(o Options) (*Client, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	c := &Client{o: o, self: self, log: o.Log, moves: osutil.NewCgroupMoves(o.Log), externals: map[string]*external{}, kept: map[string]*Handler{}}
	c.container = newResident(filepath.Join(o.State, "container"), "container", o)
	c.machine = newResident(filepath.Join(o.State, "vm"), "vm", o)
	c.ctx, c.cancel = context.WithCancel(context.Background())
	if err := c.Reload(o.Runtimes, o.Default); err != nil {
		c.cancel()
		return nil, err
	}
	return c, nil
}

// Close ends connections and probes; shims and their containers stay.
func (c *Client) Close() {
	c.cancel()
	c.probes.Wait()
	c.container.close()
	c.machine.close()
	c.moves.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.externals {
		e.close()
	}
}

// Handlers gives all handlers by name.
func (c *Client) Handlers() []*Handler {
	set := c.current()
	var hs []*Handler
	for _, n := range set.names() {
		hs = append(hs, set.byName[n])
	}
	return hs
}

// Lookup gives the handler called name, "" being the one that is configured as
// the default, without asking whether it works.
func (c *Client) Lookup(name string) (*Handler, error) {
	return c.current().lookup(name)
}

// Handler gives the handler called name ("" is the default one), once its
// probe has found it working.
func (c *Client) Handler(ctx context.Context, name string) (*Handler, error) {
	set := c.current()
	if name == "" {
		return c.best(ctx, set)
	}
	return set.working(ctx, name)
}

// working gives a handler once its probe has found it working.
func (s handlerSet) working(ctx context.Context, name string) (*Handler, error) {
	h, err := s.lookup(name)
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

// Default gives the handler for pods that name none.
func (c *Client) Default(ctx context.Context) (*Handler, error) { return c.best(ctx, c.current()) }

func (c *Client) best(ctx context.Context, set handlerSet) (*Handler, error) {
	if set.def != "" {
		return set.working(ctx, set.def)
	}
	if set.chosen != nil && (c.o.Ready == nil || c.o.Ready(set.chosen.Name) == nil) {
		return set.chosen, nil
	}
	var reasons []string
	for _, n := range set.order() {
		h := set.byName[n]
		f, err := h.Features(ctx)
		if err != nil {
			return nil, err
		}
		if f.Works {
			c.choose(h)
			return h, nil
		}
		reasons = append(reasons, n+": "+f.Reason)
	}
	return nil, fmt.Errorf("no OCI runtime works on this node (%s); install crun or runc: %w",
		strings.Join(reasons, "; "), errdefs.ErrFailedPrecondition)
}

// Features waits for the handler's probe and gives its result, as far as what
// the handler needs is there.
func (h *Handler) Features(ctx context.Context) (Features, error) {
	select {
	case <-h.trial.done:
		f := h.trial.features
		if ready := h.client.o.Ready; f.Works && ready != nil {
			if err := ready(h.Name); err != nil {
				f.Works, f.Reason = false, err.Error()
			}
		}
		return f, nil
	case <-ctx.Done():
		return Features{}, fmt.Errorf("wait for the probe of handler %q: %w", h.Name, ctx.Err())
	}
}

// External tells whether each sandbox has a shim process of its own, whose end
// is the sandbox's.
func (h *Handler) External() bool { return !h.Runtime.resident() }

// Supports gives the features of a handler that Client.Handler returned, whose
// probe is therefore done.
func (h *Handler) Supports() Features { return h.trial.features }

func (h *Handler) probe(ctx context.Context) {
	defer close(h.trial.done)
	f := &h.trial.features
	if !h.Runtime.resident() {
		*f = h.probeExternal(ctx)
	} else {
		*f = h.probeRuntime(ctx, h.Runtime.Binary)
	}
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
