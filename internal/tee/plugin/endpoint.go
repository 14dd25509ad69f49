package plugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	v1beta1 "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"

	"cloister.dev/internal/tee"
)

const (
	firstRetry = 100 * time.Millisecond
	lastRetry  = 5 * time.Second
	// registerTime is more than the ten seconds that kubelet takes to call back.
	registerTime = 15 * time.Second
	// streamGrace is how long nobody may watch before we register again: kubelet
	// never comes back by itself.
	streamGrace = 2 * time.Second
	// lookEvery is how often the sockets are looked at without an event.
	lookEvery = 10 * time.Second
)

// endpoint is one resource on its socket.
type endpoint struct {
	p      *Plugin
	name   string
	socket string

	streams atomic.Int32  // that are open
	poke    chan struct{} // something may have changed; holds one
	came    chan struct{} // kubelet made its socket; holds one

	writing sync.Mutex // held while the offer and its CDI specification are replaced, before mu
	mu      sync.Mutex // guards what follows
	now     *offer
	link    link
}

// offer is what kubelet is told, until it is outdated.
type offer struct {
	state    tee.ResourceState
	listed   int    // units that fit
	limit    string // why not all of them
	encoded  list
	cdi      string // kind of the CDI devices; empty without
	cdiLost  bool   // the specification could not be written
	outdated chan struct{}
}

// link is how the endpoint and kubelet stand.
type link struct {
	Registered bool      `json:"registered"`
	Since      time.Time `json:"since"`
	Times      int       `json:"registrations"`
	Error      string    `json:"error,omitempty"`
}

func newEndpoint(p *Plugin, r tee.ResourceState) *endpoint {
	e := &endpoint{p: p, name: r.Name, poke: make(chan struct{}, 1), came: make(chan struct{}, 1), link: link{Since: time.Now()}}
	e.socket = filepath.Join(p.o.Dir, "cloister-"+flat(r.Name)+".sock")
	e.update(r)
	return e
}

// flat makes a file name, or a CDI class, of a resource name.
func flat(resource string) string { return strings.NewReplacer("/", "-", ".", "-").Replace(resource) }

func (e *endpoint) nudge() { put(e.poke) }

