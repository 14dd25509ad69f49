package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	profile "github.com/containerd/containerd/v2/contrib/apparmor"
	"github.com/containerd/containerd/v2/pkg/apparmor"
	containerdlog "github.com/containerd/log"
	"github.com/coreos/go-systemd/v22/daemon"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"k8s.io/klog/v2"

	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/config"
	"cloister.dev/internal/cri"
	"cloister.dev/internal/image"
	"cloister.dev/internal/network"
	"cloister.dev/internal/network/builtin"
	"cloister.dev/internal/network/cni"
	"cloister.dev/internal/oci"
	"cloister.dev/internal/osutil"
	"cloister.dev/internal/pod"
	"cloister.dev/internal/shim"
	"cloister.dev/internal/stream"
)

const (
	// stopTime bounds the wait for running calls when the daemon is asked to
	// stop. Nothing is lost with those that take longer: the next daemon finishes
	// or undoes what they were about.
	stopTime = 2 * time.Second
	// answerTime is how long another daemon may take to answer on the socket.
	answerTime = 10 * time.Second
)

// runDaemon opens the services from the bottom up, serves until ctx ends, and
// closes them from the top down. Pods are not touched by its end.
func runDaemon(ctx context.Context, cfg config.Config, load func() (config.Config, error), version string, dlog logger) (err error) {
	log := dlog.Logger
	reload := &reloader{log: dlog, boot: cfg}
	reload.heed(ctx)
	// Two libraries have loggers of their own, for what this log says better.
	if err := containerdlog.SetLevel("error"); err != nil {
		return err
	}
	for _, w := range cfg.Warnings {
		log.Warn("configuration", "where", w.Where, "key", w.Key, "message", w.Message)
	}
	klog.SetSlogLogger(slog.New(demoted{log.Handler()}).With("source", "streaming"))
	var open osutil.Undo // every service, newest closed first
	defer func() { err = errors.Join(err, open.All(ctx)) }()
	closing := func(what string, f func() error) {
		open.Add(what, func(context.Context) error { return f() })
	}

	if err := os.MkdirAll(cfg.State, 0o711); err != nil {
		return fmt.Errorf("make the state folder: %w", err)
	}
	images, err := image.Open(ctx, imageOptions(cfg, log))
	if err != nil {
		return err
	}
	closing("close the image store", images.Close)
	net, err := openNetwork(cfg, log)
	if err != nil {
		return err
	}
	closing("close the network", net.Close)
	devices, err := openDevicePlugin(ctx, cfg, log, closing)
	if err != nil {
		return err
	}
	shims, err := openShims(cfg, log, devices, closing)
	if err != nil {
		return err
	}
	reload.images, reload.net, reload.shims = images, net, shims
	tells, err := openTelemetry(ctx, cfg, version)
	if err != nil {
		return err
	}
	closing("close metrics and traces", tells.close)
	pods, err := openPods(cfg, version, log, podParts{images, net, shims, tells, reload, devices}, closing)
	if err != nil {
		return err
	}
	streams, err := openStreams(cfg, log, pods, closing)
	if err != nil {
		return err
	}
	server := cri.New(tells.observe(cri.Options{Pods: pods, Images: images, Stream: streams, Version: version, Log: log,
		Snapshotter: reload.snapshotter, Platform: reload.platform}))
	loadAppArmor(cfg, log)
	if err := tells.serve(cfg, pods, log); err != nil {
		return err
	}
	closing("stop following the configuration", reload.follow(load))
	return serve(ctx, cfg, log, server, pods, images, tells.grpcOptions()...)
}

// podParts are the rooms beneath the pod service.
type podParts struct {
	images *image.Store
	net    network.Attacher
	shims  *shim.Client
	tells  *telemetries
	reload *reloader
	tees   *devicePlugin
}

// openPods opens the pod service and, with it, the door for NRI plugins.
func openPods(cfg config.Config, version string, log *slog.Logger, p podParts, closing func(string, func() error)) (*pod.Service, error) {
	plugins, err := newNRI(cfg, version, log)
	if err != nil {
		return nil, err
	}
	o := podOptions(cfg, log, p.images, p.net, p.shims)
	o.NRI, o.Observer = plugins, p.tells.observer()
	o.Conditions = func() []pod.Condition { return append(p.reload.conditions(), p.tees.conditions()...) }
	o.VerboseInfo = p.reload.info
	pods, err := pod.Open(o)
	if err != nil {
		return nil, err
	}
	closing("close the pod service", pods.Close)
	if err := plugins.Start(pods); err != nil {
		return nil, err
	}
	closing("close NRI", plugins.Close)
	return pods, nil
}

