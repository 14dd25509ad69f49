// Package testnode runs a private container runtime on this machine for a test:
// Cloister from this checkout, or containerd, each with the same configuration,
// registry and CNI network. Root, state, socket, configuration, bridge and
// address range are its own, so several run side by side and beside a real one.
//
// Close leaves nothing: pods, daemon, shims and containers, mounts and bridge
// are gone. It must not judge a runtime; tests do that through Runtime and Image.
package testnode

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The two runtimes.
const (
	Cloister   = "cloister"
	Containerd = "containerd"
)

// Families are those of the addresses that pods get. With IPv6 streams are
// served on ::1, too.
type Families int

// The families; pods of a node with both have their IPv4 address first.
const (
	IPv4 Families = iota
	IPv6
	DualStack
)

// Options describe a node. The zero value of a field means its default.
type Options struct {
	// Runtime is Cloister (the default) or Containerd.
	Runtime string
	// Bin is the folder with the daemon and its shim.
	Bin string
	// Hosts is the registry configuration folder (HOST/hosts.toml).
	Hosts string
	// Network is "cni" (the default) or, with Cloister, "builtin".
	Network string
	// Families of the pods' addresses, by default IPv4.
	Families Families
	// CNIBin is the folder with CNI plugins. Cloister needs none.
	CNIBin string
	// Handlers are OCI runtimes by handler name. Empty lets Cloister find what
	// the machine has; containerd then gets runc from PATH.
	Handlers map[string]string
	// Shims are external shims (runtime_path) that run runc, by handler name.
	Shims map[string]string
	// Guests is a folder of guests for virtual machines. With it there is a
	// handler "vm", which takes KVM where it works and else TCG. Containerd finds
	// containerd-shim-cloister-vm-v2 in PATH.
	Guests string
	// GuestOptions are more lines for that handler's options.
	GuestOptions []string
	// Default names the default handler; empty leaves the choice to Cloister.
	Default string
	// Trash is a folder on /tmp's file system into which Close moves the node's
	// instead of deleting it. For minutes after many files were deleted ext4 makes
	// new ones slowly, which would count against whoever is measured next.
	Trash string
	// MemoryState mounts a tmpfs on the state folder, as /run is one on nodes, and
	// has containerd's OCI runtimes keep their state there as Cloister's do.
	MemoryState bool
	// LogLevel of the daemon, by default info.
	LogLevel string
	// Extra is a further configuration file, of version 3, which is laid over
	// the node's own.
	Extra string
}

// Node is a running daemon and all that belongs to it.
type Node struct {
	// Dir is the private folder; daemon.log and config.toml are in it.
	Dir string
	// Socket is the path of the CRI socket.
	Socket string
	// Runtime and Image talk to the daemon, also after a Restart.
	Runtime cri.RuntimeServiceClient
	Image   cri.ImageServiceClient

	opts   Options
	bridge string
	conn   *grpc.ClientConn
	daemon *exec.Cmd
	ended  chan struct{}
	log    *os.File
}

// Endpoint is Socket as clients write it.
func (n *Node) Endpoint() string { return "unix://" + n.Socket }

// PID is the daemon's process.
func (n *Node) PID() int { return n.daemon.Process.Pid }

// Root is the daemon's folder of what outlives a reboot.
func (n *Node) Root() string { return filepath.Join(n.Dir, "root") }

// State is the daemon's folder of what a reboot may take.
func (n *Node) State() string { return filepath.Join(n.Dir, "state") }

// Start runs a daemon and returns when it reports runtime and network ready.
func Start(ctx context.Context, opts Options) (*Node, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("a private container runtime needs root")
	}
	if opts.Runtime == "" {
		opts.Runtime = Cloister
	}
	if opts.Network == "" {
		opts.Network = "cni"
	}
	dir, err := os.MkdirTemp("/tmp", "cln") // short: unix sockets lie below it
	if err != nil {
		return nil, err
	}
	// Pods with a user namespace of their own pass through it to their root.
	if err := os.Chmod(dir, 0o711); err != nil {
		return nil, err
	}
	n := &Node{Dir: dir, Socket: filepath.Join(dir, "cri.sock"), opts: opts, bridge: filepath.Base(dir)}
	if len(n.bridge) > 15 {
		n.bridge = n.bridge[:15]
	}
	if err := n.start(ctx); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

