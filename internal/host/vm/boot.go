package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/emptypb"

	guestv1 "cloister.dev/api/guest/v1"
	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/guest"
	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/proc"
	"cloister.dev/internal/host/vm/image"
	"cloister.dev/internal/host/vm/link"
	"cloister.dev/internal/host/vm/machine"
	"cloister.dev/internal/host/vm/share"
)

// StartSandbox is part of backend.Backend.
func (b *Backend) StartSandbox(ctx context.Context, spec *backend.SandboxSpec, exited func(proc.Exit)) (st backend.Started, err error) {
	if len(spec.NodeNamespaces) > 0 {
		return st, fmt.Errorf("a pod in a virtual machine has no %s namespace of the node: use a handler that shares the node's kernel, such as runc or crun: %w",
			strings.Join(spec.NodeNamespaces, " or "), errdefs.ErrInvalidArgument)
	}
	extra := spec.Extra
	if len(extra) == 0 {
		if extra, err = bundleOptions(spec.Bundle); err != nil {
			return st, err
		}
	}
	o, err := readOptions(extra, spec.Annotations)
	if err != nil {
		return st, err
	}
	s := b.sandboxFor(spec.ID)
	s.op.Lock()
	defer s.op.Unlock()
	if s.machine() != nil {
		return st, fmt.Errorf("the machine of sandbox %s runs already: %w", s.id, errdefs.ErrAlreadyExists)
	}
	for try := 1; ; try++ {
		if err = s.boot(ctx, spec, o); err == nil {
			break
		}
		down := s.takeDown(context.WithoutCancel(ctx))
		if try < bootTries && errors.Is(err, errNoTimer) && down == nil && ctx.Err() == nil {
			b.log.Warn("machine is started once more", "sandbox", s.id, "err", err)
			continue
		}
		b.forget(s)
		return st, errors.Join(err, down)
	}
	b.workers.Go(func() { s.awaitMachine(exited) })
	b.workers.Go(s.prepareLater)
	state := s.machine().State()
	st.Pid, st.Process.Start, st.Place = state.Pid, state.Start, holderPlace
	return st, nil
}

// bootTries is how often a machine is started whose kernel fails to find a
// timer, which it does on a busy host now and then.
const bootTries = 3

// errNoTimer tells that the guest's kernel has no timer.
var errNoTimer = fmt.Errorf("%s: the node may be too busy to emulate a machine: %w", guest.NoTimer, errdefs.ErrUnavailable)

// boot makes the machine and waits until its agent has made it a pod.
func (s *sandbox) boot(ctx context.Context, spec *backend.SandboxSpec, o *hostv1.MachineOptions) error {
	began := time.Now()
	c, err := s.backend.machineConfig(ctx, spec, o)
	if err != nil {
		return err
	}
	c.Dir = s.backend.shortDir(s.id)
	mkfs, err := findMkfs(o)
	if err != nil {
		return err
	}
	if c.Cgroups, err = s.prepare(spec, record{Dir: c.Dir, NetNS: spec.NetNS, Accel: c.Accel, SharePID: spec.SharePID, Mkfs: mkfs}); err != nil {
		return err
	}
	program, err := FindVirtiofsd(o.VirtioFsDaemon)
	if err != nil {
		return err
	}
	files, err := share.Start(ctx, s.backend.reaper, share.Config{Program: program, Dir: c.Dir, Cgroups: c.Cgroups,
		Cache: o.VirtioFsCache, Overlays: mkfs != "", ExtraArgs: o.VirtioFsExtraArgs})
	if err != nil {
		return fmt.Errorf("serve the machine's files: %w", err)
	}
	s.mu.Lock()
	s.fs, s.rec.Share = files, files.State()
	s.mu.Unlock()
	c.Shares = []machine.Share{{Tag: share.Tag, Socket: files.Socket()}}
	network, err := s.start(ctx, spec, c)
	if err != nil {
		return err
	}
	if err := s.setup(ctx, spec, o, network); err != nil {
		return s.explain(ctx, err)
	}
	return s.update(func(r *record) { r.Up, r.BootTook = true, time.Since(began) })
}

// prepare makes folders and cgroups, after the intent is on disk.
func (s *sandbox) prepare(spec *backend.SandboxSpec, fresh record) (cgroups []string, err error) {
	cgroups = cgroupDirs(spec.CgroupPath)
	var made []string
	for _, cg := range cgroups {
		if _, err := os.Stat(cg); errors.Is(err, os.ErrNotExist) {
			made = append(made, cg)
		}
	}
	fresh.Cgroups = made
	if err := s.update(func(r *record) { *r = fresh }); err != nil {
		return nil, err
	}
	for _, cg := range made {
		if err := os.MkdirAll(cg, 0o755); err != nil {
			return nil, fmt.Errorf("make the machine's cgroup: %w", err)
		}
	}
	if err := os.MkdirAll(fresh.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the machine's folder: %w", err)
	}
	return usableCgroups(cgroups), nil
}

