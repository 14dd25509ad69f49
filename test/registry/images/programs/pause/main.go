// pause is the first process of a pod sandbox for runtimes that need one: it
// does nothing until a signal ends it. (A child whose exit nobody waits for is
// reaped by the kernel, because SIGCHLD is not asked for.)
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	signal.Ignore(syscall.SIGCHLD)
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGINT, syscall.SIGTERM)
	<-end
}
