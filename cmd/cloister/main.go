// cloister is the command line of Cloister, and with "cloister daemon" its CRI
// server. Each file of this package is one command: flags, one call into a
// package, output.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

// version is set by the build (see the Makefile).
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	// A second signal ends the program at once, should the end itself hang.
	context.AfterFunc(ctx, stop)
	a := &app{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr}
	root := a.root()
	root.SetArgs(originalFlags(os.Args[1:]))
	err := root.ExecuteContext(ctx)
	stop()
	os.Exit(report(err))
}

// report prints what there is to say and gives the exit code.
func report(err error) int {
	code, sentence := judge(err)
	for line := range strings.Lines(sentence) {
		fmt.Fprintln(os.Stderr, "cloister: "+strings.TrimSuffix(line, "\n"))
	}
	return code
}
