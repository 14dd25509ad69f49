// Command cloister-agent is the first program of a virtual machine: it makes
// the machine a pod and runs the pod's containers with the container backend
// of cloister-shim. It is a program of its own because an emulated machine pays
// for each package that a program initializes.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"cloister.dev/internal/guest"
)

func main() {
	switch name := filepath.Base(os.Args[0]); {
	case name == "modprobe" && len(os.Args) > 1:
		if err := guest.Modprobe(os.Args[len(os.Args)-1]); err != nil {
			os.Exit(1) // the kernel, who asks, wants no more
		}
	case os.Getpid() == 1:
		guest.Init()
	default:
		fmt.Fprintln(os.Stderr, "cloister-agent is the first process of a virtual machine; \"cloister guest build\" puts it there")
		os.Exit(2)
	}
}