// put leaves a token, unless there is one.
func put(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (e *endpoint) current() *offer {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.now
}

// update replaces the offer when there is something new to tell.
func (e *endpoint) update(r tee.ResourceState) {
	e.writing.Lock()
	defer e.writing.Unlock()
	old := e.current()
	if old != nil && sameOffer(old.state, r) {
		return
	}
	next := &offer{state: r, outdated: make(chan struct{})}
	next.listed, next.limit = fit(r.Resource, e.p.o.MaxDevices)
	next.encoded = encode(r, next.listed)
	if next.limit != "" && (old == nil || old.listed != next.listed) {
		e.p.log.Warn("not all units are offered; a larger precision makes fewer of them", "resource", e.name,
			"units", r.Units(), "offered", next.listed, "limit", next.limit)
	}
	var err error
	if next.cdi, err = e.p.writeCDI(r.Resource); err != nil {
		next.cdiLost = true
		e.p.log.Warn("write the CDI specification; containers get their devices without it", "resource", e.name, "err", err)
	}
	e.mu.Lock()
	e.now = next
	e.mu.Unlock()
	if old != nil {
		close(old.outdated)
	}
}

// retryCDI writes the specification that could not be written, as when the
// folder was full.
func (e *endpoint) retryCDI() {
	e.writing.Lock()
	defer e.writing.Unlock()
	now := e.current()
	if !now.cdiLost {
		return
	}
	kind, err := e.p.writeCDI(now.state.Resource)
	if err != nil {
		return
	}
	e.p.log.Info("wrote the CDI specification", "resource", e.name)
	next := *now
	next.cdi, next.cdiLost = kind, false
	e.mu.Lock()
	defer e.mu.Unlock()
	e.now = &next
}

// sameOffer tells whether two states look the same to kubelet and containers.
func sameOffer(a, b tee.ResourceState) bool {
	if !reflect.DeepEqual(a.Resource, b.Resource) {
		return false
	}
	for n := range a.Health {
		if a.Health[n].Healthy != b.Health[n].Healthy {
			return false
		}
	}
	return true
}

// offers tells whether a unit is on the list.
func (o *offer) offers(id string) bool {
	part, n, ok := o.state.Find(id)
	if !ok {
		return false
	}
	for _, p := range o.state.Parts[:part] {
		n += p.Units
	}
	return n < o.listed
}

// run serves and registers until ctx ends.
func (e *endpoint) run(ctx context.Context) {
	wait := firstRetry
	for ctx.Err() == nil {
		began := time.Now()
		err := e.attempt(ctx)
		if ctx.Err() != nil {
			return
		}
		e.unlink(err)
		if time.Since(began) > lastRetry {
			wait = firstRetry
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		case <-e.came: // our own socket comes and goes with each attempt
		}
		wait = min(2*wait, lastRetry)
	}
}

// attempt is one registration from its socket to its end.
func (e *endpoint) attempt(ctx context.Context) error {
	kubelet, err := identify(e.p.kubeletSocket())
	if err != nil {
		return fmt.Errorf("kubelet's socket: %w", err)
	}
	lis, mine, err := listen(ctx, e.socket)
	if err != nil {
		return err
	}
	defer removeIfSame(e.socket, mine)
	g := grpc.NewServer(grpc.ForceServerCodecV2(codec{}), grpc.MaxRecvMsgSize(maxMessage), grpc.MaxConcurrentStreams(64),
		// A kubelet that hangs is left after a while; it finds us again when we register again.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute, Timeout: 20 * time.Second}))
	v1beta1.RegisterDevicePluginServer(g, &service{e: e})
	served := make(chan error, 1)
	go func() { served <- g.Serve(lis) }()
	defer func() {
		g.Stop()
		if err := <-served; err != nil {
			e.p.log.Debug("serve", "resource", e.name, "err", err)
		}
	}()
	if err := e.registerOn(ctx, mine); err != nil {
		return err
	}
	return e.stay(ctx, kubelet, mine)
}

// registerOn registers and gives up as soon as our socket is gone: a kubelet
// that starts empties its folder, and would look for the socket for ten seconds.
func (e *endpoint) registerOn(ctx context.Context, mine identity) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done := make(chan error, 1)
	go func() { done <- e.register(ctx) }()
	tick := time.NewTicker(streamGrace / 2)
	defer tick.Stop()
	for {
		select {
		case err := <-done:
			return err
		case <-e.poke:
		case <-tick.C:
		}
		if now, err := identify(e.socket); err != nil || now != mine {
			cancel(errOwnSocket)
			if err := <-done; err != nil {
				e.p.log.Debug("registration given up", "resource", e.name, "err", err)
			}
			return errOwnSocket
		}
	}
}

// register tells kubelet of the socket, on which it calls back at once.
func (e *endpoint) register(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, registerTime)
	defer cancel()
	conn, err := grpc.NewClient("unix://"+e.p.kubeletSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	if err != nil {
		return fmt.Errorf("reach kubelet: %w", err)
	}
	defer conn.Close()
	start := time.Now()
	_, err = v1beta1.NewRegistrationClient(conn).Register(ctx, &v1beta1.RegisterRequest{
		Version: v1beta1.Version, Endpoint: filepath.Base(e.socket), ResourceName: e.name, Options: e.options(),
	})
	e.p.metrics.registered(e.name, err)
	if err != nil {
		return fmt.Errorf("register with kubelet: %w", err)
	}
	now := e.current()
	e.mu.Lock()
	e.link = link{Registered: true, Since: time.Now(), Times: e.link.Times + 1}
	e.mu.Unlock()
	e.p.log.Info("registered with kubelet", "resource", e.name, "units", now.listed, "bytes", len(now.encoded), "took", time.Since(start))
	return nil
}

// stay returns when it takes a new registration.
func (e *endpoint) stay(ctx context.Context, kubelet, mine identity) error {
	tick := time.NewTicker(streamGrace / 2)
	defer tick.Stop()
	alone := time.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-e.poke:
		case <-tick.C:
		}
		e.retryCDI()
		if now, err := identify(e.p.kubeletSocket()); err != nil || now != kubelet {
			return errors.Join(errRenewed, err)
		}
		if now, err := identify(e.socket); err != nil || now != mine {
			return errOwnSocket
		}
		if e.streams.Load() > 0 {
			alone = time.Time{}
			tick.Reset(lookEvery)
			continue
		}
		if alone.IsZero() {
			alone = time.Now()
			tick.Reset(streamGrace / 2)
		}
		if time.Since(alone) >= streamGrace {
			return errNobodyWatches
		}
	}
}

