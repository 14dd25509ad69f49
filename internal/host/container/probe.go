package container

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/elf"
	"cloister.dev/internal/host/proc"
)

// ociVersions are tried newest first with a runtime that does not declare
// what it accepts.
var ociVersions = [...]string{"1.2.1", "1.1.0", "1.0.2", "1.0.0"}

// Probe is part of backend.Backend. Every answer comes from a container that was
// run: what a runtime declares is not always what the machine can do.
func (b *Backend) Probe(ctx context.Context, req *hostv1.ProbeRequest) (*hostv1.ProbeResponse, error) {
	r, err := b.runtime(req.Binary)
	if errdefs.IsNotFound(err) {
		return &hostv1.ProbeResponse{Reason: err.Error()}, nil
	}
	if err != nil {
		return nil, err
	}
	resp := &hostv1.ProbeResponse{Path: r.path, Version: b.version(ctx, r)}
	o := backend.Runtime{Binary: r.path, Root: req.Root, SystemdCgroup: req.SystemdCgroup}
	version, hide, err := b.firstRun(ctx, r, o)
	if ctx.Err() != nil {
		return nil, fmt.Errorf("probe %s: %w", r.path, err)
	}
	r.learn.Lock()
	if !r.known || err == nil {
		r.known, r.hideUnified = true, hide
	}
	r.learn.Unlock()
	if err != nil {
		resp.Reason = err.Error()
		return resp, nil //nolint:nilerr // that it does not work is the answer
	}
	resp.Works, resp.OciVersion = true, version
	began := time.Now()
	if err := b.tryMicro(ctx, r, o, microPlain, version, b.runner(r)); err != nil {
		return &hostv1.ProbeResponse{Path: r.path, Version: resp.Version, Reason: fmt.Sprintf("worked once and then not: %v", err)}, nil
	}
	resp.Millis = uint32(max(1, time.Since(began).Milliseconds()))
	resp.UserNamespaces = b.tryMicro(ctx, r, o, microUserNS, version, b.runner(r)) == nil
	resp.IdmappedMounts = resp.UserNamespaces && b.tryMicro(ctx, r, o, microIDMap, version, b.runner(r)) == nil
	resp.RecursiveReadOnly = b.tryMicro(ctx, r, o, microRRO, version, b.runner(r)) == nil
	return resp, ctx.Err()
}

// firstRun finds the newest version of config.json that r runs, and whether
// the v2 hierarchy must be hidden from it.
func (b *Backend) firstRun(ctx context.Context, r *ociRuntime, o backend.Runtime) (version string, hide bool, err error) {
	var errs []error
	versions := ociVersions[:]
	if v := b.declaredVersion(ctx, r); v != "" {
		versions = []string{v}
	}
	runs := []runner{b.reaper.RunCommand}
	if isHybrid() {
		runs = append(runs, b.runHidden)
	}
	for i, run := range runs {
		for _, v := range versions {
			err := b.tryMicro(ctx, r, o, microPlain, v, run)
			if err == nil {
				return v, i > 0, nil
			}
			if ctx.Err() != nil {
				return "", false, ctx.Err()
			}
			errs = append(errs, err)
		}
	}
	// The last attempt with the oldest version says most.
	return "", false, fmt.Errorf("%s cannot run a container on this machine: %w", r.path, errs[len(errs)-1])
}

// output runs the binary with args and gives the beginning of its output.
func (b *Backend) output(ctx context.Context, r *ociRuntime, args ...string) []byte {
	f, err := os.CreateTemp(b.dir, "probe-")
	if err != nil {
		return nil
	}
	defer os.Remove(f.Name())
	defer f.Close()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	exit, err := b.reaper.RunCommand(ctx, proc.Command{Path: r.path, Args: append([]string{r.path}, args...), Env: os.Environ(), Dir: "/",
		Files: [3]*os.File{nil, f, nil}})
	if err != nil || exit.Status != 0 {
		return nil
	}
	buf := make([]byte, maxLogged)
	n, _ := f.ReadAt(buf, 0)
	return buf[:n]
}

func (b *Backend) version(ctx context.Context, r *ociRuntime) string {
	line, _, _ := strings.Cut(string(b.output(ctx, r, "--version")), "\n")
	return strings.TrimSpace(line)
}

// declaredVersion asks runtimes that have the command "features".
func (b *Backend) declaredVersion(ctx context.Context, r *ociRuntime) string {
	var f struct{ OCIVersionMax string }
	if json.Unmarshal(b.output(ctx, r, "features"), &f) != nil {
		return ""
	}
	v, _, _ := strings.Cut(f.OCIVersionMax, "-")
	v, _, _ = strings.Cut(v, "+")
	return v
}

// micro is a kind of probe container. Its program exits with the number of
// the error it met.
type micro struct {
	path  string // what the program opens
	flags int
	want  int // the status that means success
	shape func(*specs.Spec, string) error
}

