package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"google.golang.org/protobuf/proto"

	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/config"
	"cloister.dev/internal/host/stock"
	"cloister.dev/internal/host/vm"
)

// stockState is where the resident shims of stock containerds live;
// CLOISTER_SHIM_STATE moves it.
const stockState = "/run/cloister/shims"

// underContainerd is the program under one of the names by which containerd
// finds a shim.
func underContainerd(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	c := stock.Call{Backend: stock.Backend(os.Args[0]), State: stockState}
	if dir := os.Getenv("CLOISTER_SHIM_STATE"); dir != "" {
		c.State = dir
	}
	fs := flag.NewFlagSet(filepath.Base(os.Args[0]), flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&c.ID, "id", "", "of the sandbox")
	fs.StringVar(&c.Namespace, "namespace", "", "containerd's namespace")
	fs.StringVar(&c.Address, "address", "", "containerd's socket")
	bundle := fs.String("bundle", ".", "folder of the sandbox")
	showVersion := fs.Bool("v", false, "print the version")
	info := fs.Bool("info", false, "print what containerd asks a shim about itself, as a message")
	for _, unused := range [...]string{"publish-binary", "socket"} {
		fs.String(unused, "", "not needed")
	}
	fs.Bool("debug", false, "not needed: the resident shim has a log level of its own")
	if err := fs.Parse(args); err != nil {
		return 2
	}
	err := func() (err error) {
		if c.Program, err = os.Executable(); err != nil {
			return err
		}
		switch action := fs.Arg(0); {
		case *showVersion:
			_, err = fmt.Fprintln(stdout, fs.Name(), version())
			return err
		case *info:
			return c.Info(stdout, version())
		case c.ID == "" || c.Namespace == "":
			return errors.New("this program is run by containerd, as a shim")
		case action == "start":
			if err := leaveOptions(c.Backend, *bundle, stdin); err != nil {
				return err
			}
			return c.Start(ctx, stdout)
		case action == "delete":
			return c.Delete(ctx, stdout)
		default:
			return fmt.Errorf("unknown action %q", action)
		}
	}()
	if err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", fs.Name(), err)
		return 1
	}
	return 0
}

// leaveOptions puts the options of a handler of virtual machines where the
// resident shim finds them, typed: it reads no TOML.
func leaveOptions(backend, bundle string, stdin io.Reader) error {
	if backend != vmBackend {
		return nil
	}
	path, body, err := stock.Options(stdin)
	if err != nil {
		return err
	}
	if len(body) == 0 && path != "" {
		if body, err = os.ReadFile(path); err != nil {
			return fmt.Errorf("read the handler's ConfigPath: %w", err)
		}
	}
	o, err := config.ParseMachineOptions(body)
	if err != nil {
		return fmt.Errorf("the handler's options: %w", err)
	}
	b, err := proto.Marshal(machineOptions(o))
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(bundle, vm.OptionsFile), b, 0o600)
}

func machineOptions(m config.MachineOptions) *hostv1.MachineOptions {
	if m.Guests == "" {
		m.Guests = filepath.Join(config.Default().Root, "guests")
	}
	return &hostv1.MachineOptions{Path: m.Path, Guests: m.Guests, Guest: m.Guest, Kernel: m.Kernel, Initrd: m.Initrd,
		KernelParams: m.KernelParams, MachineType: m.MachineType, Accel: m.Accel,
		DefaultVcpus: m.DefaultVCPUs, DefaultMaxvcpus: m.DefaultMaxVCPUs, DefaultMemory: m.DefaultMemory, DefaultMaxmemory: m.DefaultMaxMemory,
		OverheadMemory: m.OverheadMemory, SharedFs: m.SharedFS, ImageLayers: m.ImageLayers, VirtioFsDaemon: m.VirtioFSDaemon, VirtioFsCache: m.VirtioFSCache,
		VirtioFsExtraArgs: m.VirtioFSExtraArgs, EnableAnnotations: m.EnableAnnotations, BootTimeout: m.BootTimeout}
}