var (
	errRenewed       = errors.New("kubelet's socket is a new one")
	errOwnSocket     = errors.New("our socket was removed")
	errNobodyWatches = errors.New("kubelet does not watch any more")
)

// unlink notes why the registration ended, and logs it unless it is the same again.
func (e *endpoint) unlink(err error) {
	if err == nil {
		err = errRenewed
	}
	e.mu.Lock()
	same := !e.link.Registered && e.link.Error == err.Error()
	e.link = link{Since: e.link.Since, Times: e.link.Times, Error: err.Error()}
	if !same {
		e.link.Since = time.Now()
	}
	e.mu.Unlock()
	if !same {
		e.p.log.Info("not registered with kubelet; trying again", "resource", e.name, "reason", err)
	}
}

// identity tells one file from another of the same name.
type identity struct {
	dev, ino uint64
	ctime    unix.Timespec
}

// identify judges a socket that others made: it must be one, not a link to
// one, and belong to root or to us.
func identify(path string) (identity, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return identity{}, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	switch {
	case st.Mode&unix.S_IFMT == unix.S_IFLNK:
		return identity{}, fmt.Errorf("%s is a symbolic link, which is not followed: %w", path, errdefs.ErrFailedPrecondition)
	case st.Mode&unix.S_IFMT != unix.S_IFSOCK:
		return identity{}, fmt.Errorf("%s is not a socket: %w", path, errdefs.ErrFailedPrecondition)
	case st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return identity{}, fmt.Errorf("%s belongs to user %d: %w", path, st.Uid, errdefs.ErrPermissionDenied)
	}
	return identity{dev: st.Dev, ino: st.Ino, ctime: st.Ctim}, nil
}

// maxSocketPath is the kernel's limit for sun_path without its final zero.
const maxSocketPath = 107

// listen makes the endpoint's socket in place of a stale one.
func listen(ctx context.Context, path string) (net.Listener, identity, error) {
	if len(path) > maxSocketPath {
		return nil, identity{}, fmt.Errorf("the socket's path %s has %d bytes, of at most %d: %w", path, len(path), maxSocketPath, errdefs.ErrInvalidArgument)
	}
	if _, err := identify(path); err == nil {
		d := net.Dialer{Timeout: time.Second}
		if c, err := d.DialContext(ctx, "unix", path); err == nil {
			c.Close()
			return nil, identity{}, fmt.Errorf("another device plugin serves %s: %w", path, errdefs.ErrAlreadyExists)
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, identity{}, fmt.Errorf("remove the stale socket: %w", err)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, identity{}, fmt.Errorf("in the way of our socket: %w", err)
	}
	lis, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, identity{}, fmt.Errorf("listen: %w", err)
	}
	lis.SetUnlinkOnClose(false) // the name may be another's by then
	err = os.Chmod(path, 0o600)
	mine, identityErr := identify(path)
	if err := errors.Join(err, identityErr); err != nil {
		lis.Close()
		return nil, identity{}, fmt.Errorf("our socket vanished: %w", err)
	}
	return lis, mine, nil
}

func removeIfSame(path string, mine identity) {
	if now, err := identify(path); err == nil && now == mine {
		_ = os.Remove(path) // kubelet removes it otherwise
	}
}
