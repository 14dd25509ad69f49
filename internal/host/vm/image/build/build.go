// Package build makes guests. It promises that the same inputs give the same
// bytes, and that nothing of the host is installed or changed. It knows nothing
// of machines.
package build

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	tiny "cloister.dev/internal/host/elf"
	"cloister.dev/internal/host/vm/image"
)

// Options say what to make a guest of.
type Options struct {
	Root  string // folder of all guests
	Name  string // empty: image.DefaultName
	Agent string // path of the static cloister-agent
	// Runtime is the path of crun; empty: looked up in PATH.
	Runtime string

	// Kernel is a bzImage or an ELF vmlinux, and Modules its folder
	// (…/lib/modules/VERSION). Both empty: Package.
	Kernel, Modules string
	// Package is a Debian kernel package; empty: linux-image-cloud-amd64. It
	// is downloaded and unpacked, not installed.
	Package string
	// Cache keeps downloads; empty: they are thrown away.
	Cache string
	// ExtraModules are added with what they need.
	ExtraModules []string

	Log *slog.Logger
}

// runtimePath is where crun lies in the guest.
const runtimePath = "/usr/bin/crun"

// Guest makes a guest, in place of an older one of its name.
func Guest(ctx context.Context, o Options) (g image.Guest, err error) {
	o.Name, o.Runtime = cmp.Or(o.Name, image.DefaultName), cmp.Or(o.Runtime, "crun")
	if err := image.CheckName(o.Name); err != nil {
		return g, err
	}
	if (o.Kernel == "") != (o.Modules == "") {
		return g, fmt.Errorf("a kernel and the folder of its modules go together; name both or none: %w", errdefs.ErrInvalidArgument)
	}
	if err := os.MkdirAll(o.Root, 0o700); err != nil {
		return g, fmt.Errorf("make the folder of guests: %w", err)
	}
	work, err := os.MkdirTemp(o.Root, ".build-")
	if err != nil {
		return g, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()

	src, err := source(ctx, o, work)
	if err != nil {
		return g, err
	}
	m, kernel, initrd, err := assemble(ctx, o, src)
	if err != nil {
		return g, fmt.Errorf("build guest %q: %w", o.Name, err)
	}
	if err := image.Put(o.Root, o.Name, work, m, kernel, initrd); err != nil {
		return g, err
	}
	return image.Open(o.Root, o.Name)
}

// source finds the kernel that the options name.
func source(ctx context.Context, o Options, work string) (unpacked, error) {
	if o.Kernel == "" {
		cache := cmp.Or(o.Cache, filepath.Join(work, "cache"))
		return fetchPackage(ctx, cmp.Or(o.Package, DefaultPackage), cache, filepath.Join(work, "kernel"))
	}
	return unpacked{kernel: o.Kernel, modules: o.Modules, version: filepath.Base(filepath.Clean(o.Modules)), source: o.Kernel}, nil
}

// assemble makes the two files of a guest in memory.
func assemble(ctx context.Context, o Options, src unpacked) (m image.Manifest, kernel, initrd []byte, err error) {
	packed, err := os.ReadFile(src.kernel)
	if err != nil {
		return m, nil, nil, fmt.Errorf("read the kernel: %w", err)
	}
	if kernel, err = bootable(packed); err != nil {
		return m, nil, nil, fmt.Errorf("kernel %s: %w", src.kernel, err)
	}
	t := skeleton()
	bare, err := tiny.Say(image.BareMark + "\n")
	if err != nil {
		return m, nil, nil, err
	}
	t.file(image.BarePath, 0o755, bare)
	if m.Agent, err = addAgent(t, o.Agent); err != nil {
		return m, nil, nil, err
	}
	if m.Runtime, err = addRuntime(ctx, t, o.Runtime); err != nil {
		return m, nil, nil, err
	}
	contents, err := addModules(t, src, o.ExtraModules)
	if err != nil {
		return m, nil, nil, err
	}
	b, err := json.MarshalIndent(contents, "", " ")
	if err != nil {
		return m, nil, nil, err
	}
	t.file(image.ContentsPath, 0o644, b)
	var archive bytes.Buffer
	if err := t.writeTo(&archive); err != nil {
		return m, nil, nil, err
	}
	initrd = archive.Bytes()
	m.KernelVersion, m.KernelSource = src.version, src.source
	m.Modules = slices.Sorted(maps.Keys(contents.Modules))
	m.Size = int64(len(kernel) + len(initrd))
	sum := sha256.New()
	sum.Write(kernel)
	sum.Write(initrd)
	m.Digest = "sha256:" + hex.EncodeToString(sum.Sum(nil))
	return m, kernel, initrd, nil
}

// skeleton has the folders that the agent mounts on, and the console that the
// kernel opens for it.
func skeleton() tree {
	t := tree{}
	for _, d := range [...]string{"dev", "proc", "sys", "run", "etc", "mnt", "var"} {
		t.dir(d, 0o755)
	}
	t.dir("root", 0o700)
	t.dir("tmp", 0o1777)
	t.char("dev/console", 0o600, 5, 1)
	return t
}

func addAgent(t tree, path string) (version string, err error) {
	f, err := elf.Open(path)
	if err != nil {
		return "", fmt.Errorf("the guest's agent: %w", err)
	}
	libs, err := f.ImportedLibraries()
	f.Close()
	if err != nil || len(libs) > 0 {
		return "", errors.Join(fmt.Errorf("the agent %s is not static (it needs %v); build it with CGO_ENABLED=0: %w", path, libs, errdefs.ErrInvalidArgument), err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("the guest's agent: %w", err)
	}
	t.file("init", 0o755, data)
	if info, err := buildinfo.ReadFile(path); err == nil {
		version = info.Main.Version
	}
	return version, nil
}

func addRuntime(ctx context.Context, t tree, name string) (version string, err error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("the guest's OCI runtime: %w; install the package crun", err)
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return "", err
	}
	if err := addProgram(t, path, runtimePath); err != nil {
		return "", fmt.Errorf("the guest's OCI runtime: %w", err)
	}
	out, err := run(ctx, "/", path, "--version")
	if err != nil {
		return "", err
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.TrimSpace(line), nil
}

func addModules(t tree, src unpacked, extra []string) (image.Contents, error) {
	c := image.Contents{Kernel: src.version, Runtime: runtimePath}
	have, err := findModules(src.modules)
	if err != nil {
		return c, err
	}
	p := picked{data: map[string][]byte{}, needs: map[string][]string{}, aliases: map[string][]string{}}
	for _, list := range append(slices.Collect(maps.Values(bootModules())), containerModules(), laterModules()) {
		for _, name := range list {
			if err := have.pick(&p, name, false); err != nil {
				return c, err
			}
		}
	}
	for _, name := range extra {
		if err := have.pick(&p, strings.ReplaceAll(name, "-", "_"), true); err != nil {
			return c, err
		}
	}
	c.Modules = p.place(t, src.version)
	for machine, wanted := range bootModules() {
		t.file(image.BootPath(machine), 0o644, []byte(strings.Join(bootOrder(c.Modules, wanted), "\n")+"\n"))
	}
	return c, nil
}
