package pod

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"cloister.dev/internal/oci"
)

// namespaces says which namespaces of a sandbox are its own, and where they
// are pinned. A namespace lives as long as its pin: no process holds it.
type namespaces struct {
	dir      string // holds one file a namespace
	netPath  string // that of the network namespace, should it lie elsewhere
	net, ipc bool
	uts      bool
	user     bool
	uids     []idMapping
	gids     []idMapping
	hostname string
	sysctls  map[string]string
}

func (n namespaces) path(kind string) string {
	if kind == "net" && n.netPath != "" {
		return n.netPath
	}
	return filepath.Join(n.dir, kind)
}

// netNSPath is where the network namespace of a sandbox is pinned.
func (s *Service) netNSPath(id string) string {
	if s.o.NetNSDir == "" {
		return filepath.Join(s.podDir(id), "ns", "net")
	}
	return filepath.Join(s.o.NetNSDir, "cloister-"+id)
}

// removeFolders removes a sandbox's folder and the pin of its network
// namespace, should that lie elsewhere.
func (s *Service) removeFolders(sb *sandbox) error {
	dir, pin := s.podDir(sb.record().ID), sb.record().NetNS
	if err := removeFolder(dir); err != nil {
		return err
	}
	if pin == "" || strings.HasPrefix(pin, dir+"/") {
		return nil
	}
	if err := unix.Unmount(pin, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unpin the network namespace: %w", err)
	}
	if err := os.Remove(pin); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the pin of the network namespace: %w", err)
	}
	return nil
}

func (n namespaces) pins() []string {
	var ks []string
	for _, k := range []struct {
		kind string
		own  bool
	}{{"net", n.net}, {"ipc", n.ipc}, {"uts", n.uts}, {"user", n.user}} {
		if k.own {
			ks = append(ks, k.kind)
		}
	}
	return ks
}

// pin makes the namespaces and mounts each at its file.
func (n namespaces) pin() error {
	if err := os.MkdirAll(n.dir, 0o711); err != nil {
		return fmt.Errorf("make the folder of the namespaces: %w", err)
	}
	if n.net {
		if err := os.MkdirAll(filepath.Dir(n.path("net")), 0o755); err != nil {
			return fmt.Errorf("make the folder of network namespaces: %w", err)
		}
	}
	for _, k := range n.pins() {
		f, err := os.OpenFile(n.path(k), os.O_CREATE|os.O_RDONLY, 0o444)
		if err != nil {
			return fmt.Errorf("make the pin of the %s namespace: %w", k, err)
		}
		f.Close()
	}
	if n.user {
		return n.pinInUserNamespace()
	}
	return onOwnThread(func() error { return n.unshare() })
}

