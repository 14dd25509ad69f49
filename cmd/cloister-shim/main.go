// Command cloister-shim is the sandbox host: it runs the containers of all
// pods of a machine behind containerd's shim protocol, and outlives whoever
// asked for them.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"cloister.dev/internal/host/stock"
)

const usage = `cloister-shim runs containers for the cloister daemon.

  cloister-shim keep  --state DIR [--backend B] [--log-level L]   start the keeper, which starts "serve" and keeps it alive
  cloister-shim serve --state DIR [--backend B] [--log-level L]   serve the shim protocol on DIR/shim.sock
  cloister-shim stop  --state DIR [--force]                       end both; containers that run stay (only with --force)
  cloister-shim version

A backend is container (the default) or vm. Under the names
containerd-shim-cloister-v2 and containerd-shim-cloister-vm-v2 the program is a
shim of containerd.
`

func main() {
	if stock.Backend(os.Args[0]) != "" {
		os.Exit(underContainerd(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
	}
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// Backends by name.
const (
	containerBackend = "container"
	vmBackend        = "vm"
)

type options struct {
	state   string
	backend string
	level   slog.Level
	force   bool
	adopt   int
	log     *slog.Logger
}

func run(args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	commands := map[string]func(context.Context, options) error{"keep": keep, "serve": serve, "stop": stopKeeper}
	name := args[0]
	switch f := commands[name]; {
	case name == "version" || name == "--version" || name == "-v":
		fmt.Fprintln(stdout, "cloister-shim", version())
		return 0
	case name == "help" || name == "--help" || name == "-h":
		fmt.Fprint(stdout, usage)
		return 0
	case f == nil:
		fmt.Fprintf(stderr, "cloister-shim: unknown command %q\n\n%s", name, usage)
		return 2
	default:
		o, err := parse(name, args[1:], stderr)
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		if err == nil {
			err = f(ctx, o)
		}
		if err != nil {
			fmt.Fprintf(stderr, "cloister-shim %s: %v\n", name, err)
			return 1
		}
		return 0
	}
}

func parse(name string, args []string, stderr io.Writer) (o options, err error) {
	fs := flag.NewFlagSet("cloister-shim "+name, flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&o.state, "state", "", "folder of all state (required)")
	fs.TextVar(&o.level, "log-level", slog.LevelInfo, "debug, info, warn or error")
	if name != "stop" {
		fs.StringVar(&o.backend, "backend", containerBackend, "container or vm")
	}
	if name == "stop" {
		fs.BoolVar(&o.force, "force", false, "end the shim although tasks are left; they run on")
	}
	if name == "keep" {
		fs.IntVar(&o.adopt, "adopt", 0, "take over the serving process of this pid, which says so itself when its keeper has died")
	}
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	if fs.NArg() > 0 {
		return o, fmt.Errorf("unexpected %q", strings.Join(fs.Args(), " "))
	}
	if o.state == "" || o.state[0] != '/' {
		return o, errors.New("--state must name a folder by its absolute path")
	}
	if name != "stop" && o.backend != containerBackend && o.backend != vmBackend {
		return o, fmt.Errorf("--backend %q: want %s or %s", o.backend, containerBackend, vmBackend)
	}
	o.log = slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: o.level})).With("proc", name)
	return o, nil
}

// version is the module's version, or the commit that it was built from.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := info.Main.Version
	if v == "" {
		v = "(devel)"
	}
	return v
}