// demoted passes the streaming library's log on at debug level: it calls every
// client that leaves an error.
type demoted struct{ slog.Handler }

func (d demoted) Enabled(ctx context.Context, _ slog.Level) bool {
	return d.Handler.Enabled(ctx, slog.LevelDebug)
}

func (d demoted) Handle(ctx context.Context, r slog.Record) error {
	if !d.Enabled(ctx, r.Level) {
		return nil // klog does not ask before it reports an error
	}
	r.Level = slog.LevelDebug
	return d.Handler.Handle(ctx, r)
}

func (d demoted) WithAttrs(as []slog.Attr) slog.Handler { return demoted{d.Handler.WithAttrs(as)} }
func (d demoted) WithGroup(name string) slog.Handler    { return demoted{d.Handler.WithGroup(name)} }

func openShims(cfg config.Config, log *slog.Logger, devices *devicePlugin, closing func(string, func() error)) (*shim.Client, error) {
	events := filepath.Join(cfg.State, "events.sock")
	server, err := shim.ServeEvents(events)
	if err != nil {
		return nil, err
	}
	closing("close the events socket", server.Close)
	o, err := shimOptions(cfg, log)
	if err != nil {
		return nil, err
	}
	o.EventsAddress, o.Events, o.Ready = events, server, devices.ready
	shims, err := shim.New(o)
	if err != nil {
		return nil, err
	}
	closing("close shim connections", func() error { shims.Close(); return nil })
	return shims, nil
}

func openStreams(cfg config.Config, log *slog.Logger, pods *pod.Service, closing func(string, func() error)) (*stream.Server, error) {
	streams, err := stream.New(streamOptions(cfg, log), cri.StreamRuntime(pods))
	if err != nil {
		return nil, err
	}
	closing("close the streaming server", func() error {
		ctx, cancel := context.WithTimeout(context.Background(), stopTime)
		defer cancel()
		return streams.Close(ctx)
	})
	return streams, streams.Start()
}

// serve answers on the CRI socket until ctx ends.
func serve(ctx context.Context, cfg config.Config, log *slog.Logger, server *cri.Server, pods *pod.Service, images *image.Store, options ...grpc.ServerOption) error {
	lis, err := listen(ctx, cfg.Address, cfg.Plugins.GRPC)
	if err != nil {
		return err
	}
	g := grpc.NewServer(append(server.GRPCOptions(), options...)...)
	server.Register(g)
	healthpb.RegisterHealthServer(g, health.NewServer())
	(&cri.Debug{Pods: pods, Images: images, Machine: pods}).Register(g)
	served := make(chan error, 1)
	go func() { served <- g.Serve(lis) }()
	log.Info("serving CRI", "address", cfg.Address, "root", cfg.Root, "state", cfg.State, "network", cfg.Cloister.Network)
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		log.Warn("tell systemd that the daemon is ready", "err", err)
	}
	select {
	case err := <-served:
		return fmt.Errorf("serve CRI on %s: %w", cfg.Address, err)
	case <-ctx.Done():
	}
	log.Info("stopping; pods go on running")
	// What the service manager thinks of our end changes nothing about it.
	_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
	hard := time.AfterFunc(stopTime, g.Stop)
	defer hard.Stop()
	server.Shutdown() // ends event streams, which would never end by themselves
	g.GracefulStop()
	return nil
}

// loadAppArmor loads the profile of containers that ask for the runtime's
// default one.
func loadAppArmor(cfg config.Config, log *slog.Logger) {
	if cfg.Runtime.DisableAppArmor || !apparmor.HostSupports() {
		return
	}
	if err := profile.LoadDefaultProfile(oci.DefaultAppArmorProfile); err != nil {
		log.Warn("load the default AppArmor profile; containers that ask for it will fail", "err", err)
	}
}

// listen makes the socket, which only its owner may use and the group that is
// named, in place of one that nobody serves any more.
func listen(ctx context.Context, address string, owner config.GRPCServer) (net.Listener, error) {
	path := strings.TrimPrefix(address, "unix://")
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, fmt.Errorf("make the socket's folder: %w", err)
	}
	if err := removeStale(ctx, path); err != nil {
		return nil, err
	}
	lis, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	mode := os.FileMode(0o600)
	if owner.GID != 0 {
		mode = 0o660
	}
	if err := errors.Join(os.Chown(path, owner.UID, owner.GID), os.Chmod(path, mode)); err != nil {
		lis.Close()
		return nil, fmt.Errorf("restrict the socket: %w", err)
	}
	return lis, nil
}

