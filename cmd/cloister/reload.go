package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"

	"cloister.dev/internal/config"
	"cloister.dev/internal/image"
	"cloister.dev/internal/network"
	"cloister.dev/internal/network/cni"
	"cloister.dev/internal/pod"
	"cloister.dev/internal/shim"
)

// reloader puts what is live of a changed configuration into the rooms of the
// running daemon.
type reloader struct {
	log    logger
	images *image.Store
	net    network.Attacher
	shims  *shim.Client
	live   atomic.Pointer[config.Live] // nil until the rooms are open
	boot   config.Config
}

// apply changes all rooms or, with an error, none.
func (r *reloader) apply(cfg config.Config) error {
	var level slog.Level
	if err := level.UnmarshalText([]byte(cfg.LogLevel)); err != nil {
		return fmt.Errorf("log level %q: %w", cfg.LogLevel, err)
	}
	rooms := []func(config.Config) error{r.applyNetwork, r.applyImages, r.applyShims}
	for i, change := range rooms {
		err := change(cfg)
		if err == nil {
			continue
		}
		for _, back := range rooms[:i] { // to what was good
			if backErr := back(r.current()); backErr != nil {
				err = errors.Join(err, fmt.Errorf("go back to the configuration before: %w", backErr))
			}
		}
		return err
	}
	r.log.level.Set(level)
	return nil
}

func (r *reloader) applyNetwork(cfg config.Config) error {
	if c, ok := r.net.(*cni.Attacher); ok {
		return c.Reconfigure(cniOptions(cfg, r.log.Logger))
	}
	return nil
}

func (r *reloader) applyImages(cfg config.Config) error {
	return r.images.SetHosts(imageHosts(cfg, r.log.Logger))
}

func (r *reloader) applyShims(cfg config.Config) error {
	o, err := shimOptions(cfg, r.log.Logger)
	if err != nil {
		return err
	}
	return r.shims.Reload(o.Runtimes, o.Default)
}

// current is the configuration in force.
func (r *reloader) current() config.Config {
	if live := r.live.Load(); live != nil {
		return live.State().Config
	}
	return r.boot
}

// follow starts to follow the files, until close.
func (r *reloader) follow(load func() (config.Config, error)) (closing func() error) {
	live := config.NewLive(r.boot, config.Follow{Load: load, Apply: r.apply, Log: r.log.Logger})
	r.live.Store(live)
	return live.Close
}

// heed reloads on SIGHUP until the context ends.
func (r *reloader) heed(ctx context.Context) {
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	go func() {
		defer signal.Stop(hup)
		for {
			select {
			case <-ctx.Done():
				return
			case <-hup:
			}
			if live := r.live.Load(); live != nil {
				live.Reload()
			}
			// What the service manager thinks of it changes nothing about it.
			_, _ = daemon.SdNotify(false, daemon.SdNotifyReady)
		}
	}()
}

// snapshotter tells where the images of a handler are unpacked.
func (r *reloader) snapshotter(handler string) (string, error) {
	cfg := r.current()
	return snapshotter(cfg, handler, cfg.Runtime.Containerd.Runtimes[handler]), nil
}

// platform is that of the images of a handler; empty is the node's own.
func (r *reloader) platform(handler string) string {
	return r.current().Images.RuntimePlatforms[handler].Platform
}

// conditions are facts about the configuration for CRI's status.
func (r *reloader) conditions() []pod.Condition {
	accepted := pod.Condition{Type: "ConfigurationAccepted", OK: true}
	if live := r.live.Load(); live != nil {
		if err := live.State().Refused; err != nil {
			accepted.OK, accepted.Reason, accepted.Message = false, "ConfigurationRefused", shorten(err.Error())
		}
	}
	deprecated := pod.Condition{Type: "NoDeprecatedConfiguration", OK: true}
	if old := r.current().Deprecated(); len(old) > 0 {
		var lines []string
		for _, w := range old {
			lines = append(lines, w.String())
		}
		deprecated.OK, deprecated.Reason, deprecated.Message = false, "DeprecatedKeys", shorten(strings.Join(lines, "\n"))
	}
	all := []pod.Condition{accepted, deprecated}
	if c, ok := r.net.(interface{ LoadError() error }); ok {
		loaded := pod.Condition{Type: "NetworkConfigurationAccepted", OK: true}
		if err := c.LoadError(); err != nil {
			loaded.OK, loaded.Reason, loaded.Message = false, "NetworkConfigurationRefused", shorten(err.Error())
		}
		all = append(all, loaded)
	}
	return all
}

// shorten keeps a status small; the log has all of it.
func shorten(s string) string {
	const most = 4096
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

// info is the configuration in force, for CRI's verbose status.
func (r *reloader) info() map[string]any {
	cfg := r.current()
	info := map[string]any{"stateDir": cfg.State, "rootDir": cfg.Root, "address": cfg.Address,
		"network": cfg.Cloister.Network, "snapshotter": cfg.Images.Snapshotter, "files": cfg.Files, "warnings": cfg.Warnings}
	if live := r.live.Load(); live != nil {
		s := live.State()
		info["generation"], info["since"], info["waitingForRestart"] = s.Generation, s.Since, s.Waiting
	}
	return info
}
