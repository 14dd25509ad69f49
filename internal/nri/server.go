// Package nri lets plugins of the Node Resource Interface see the pods and
// containers of the daemon, adjust a container before it is made, and change
// the resources of those that are there.
//
// It promises that a node without plugins pays one atomic read for a hook, that
// a plugin which does not answer in time is dropped instead of waited for, and
// that a plugin which joins while something is being made hears of it exactly
// once: in its Synchronize call or as an event.
//
// It knows the protocol and its messages. What a pod is, and what comes of an
// adjustment, is up to the Runtime.
package nri

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	nrilog "github.com/containerd/nri/pkg/log"
	validator "github.com/containerd/nri/plugins/default-validator/builtin"
)

// Options configure a Server.
type Options struct {
	Version    string // of the daemon
	Socket     string // where plugins connect
	Plugins    string // folder of plugins that are started here
	PluginConf string // folder of their configuration
	// RegistrationTime and RequestTime bound how long a plugin takes to
	// register and to answer.
	RegistrationTime, RequestTime time.Duration
	// NoConnections takes no plugins but those of the folder.
	NoConnections bool
	// Validator says what plugins may not adjust; nil allows all.
	Validator *Validator
	Log       *slog.Logger
}

// Validator is the default validator's configuration.
type Validator = validator.DefaultValidatorConfig

// Runtime is what plugins are shown and may change.
type Runtime interface {
	// NRIState gives what a plugin that has just connected has to know.
	NRIState() ([]*api.PodSandbox, []*api.Container)
	// NRIUpdate changes containers and gives those for which it failed.
	NRIUpdate(ctx context.Context, updates []*api.ContainerUpdate) []*api.ContainerUpdate
}

// Server relays events to plugins. A nil Server has none.
type Server struct {
	o       Options
	lib     *adaptation.Adaptation
	always  bool         // there are plugins besides those that connect
	plugins atomic.Int64 // connected, counted by the library
	runtime Runtime
}

// New makes a server that does nothing before Start.
func New(o Options) (*Server, error) {
	s := &Server{o: o}
	nrilog.Set(logger{o.Log})
	adaptation.SetPluginRegistrationTimeout(o.RegistrationTime)
	adaptation.SetPluginRequestTimeout(o.RequestTime)
	options := []adaptation.Option{
		adaptation.WithSocketPath(o.Socket), adaptation.WithPluginPath(o.Plugins), adaptation.WithPluginConfigPath(o.PluginConf),
		adaptation.WithMetrics(counter{n: &s.plugins}), adaptation.WithDefaultValidator(o.Validator),
	}
	if o.NoConnections {
		options = append(options, adaptation.WithDisabledExternalConnections())
	}
	entries, err := os.ReadDir(o.Plugins)
	s.always = err == nil && len(entries) > 0 || o.Validator != nil && o.Validator.Enable
	if s.lib, err = adaptation.New("cloister", o.Version, s.sync, s.update, options...); err != nil {
		return nil, fmt.Errorf("set NRI up: %w", err)
	}
	return s, nil
}

// Start starts the plugins of the folder and listens for others.
func (s *Server) Start(r Runtime) error {
	if s == nil {
		return nil
	}
	s.runtime = r
	if err := s.lib.Start(); err != nil {
		return fmt.Errorf("start NRI: %w", err)
	}
	return nil
}

// Close ends the plugins that were started here and leaves the others.
func (s *Server) Close() error {
	if s != nil {
		s.lib.Stop()
	}
	return nil
}

// Active tells whether anybody listens. Who asks inside Hold gets an answer
// that stays right until the release.
func (s *Server) Active() bool { return s != nil && (s.always || s.plugins.Load() > 0) }

// Hold keeps new plugins waiting until release is called: what is being made
// must be told to a plugin either when it joins or as an event.
func (s *Server) Hold() (release func()) {
	if s == nil {
		return func() {}
	}
	return s.lib.BlockPluginSync().Unblock
}

func (s *Server) sync(ctx context.Context, tell adaptation.SyncCB) error {
	pods, containers := s.runtime.NRIState()
	updates, err := tell(ctx, pods, containers)
	if err != nil {
		return err
	}
	for _, u := range s.runtime.NRIUpdate(ctx, updates) {
		s.o.Log.Warn("a plugin's update of a container failed", "container", u.ContainerId)
	}
	return nil
}

func (s *Server) update(ctx context.Context, updates []*api.ContainerUpdate) ([]*api.ContainerUpdate, error) {
	return s.runtime.NRIUpdate(ctx, updates), nil
}

// counter learns of connected plugins.
type counter struct {
	adaptation.Metrics
	n *atomic.Int64
}

func (c counter) UpdatePluginCount(n int) { c.n.Store(int64(n)) }

func (counter) RecordPluginInvocation(string, string, error) {}

func (counter) RecordPluginLatency(string, string, time.Duration) {}

func (counter) RecordPluginAdjustments(string, string, *adaptation.ContainerAdjustment, int, int) {}

// logger passes the library's log on. What it tells of each plugin's coming
// and going is the administrator's; its steps are not.
type logger struct{ to *slog.Logger }

func (l logger) Debugf(_ context.Context, f string, args ...any) { l.note(slog.LevelDebug, f, args) }
func (l logger) Infof(_ context.Context, f string, args ...any)  { l.note(slog.LevelDebug, f, args) }
func (l logger) Warnf(_ context.Context, f string, args ...any)  { l.note(slog.LevelWarn, f, args) }
func (l logger) Errorf(_ context.Context, f string, args ...any) { l.note(slog.LevelWarn, f, args) }

func (l logger) note(level slog.Level, f string, args []any) {
	if ctx := context.Background(); l.to.Enabled(ctx, level) {
		l.to.Log(ctx, level, "NRI: "+fmt.Sprintf(f, args...))
	}
}