// removeStale removes the socket of a daemon that is gone. Any answer but a
// refusal may be that of one that lives, such as one too busy to accept.
func removeStale(ctx context.Context, path string) error {
	dialer := net.Dialer{Timeout: answerTime}
	c, err := dialer.DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		c.Close()
		return fmt.Errorf("another daemon serves %s; stop it, or choose another --address", path)
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case !errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("find out whether another daemon serves %s: %w; if none does, remove it", path, err)
	}
	if fi, err := os.Lstat(path); err == nil && fi.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s is there and is no socket; remove it, or choose another --address", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the stale socket: %w", err)
	}
	return nil
}

func openNetwork(cfg config.Config, log *slog.Logger) (network.Attacher, error) {
	if cfg.Cloister.Network == "builtin" {
		b := cfg.Cloister.BuiltinNetwork
		o := builtin.Options{Bridge: b.Bridge, MTU: b.MTU, HostPorts: true, StateDir: filepath.Join(cfg.Root, "network"), Log: log}
		for _, s := range b.Subnets {
			p, err := netip.ParsePrefix(s)
			if err != nil {
				return nil, fmt.Errorf("builtin_network.subnets: %w", err)
			}
			o.Subnets = append(o.Subnets, p)
		}
		return builtin.New(o)
	}
	return cni.New(cniOptions(cfg, log))
}

func cniOptions(cfg config.Config, log *slog.Logger) cni.Options {
	c := cfg.Runtime.CNI
	handlers := map[string]cni.Folder{}
	for name, h := range cfg.Runtime.Containerd.Runtimes {
		if h.CNIConfDir != "" {
			handlers[name] = cni.Folder{Dir: h.CNIConfDir, MaxConfNum: h.CNIMaxConfNum}
		}
	}
	return cni.Options{ConfDir: c.ConfDir, BinDirs: c.BinDirs, MaxConfNum: c.MaxConfNum, SetupSerially: c.SetupSerially,
		Handlers: handlers, ConfTemplate: c.ConfTemplate,
		IPPref: c.IPPref, CacheDir: filepath.Join(cfg.Root, "cni"), StateDir: filepath.Join(cfg.Root, "network"), Log: log}
}

func shimOptions(cfg config.Config, log *slog.Logger) (shim.Options, error) {
	o := shim.Options{State: filepath.Join(cfg.State, "shim"), GRPCAddress: cfg.Address, LogLevel: cfg.LogLevel, Log: log,
		Default: cfg.Runtime.Containerd.DefaultRuntimeName, Runtimes: map[string]shim.Runtime{}}
	var err error
	if o.Binary, err = shimProgram(cfg.Cloister.Shim); err != nil {
		return o, err
	}
	systemd := cfg.SystemdCgroup()
	for name, r := range shim.Found() {
		r.SystemdCgroup = systemd
		r.NoCgroup = cfg.Cloister.DisableCgroup
		if r.Rlimits, err = rlimits(cfg, name); err != nil {
			return o, err
		}
		o.Runtimes[name] = r // unless it is configured
	}
	for name, h := range cfg.Runtime.Containerd.Runtimes {
		r := shim.Runtime{Type: h.RuntimeType, Path: h.RuntimePath, Options: h.Options, Snapshotter: snapshotter(cfg, name, h),
			Platform: cfg.Images.RuntimePlatforms[name].Platform,
			BaseSpec: h.BaseRuntimeSpec, PodAnnotations: h.PodAnnotations, CtrAnnotations: h.ContainerAnnotations,
			NoHostDevices: h.PrivilegedWithoutHostDevices, AllDevices: h.PrivilegedWithoutHostDevicesAllDevicesAllowed,
			CgroupWritable: h.CgroupWritable, ReadOnlyMounts: h.TreatROMountsAsRRO, NoCgroup: cfg.Cloister.DisableCgroup}
		if r.Rlimits, err = rlimits(cfg, name); err != nil {
			return o, err
		}
		if h.IsMachine() {
			if r.Machine, err = machineOptions(cfg, h); err != nil {
				return o, fmt.Errorf("options of handler %q: %w", name, err)
			}
		} else if h.IsRunc() {
			ro, err := h.RuncOptions()
			if err != nil {
				return o, fmt.Errorf("options of handler %q: %w", name, err)
			}
			r.Type = config.RuncType
			r.Binary, r.Root, r.SystemdCgroup, r.NoNewKeyring = ro.BinaryName, ro.Root, ro.SystemdCgroup, ro.NoNewKeyring
			r.NoPivotRoot, r.ShimCgroup, r.IOUid, r.IOGid = ro.NoPivotRoot, ro.ShimCgroup, ro.IoUID, ro.IoGID
		} else {
			so, err := h.ShimOptions()
			if err != nil {
				return o, fmt.Errorf("options of handler %q: %w", name, err)
			}
			r.ConfigPath, r.ConfigBody, r.OptionsType = so.ConfigPath, so.ConfigBody, so.TypeURL
		}
		o.Runtimes[name] = r
	}
	return o, nil
}