// usableCgroups leaves out cpuset cgroups of v1 without CPUs, which take
// nobody.
func usableCgroups(dirs []string) []string {
	var usable []string
	for _, d := range dirs {
		b, err := os.ReadFile(filepath.Join(d, "cpuset.cpus"))
		if v2 := fileExists(filepath.Join(d, "cgroup.controllers")); err == nil && !v2 && strings.TrimSpace(string(b)) == "" {
			continue
		}
		usable = append(usable, d)
	}
	return usable
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// start runs QEMU, connected to the pod's network.
func (s *sandbox) start(ctx context.Context, spec *backend.SandboxSpec, c machine.Config) (link.Network, error) {
	var net link.Attached
	if spec.NetNS != "" {
		attached, err := link.Attach(spec.NetNS)
		if err != nil {
			return net.Network, fmt.Errorf("connect the machine to the pod's network: %w", err)
		}
		defer attached.Close()
		net = *attached
	}
	for _, t := range net.Taps {
		c.NICs = append(c.NICs, machine.NIC{MAC: t.MAC, Tap: t.File})
	}
	m, err := machine.Start(ctx, s.backend.reaper, c)
	if err != nil {
		return net.Network, err
	}
	s.mu.Lock()
	s.m, s.rec.Machine = m, m.State()
	s.mu.Unlock()
	return net.Network, s.update(func(*record) {})
}

// setup waits for the agent, and has it make the machine a pod.
func (s *sandbox) setup(ctx context.Context, spec *backend.SandboxSpec, o *hostv1.MachineOptions, network link.Network) error {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(o.BootTimeout)*time.Second)
	defer cancel()
	netJSON, err := json.Marshal(network)
	if err != nil {
		return fmt.Errorf("encode the network: %w", err)
	}
	var resp *guestv1.SetupResponse
	err = s.call(ctx, func(ctx context.Context, g guestv1.GuestService) (err error) {
		resp, err = g.Setup(ctx, &guestv1.SetupRequest{Hostname: spec.Hostname, Network: netJSON, Sysctls: spec.Sysctls,
			SharePid: spec.SharePID, TimeNanos: time.Now().UnixNano(), ShareTag: share.Tag})
		return err
	})
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.rec.Kernel = line(resp.Kernel)
	s.mu.Unlock()
	s.backend.log.Info("machine is up", "sandbox", s.id, "kernel", line(resp.Kernel), "agentUp", resp.UptimeMillis)
	return nil
}

// prepareContainers has the guest do what its first container would wait for,
// which fails as well where this does.
func (s *sandbox) prepareContainers(ctx context.Context) error {
	err := s.call(ctx, func(ctx context.Context, g guestv1.GuestService) error {
		_, err := g.Prepare(ctx, &emptypb.Empty{})
		return err
	})
	if errdefs.IsNotImplemented(err) {
		return nil // a guest of an older build has done it at its start
	}
	if err != nil {
		return fmt.Errorf("make the machine ready for containers: %w", err)
	}
	return nil
}

// prepareTime bounds what a pod has its guest do when it is there.
const prepareTime = time.Minute

// prepareLater does so while nobody waits.
func (s *sandbox) prepareLater() {
	ctx, cancel := context.WithTimeout(s.backend.ctx, prepareTime)
	defer cancel()
	if err := s.prepareContainers(ctx); err != nil && !errors.Is(err, errEnded) && s.backend.ctx.Err() == nil {
		s.backend.log.Warn("containers of this machine will fail", "sandbox", s.id, "err", err)
	}
}

// maxLine bounds a text from the guest that is shown to people.
const maxLine = 100

func line(text string) string {
	text, _, _ = strings.Cut(text, "\n")
	return fmt.Sprintf("%.*q", maxLine, text)
}

// consoleLines is how much of the console an error carries.
const consoleLines = 50

// endTime is how long a machine that answers no more may take to be gone.
const endTime = 2 * time.Second

// explain adds why a machine did not come up.
func (s *sandbox) explain(ctx context.Context, err error) error {
	m := s.machine()
	console := lastLines(m.Console(context.WithoutCancel(ctx)), consoleLines)
	gone := time.NewTimer(endTime)
	defer gone.Stop()
	if late := errors.Is(err, context.DeadlineExceeded); late && !ended(m) {
		err = fmt.Errorf("the guest did not answer in time; its kernel and initrd may not fit this machine type, or boot_timeout is too short: %w", err)
	} else {
		select {
		case <-m.Done(): // the connection breaks a little before
			err = fmt.Errorf("the virtual machine ended before it was up (%s): %w", m.Exit().Reason, errdefs.ErrUnavailable)
		case <-gone.C:
		case <-ctx.Done(): // nobody waits for the reason
		}
	}
	if strings.Contains(console, guest.NoTimer) {
		err = fmt.Errorf("%w: %w", errNoTimer, err)
	}
	if console == "" {
		return fmt.Errorf("%w; its console is empty", err)
	}
	return fmt.Errorf("%w; the last lines of its console:\n%s", err, console)
}

// machineConfig decides on everything that does not depend on the pod's files
// and network.
func (b *Backend) machineConfig(ctx context.Context, spec *backend.SandboxSpec, o *hostv1.MachineOptions) (machine.Config, error) {
	c := machine.Config{ID: spec.ID, Type: o.MachineType}
	var err error
	if c.QEMU, err = FindQEMU(o.Path); err != nil {
		return c, err
	}
	if c.Kernel, c.Initrd = o.Kernel, o.Initrd; c.Kernel == "" {
		g, err := image.Open(o.Guests, o.Guest)
		if err != nil {
			return c, err
		}
		c.Kernel, c.Initrd = g.Kernel, g.Initrd
	}
	for what, path := range map[string]string{"kernel": c.Kernel, "initrd": c.Initrd} {
		if _, err := os.Stat(path); err != nil {
			return c, fmt.Errorf("the handler's %s: %w: %w", what, err, errdefs.ErrFailedPrecondition)
		}
	}
	if c.Accel, err = b.chooseAccel(ctx, c, o.Accel); err != nil {
		return c, err
	}
	c.Params = strings.Fields(o.KernelParams)
	if c.Accel == machine.TCG {
		// An emulator that translates code finds what it has translated by its
		// address: a program that lies elsewhere each time is translated each time.
		c.Params = append(c.Params, "norandmaps")
	}
	if c.Size, err = sizeOf(spec, o); err != nil {
		return c, err
	}
	c.MaxSize = maxSizeOf(c.Size, o)
	return c, nil
}