var (
	microPlain  = micro{path: "/", flags: unix.O_RDONLY}
	microUserNS = micro{path: "/", flags: unix.O_RDONLY, shape: shapeUserNS}
	microIDMap  = micro{path: "/m", flags: unix.O_RDONLY, shape: shapeIDMap}
	microRRO    = micro{path: "/m/sub/x", flags: unix.O_CREAT | unix.O_WRONLY, want: int(unix.EROFS), shape: shapeRRO}
)

// firstID is the first host id of the probe's user namespace.
const firstID = 1 << 20

func shapeUserNS(s *specs.Spec, _ string) error {
	m := []specs.LinuxIDMapping{{HostID: firstID, Size: 1 << 16}}
	s.Linux.UIDMappings, s.Linux.GIDMappings = m, m
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	return nil
}

// shapeIDMap mounts a file that only host root may read; with the mapping it
// belongs to the container's root.
func shapeIDMap(s *specs.Spec, dir string) error {
	src := filepath.Join(dir, "m")
	if err := errors.Join(os.WriteFile(src, nil, 0o600), os.WriteFile(filepath.Join(dir, "rootfs", "m"), nil, 0o644), shapeUserNS(s, dir)); err != nil {
		return err
	}
	s.Mounts = append(s.Mounts, specs.Mount{Destination: "/m", Type: "bind", Source: src, Options: []string{"bind"},
		UIDMappings: s.Linux.UIDMappings, GIDMappings: s.Linux.GIDMappings})
	return nil
}

// shapeRRO mounts a folder with a writable mount beneath.
func shapeRRO(s *specs.Spec, dir string) error {
	src := filepath.Join(dir, "m")
	if err := errors.Join(os.MkdirAll(filepath.Join(src, "sub"), 0o755), os.Mkdir(filepath.Join(dir, "rootfs", "m"), 0o755)); err != nil {
		return err
	}
	s.Mounts = append(s.Mounts, specs.Mount{Destination: "/m", Type: "bind", Source: src, Options: []string{"rbind", "rro"}})
	return unix.Mount("tmpfs", filepath.Join(src, "sub"), "tmpfs", 0, "size=64k")
}

// tryMicro runs one probe container.
func (b *Backend) tryMicro(ctx context.Context, r *ociRuntime, o backend.Runtime, m micro, version string, run runner) error {
	if runtime.GOOS != "linux" {
		return errdefs.ErrNotImplemented
	}
	// Under the temporary folder: a user namespace's root must be able to get
	// there.
	dir, err := os.MkdirTemp("", "cloister-probe-")
	if err != nil {
		return fmt.Errorf("make the probe's folder: %w", err)
	}
	defer os.RemoveAll(dir)
	defer func() { _ = unix.Unmount(filepath.Join(dir, "m", "sub"), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) }()
	id := filepath.Base(dir)
	if err := m.bundle(dir, id, version, o.SystemdCgroup); err != nil {
		return fmt.Errorf("make the probe's bundle: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	status, said, err := b.execute(ctx, r, o, dir, invocation{verb: "run", args: []string{"--bundle", dir, id}}, run)
	if err == nil && status != m.want {
		err = fmt.Errorf("probe container with config.json %s ended with status %d: %s", version, status, said)
	}
	if err != nil {
		_, _, _ = b.execute(context.WithoutCancel(ctx), r, o, dir, invocation{verb: "delete", args: []string{"--force", id}}, run)
	}
	return err
}

func (m micro) bundle(dir, id, version string, systemd bool) error {
	prog, err := elf.Open(m.path, m.flags)
	if err != nil {
		return err
	}
	rootfs := filepath.Join(dir, "rootfs")
	if err := errors.Join(os.Chmod(dir, 0o755), os.Mkdir(rootfs, 0o755), os.Mkdir(filepath.Join(rootfs, "proc"), 0o755), os.Mkdir(filepath.Join(rootfs, "dev"), 0o755), os.WriteFile(filepath.Join(rootfs, "probe"), prog, 0o755)); err != nil {
		return err
	}
	cgroup := "/cloister-probe/" + id
	if systemd {
		cgroup = "system.slice:cloister:" + id
	}
	s := &specs.Spec{
		Version: version,
		Root:    &specs.Root{Path: "rootfs"},
		Process: &specs.Process{Args: []string{"/probe"}, Cwd: "/", Env: []string{"PATH=/"}},
		Mounts:  []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}, {Destination: "/dev", Type: "tmpfs", Source: "tmpfs"}},
		Linux: &specs.Linux{CgroupsPath: cgroup, Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
			{Type: specs.NetworkNamespace}}}, // runsc refuses that of the node
	}
	if m.shape != nil {
		if err := m.shape(s, dir); err != nil {
			return err
		}
	}
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "config.json"), b, 0o600)
}
