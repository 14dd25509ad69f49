package link

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// NetNS is an open network namespace.
type NetNS struct {
	f    *os.File
	path string
}

// OpenNetNS opens the namespace pinned at path. The error is fs.ErrNotExist
// when nothing is there, and also when the file is there but no namespace is
// mounted on it any more.
func OpenNetNS(path string) (*NetNS, error) {
	if path == "" {
		return nil, fmt.Errorf("open network namespace: no path: %w", fs.ErrNotExist)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	if st.Type != unix.NSFS_MAGIC && st.Type != unix.PROC_SUPER_MAGIC {
		f.Close()
		return nil, fmt.Errorf("%s is no network namespace any more: %w", path, fs.ErrNotExist)
	}
	return &NetNS{f: f, path: path}, nil
}

// Path is where the namespace was opened.
func (n *NetNS) Path() string { return n.path }

// FD is the open descriptor; it stays valid until Close.
func (n *NetNS) FD() int { return int(n.f.Fd()) }

// Close closes the descriptor; the namespace itself stays.
func (n *NetNS) Close() error { return n.f.Close() }

// Do runs fn on a thread that is inside the namespace. The thread goes back
// before anything else may run on it; if it cannot, it ends with its goroutine
// instead of returning to the scheduler in the wrong namespace.
func (n *NetNS) Do(fn func() error) error {
	done := make(chan error, 1)
	offMainThread(func() {
		home, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("open own network namespace: %w", err)
			return
		}
		defer home.Close()
		if err := unix.Setns(n.FD(), unix.CLONE_NEWNET); err != nil {
			runtime.UnlockOSThread()
			if errors.Is(err, unix.EINVAL) {
				err = fmt.Errorf("%w (%w)", err, fs.ErrNotExist)
			}
			done <- fmt.Errorf("enter network namespace %s: %w", n.path, err)
			return
		}
		err = fn()
		if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	})
	return <-done
}

// offMainThread starts f on a thread of its own that is not the process's main
// one: that one's namespaces are what others see as the process's, and it
// cannot end. f unlocks the thread when it is fit for others.
func offMainThread(f func()) {
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			f()
			return
		}
		elsewhere := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(elsewhere)
			f()
		}()
		<-elsewhere // only now the main thread may take other work
		runtime.UnlockOSThread()
	}()
}

// identity tells namespaces apart.
type identity struct{ dev, ino uint64 }

func (n *NetNS) identity() (identity, error) {
	var st unix.Stat_t
	if err := unix.Fstat(n.FD(), &st); err != nil {
		return identity{}, fmt.Errorf("stat network namespace %s: %w", n.path, err)
	}
	return identity{st.Dev, st.Ino}, nil
}