// machineOptions are what the shim is told of a handler's virtual machines.
func machineOptions(cfg config.Config, h config.Handler) (*hostv1.MachineOptions, error) {
	m, err := h.MachineOptions()
	if err != nil {
		return nil, err
	}
	if m.Guests == "" {
		m.Guests = filepath.Join(cfg.Root, "guests")
	}
	return &hostv1.MachineOptions{Path: m.Path, Guests: m.Guests, Guest: m.Guest, Kernel: m.Kernel, Initrd: m.Initrd,
		KernelParams: m.KernelParams, MachineType: m.MachineType, Accel: m.Accel,
		DefaultVcpus: m.DefaultVCPUs, DefaultMaxvcpus: m.DefaultMaxVCPUs, DefaultMemory: m.DefaultMemory, DefaultMaxmemory: m.DefaultMaxMemory,
		OverheadMemory: m.OverheadMemory, SharedFs: m.SharedFS, ImageLayers: m.ImageLayers, VirtioFsDaemon: m.VirtioFSDaemon, VirtioFsCache: m.VirtioFSCache,
		VirtioFsExtraArgs: m.VirtioFSExtraArgs, EnableAnnotations: m.EnableAnnotations, BootTimeout: m.BootTimeout}, nil
}

func snapshotter(cfg config.Config, name string, h config.Handler) string {
	if h.Snapshotter != "" {
		return h.Snapshotter
	}
	return cfg.Images.RuntimePlatforms[name].Snapshotter
}

// shimProgram finds cloister-shim: as configured, beside this program, or in PATH.
func shimProgram(configured string) (string, error) {
	if configured != "" {
		return configured, nil
	}
	path, err := siblingProgram("cloister-shim")
	if err != nil {
		return "", fmt.Errorf("%w, or set shim in [cloister]", err)
	}
	return path, nil
}

// siblingProgram finds another of Cloister's programs: beside this one, or in PATH.
func siblingProgram(name string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find this program: %w", err)
	}
	beside := filepath.Join(filepath.Dir(self), name)
	if _, err := os.Stat(beside); err == nil {
		return beside, nil
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("find %s beside %s or in PATH: %w; install it", name, self, err)
	}
	return path, nil
}

func podOptions(cfg config.Config, log *slog.Logger, images *image.Store, net network.Attacher, shims *shim.Client) pod.Options {
	r := cfg.Runtime
	o := pod.Options{
		Root: cfg.Root, State: cfg.State, Images: images, Network: net, Shims: shims, Node: node(cfg, log), Log: log,
		CgroupParent: cgroupParent(cfg.State),
		LogMaxLine:   int64(r.MaxContainerLogLineSize), IgnoreImageVolumes: r.IgnoreImageDefinedVolumes,
		DrainExecSync: r.DrainExecSyncIOTimeout.Duration, StatsPeriod: r.StatsCollectPeriod.Duration,
		LayerPeriod: time.Duration(cfg.Images.StatsCollectPeriod) * time.Second,
	}
	if !r.NetNSMountsUnderStateDir {
		o.NetNSDir = "/var/run/netns"
	}
	if c, ok := net.(*cni.Attacher); ok {
		o.PodRanges = c.SetPodRanges
	}
	return o
}

// cgroupParent keeps the cgroups of daemons apart that run side by side.
func cgroupParent(state string) string {
	if state == config.Default().State {
		return oci.DefaultCgroup
	}
	h := sha256.Sum256([]byte(state))
	return oci.DefaultCgroup + "-" + hex.EncodeToString(h[:4])
}

func streamOptions(cfg config.Config, log *slog.Logger) stream.Options {
	s := cfg.Streaming
	return stream.Options{Address: s.Address, Port: s.Port, IdleTimeout: s.IdleTimeout.Duration, Log: log,
		TLS: stream.TLS{Enable: s.EnableTLS, CertFile: s.KeyPair.CertFile, KeyFile: s.KeyPair.KeyFile}}
}
