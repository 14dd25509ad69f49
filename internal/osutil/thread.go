package osutil

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// OnThread runs f on a thread of its own and waits for it. The thread ends
// with f, so f may leave namespaces and cgroups behind that the rest of the
// program has to stay in. f never runs on the main thread, which cannot end
// and whose namespaces are what others see as the process's.
func OnThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			done <- f()
			return
		}
		elsewhere := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(elsewhere)
			done <- f()
		}()
		<-elsewhere // only now the main thread may take other work
		runtime.UnlockOSThread()
	}()
	return <-done
}