// onOwnThread runs f on a thread that nobody else uses and that is not the
// first of the process, whose namespaces are what /proc/self shows. When f
// leaves the thread in foreign namespaces it must return errTainted: the
// thread then dies with the goroutine.
func onOwnThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			err := onOwnThread(f) // gets another one, this goroutine holds the first
			runtime.UnlockOSThread()
			done <- err
			return
		}
		err := f()
		if !errors.Is(err, errTainted) {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

var errTainted = errors.New("thread could not return to its namespaces")

func (n namespaces) unshare() (err error) {
	flags := 0
	back := map[string]int{}
	for kind, f := range n.flags() {
		fd, err := unix.Open("/proc/thread-self/ns/"+kind, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open the own %s namespace: %w", kind, err)
		}
		defer unix.Close(fd)
		back[kind] = fd
		flags |= f
	}
	if flags == 0 {
		return n.inside()
	}
	if err := unix.Unshare(flags); err != nil {
		return fmt.Errorf("make namespaces: %w", err)
	}
	defer func() {
		for kind, fd := range back {
			if e := unix.Setns(fd, n.flags()[kind]); e != nil {
				err = errors.Join(err, errTainted, e)
			}
		}
	}()
	if err := n.inside(); err != nil {
		return err
	}
	for kind := range back {
		if err := unix.Mount("/proc/thread-self/ns/"+kind, n.path(kind), "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("pin the %s namespace: %w", kind, err)
		}
	}
	return nil
}

func (n namespaces) flags() map[string]int {
	flags := map[string]int{}
	if n.net {
		flags["net"] = unix.CLONE_NEWNET
	}
	if n.ipc {
		flags["ipc"] = unix.CLONE_NEWIPC
	}
	if n.uts {
		flags["uts"] = unix.CLONE_NEWUTS
	}
	return flags
}

// inside sets what belongs to the namespaces; the calling thread is in them.
func (n namespaces) inside() error {
	if n.uts && n.hostname != "" {
		if err := unix.Sethostname([]byte(n.hostname)); err != nil {
			return fmt.Errorf("set hostname %q: %w", n.hostname, err)
		}
	}
	for name, value := range n.sysctls {
		if err := writeSysctl(name, value); err != nil {
			return err
		}
	}
	return nil
}

// writeSysctl sets a sysctl, whose name was validated, of the calling
// thread's namespaces.
func writeSysctl(name, value string) error {
	f, err := os.OpenFile(oci.SysctlPath(name), os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("set sysctl %s: %w", name, err)
	}
	defer f.Close()
	if _, err := f.WriteString(value); err != nil {
		return fmt.Errorf("set sysctl %s to %q: %w", name, value, err)
	}
	return nil
}

// pinInUserNamespace makes all namespaces at once with a child, so that the
// others belong to the new user namespace. The child is stopped at its exec
// and never runs.
func (n namespaces) pinInUserNamespace() error {
	return onOwnThread(func() error {
		clone := unix.CLONE_NEWUSER
		for _, f := range n.flags() {
			clone |= f
		}
		cmd := exec.Command("/proc/self/exe")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: uintptr(clone), Ptrace: true, Pdeathsig: syscall.SIGKILL,
			UidMappings: sysMappings(n.uids), GidMappings: sysMappings(n.gids), GidMappingsEnableSetgroups: true}
		if err := cmd.Start(); err != nil {
			return fmt.Errorf("make a user namespace: %w", err)
		}
		defer func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait() // tells only of the kill
		}()
		proc := fmt.Sprintf("/proc/%d/ns/", cmd.Process.Pid)
		for _, k := range n.pins() {
			if err := unix.Mount(proc+k, n.path(k), "", unix.MS_BIND, ""); err != nil {
				return fmt.Errorf("pin the %s namespace: %w", k, err)
			}
		}
		return n.enter()
	})
}

// enter sets what belongs to already pinned namespaces, from the node's user
// namespace.
func (n namespaces) enter() (err error) {
	back := map[string]int{}
	defer func() {
		for kind, fd := range back {
			if e := unix.Setns(fd, n.flags()[kind]); e != nil {
				err = errors.Join(err, errTainted, e)
			}
			unix.Close(fd)
		}
	}()
	for kind, flag := range n.flags() {
		own, err := unix.Open("/proc/thread-self/ns/"+kind, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open the own %s namespace: %w", kind, err)
		}
		fd, err := unix.Open(n.path(kind), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			unix.Close(own)
			return fmt.Errorf("open the pinned %s namespace: %w", kind, err)
		}
		err = unix.Setns(fd, flag)
		unix.Close(fd)
		if err != nil {
			unix.Close(own)
			return fmt.Errorf("enter the pinned %s namespace: %w", kind, err)
		}
		back[kind] = own
	}
	return n.inside()
}

func sysMappings(ms []idMapping) []syscall.SysProcIDMap {
	var out []syscall.SysProcIDMap
	for _, m := range ms {
		out = append(out, syscall.SysProcIDMap{ContainerID: int(m.Container), HostID: int(m.Host), Size: int(m.Length)})
	}
	return out
}

// inNetNS runs f on a thread inside the network namespace pinned at path.
func inNetNS(path string, f func() error) error {
	return onOwnThread(func() (err error) {
		own, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open the own network namespace: %w", err)
		}
		defer unix.Close(own)
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open the pod's network namespace: %w", err)
		}
		defer unix.Close(fd)
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter the pod's network namespace: %w", err)
		}
		defer func() {
			if e := unix.Setns(own, unix.CLONE_NEWNET); e != nil {
				err = errors.Join(err, errTainted, e)
			}
		}()
		return f()
	})
}
