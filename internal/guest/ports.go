package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"cloister.dev/internal/host/vm/channel"
)

// portsClass is where the kernel lists the ports of all virtio-serial devices.
const portsClass = "/sys/class/virtio-ports"

// ports finds the machine's ports as they are plugged in, and tells when disks
// are.
type ports struct {
	log     *slog.Logger
	events  *os.File // the kernel's announcements of devices
	control chan net.Conn

	mu      sync.Mutex
	changed chan struct{}   // closed and replaced when a port or a disk came or went
	served  map[string]bool // control ports that were given out
}

func newPorts(log *slog.Logger) (*ports, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("listen for devices: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("listen for devices: %w", err)
	}
	return &ports{log: log, events: os.NewFile(uintptr(fd), "uevents"), control: make(chan net.Conn),
		changed: make(chan struct{}), served: map[string]bool{}}, nil
}

// run announces ports until ctx ends.
func (p *ports) run(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() { p.events.Close() })
	defer stop()
	buf := make([]byte, 16<<10)
	for {
		p.look(ctx)
		n, err := p.events.Read(buf)
		for err == nil && !bytes.Contains(buf[:n], []byte("SUBSYSTEM=virtio-ports")) && !bytes.Contains(buf[:n], []byte("SUBSYSTEM=block")) {
			n, err = p.events.Read(buf)
		}
		if errors.Is(err, unix.ENOBUFS) {
			continue // some were missed: look at all
		}
		if err != nil {
			return
		}
	}
}

// look wakes everybody who waits for a port, and hands out control ports.
func (p *ports) look(ctx context.Context) {
	names := portNames()
	p.mu.Lock()
	close(p.changed)
	p.changed = make(chan struct{})
	var fresh []string
	for name := range names {
		if strings.HasPrefix(name, channel.ControlPrefix) && !p.served[name] {
			p.served[name] = true
			fresh = append(fresh, name)
		}
	}
	for name := range p.served {
		if names[name] == "" {
			delete(p.served, name)
		}
	}
	p.mu.Unlock()
	for _, name := range fresh {
		f, err := openPort(ctx, names[name])
		if err != nil {
			p.log.Warn("control port not opened", "port", name, "err", err)
			continue
		}
		select {
		case p.control <- portConn{f}:
		case <-ctx.Done():
			f.Close()
		}
	}
}

// awaitChange gives what is closed when a port or a disk has come or gone since.
func (p *ports) awaitChange() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.changed
}

// portNames gives the device file of each port by the port's name.
func portNames() map[string]string {
	names := map[string]string{}
	entries, err := os.ReadDir(portsClass)
	if err != nil {
		return names
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(portsClass, e.Name(), "name"))
		if name := strings.TrimSpace(string(b)); err == nil && name != "" {
			names[name] = filepath.Join("/dev", e.Name())
		}
	}
	return names
}

// portTime bounds the wait for a port that the host says it has plugged in. An
// emulated machine on a busy host takes seconds for a handful of them.
const portTime = time.Minute

// open waits for a port and opens it.
func (p *ports) open(ctx context.Context, name string) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, portTime)
	defer cancel()
	for {
		changed := p.awaitChange()
		if dev := portNames()[name]; dev != "" {
			return openPort(ctx, dev)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("port %q does not appear: %w: %w", name, ctx.Err(), errdefs.ErrNotFound)
		}
	}
}

// connectTime bounds the wait for the host's end, which follows the port's
// name at once.
const connectTime = time.Second

// openPort opens a port and waits until the host's end is there: before, a
// read would look like the end of the stream.
func openPort(ctx context.Context, dev string) (*os.File, error) {
	fd, err := unix.Open(dev, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dev, Err: err}
	}
	ctx, cancel := context.WithTimeout(ctx, connectTime)
	defer cancel()
	tick := time.NewTicker(time.Millisecond) // the kernel tells of it by nothing that could be waited for
	defer tick.Stop()
	for hungUp(fd) && ctx.Err() == nil {
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
	return os.NewFile(uintptr(fd), dev), nil
}

func hungUp(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd)}}
	_, _ = unix.Poll(p, 0)
	return p[0].Revents&unix.POLLHUP != 0
}

// portConn is a port as a connection.
type portConn struct{ *os.File }

type portAddr string

func (portAddr) Network() string  { return "virtio-serial" }
func (a portAddr) String() string { return string(a) }

func (c portConn) LocalAddr() net.Addr  { return portAddr(c.Name()) }
func (c portConn) RemoteAddr() net.Addr { return portAddr("host") }

// listener gives the control ports to a server.
type listener struct {
	ports *ports
	ctx   context.Context
}

func (l listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.ports.control:
		return c, nil
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}

func (l listener) Close() error   { return nil }
func (l listener) Addr() net.Addr { return portAddr(portsClass) }