func (n *Node) start(ctx context.Context) error {
	if err := n.configure(); err != nil {
		return err
	}
	var err error
	if n.log, err = os.Create(filepath.Join(n.Dir, "daemon.log")); err != nil {
		return err
	}
	n.conn, err = grpc.NewClient("unix://"+n.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		return err
	}
	n.Runtime, n.Image = cri.NewRuntimeServiceClient(n.conn), cri.NewImageServiceClient(n.conn)
	return n.Run(ctx)
}

// Run starts the daemon again after Stop or Kill and waits until it is ready.
func (n *Node) Run(ctx context.Context) error {
	config := filepath.Join(n.Dir, "config.toml")
	args := map[string][]string{
		Cloister: {"daemon", "--config", config, "--root", n.Root(), "--state", n.State(), "--address", n.Socket,
			"--log-level", n.level()},
		Containerd: {"--config", config, "--log-level", n.level()},
	}[n.opts.Runtime]
	if args == nil {
		return fmt.Errorf("runtime %q: choose %s or %s", n.opts.Runtime, Cloister, Containerd)
	}
	n.daemon = exec.Command(filepath.Join(n.opts.Bin, n.opts.Runtime), args...)
	n.daemon.Stdout, n.daemon.Stderr = n.log, n.log
	n.daemon.Env = append(os.Environ(), "PATH="+n.opts.Bin+":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	n.daemon.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := n.daemon.Start(); err != nil {
		return err
	}
	n.ended = make(chan struct{})
	go func(cmd *exec.Cmd, ended chan struct{}) {
		_ = cmd.Wait() // how it ended is in its log
		close(ended)
	}(n.daemon, n.ended)
	if err := n.ready(ctx); err != nil {
		return fmt.Errorf("%s: %w; the end of %s:\n%s", n.opts.Runtime, err, n.log.Name(), n.LogTail(20))
	}
	return nil
}

func (n *Node) level() string {
	if n.opts.LogLevel == "" {
		return "info"
	}
	return n.opts.LogLevel
}

// ready asks until the daemon reports both conditions true.
func (n *Node) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	last := errors.New("no answer")
	for {
		st, err := n.Runtime.Status(ctx, &cri.StatusRequest{})
		if err == nil {
			if err = unready(st.GetStatus()); err == nil {
				return nil
			}
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-n.ended:
			return errors.New("the daemon ended")
		case <-ctx.Done():
			return fmt.Errorf("not ready in time: %w", last)
		case <-tick.C:
		}
	}
}

func unready(st *cri.RuntimeStatus) error {
	for _, c := range st.GetConditions() {
		if (c.Type == "RuntimeReady" || c.Type == "NetworkReady") && !c.Status {
			return fmt.Errorf("%s is false: %s: %s", c.Type, c.Reason, c.Message)
		}
	}
	return nil
}

// Stop ends the daemon with SIGTERM; pods stay.
func (n *Node) Stop(ctx context.Context) error { return n.signal(ctx, syscall.SIGTERM) }

// Kill ends the daemon with SIGKILL; pods stay.
func (n *Node) Kill(ctx context.Context) error { return n.signal(ctx, syscall.SIGKILL) }

func (n *Node) signal(ctx context.Context, sig syscall.Signal) error {
	if err := n.daemon.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-n.ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s did not end on %v: %w", n.opts.Runtime, sig, ctx.Err())
	}
}

func (n *Node) running() bool {
	select {
	case <-n.ended:
		return false
	default:
		return true
	}
}

// Close removes all pods, ends everything and deletes the folder. With
// KEEP=1 in the environment the folder with the log stays.
func (n *Node) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	var errs []error
	if n.daemon != nil && n.daemon.Process != nil {
		if !n.running() { // pods are removed by a daemon, a test may have ended it
			if err := n.Run(ctx); err != nil {
				errs = append(errs, err)
			}
		}
		if err := n.removePods(ctx); err != nil {
			errs = append(errs, err)
		}
		stop, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		if err := n.Stop(stop); err != nil {
			errs = append(errs, err, n.Kill(ctx))
		}
	}
	if n.conn != nil {
		n.conn.Close()
	}
	if n.log != nil {
		n.log.Close()
	}
	errs = append(errs, n.sweep())
	if n.opts.MemoryState {
		if err := unix.Unmount(n.State(), unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("unmount the state folder: %w", err))
		}
	}
	switch {
	case os.Getenv("KEEP") != "":
		fmt.Fprintln(os.Stderr, "kept", n.Dir)
	case n.opts.Trash != "":
		errs = append(errs, os.Rename(n.Dir, filepath.Join(n.opts.Trash, filepath.Base(n.Dir))))
	default:
		errs = append(errs, os.RemoveAll(n.Dir))
	}
	return errors.Join(errs...)
}
