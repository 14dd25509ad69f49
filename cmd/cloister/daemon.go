package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/spf13/cobra"

	"cloister.dev/internal/config"
)

func (a *app) daemonCommand() *cobra.Command {
	var file, root, state, level string
	var ephemeral bool
	cmd := &cobra.Command{
		Use:   "daemon",
		Short: "Serve CRI to a kubelet",
		Long: `Serves the Kubernetes Container Runtime Interface on a unix socket. Without a
configuration file the defaults are used; flags go before the file. Handlers,
registries, networks and the log level follow the file while the daemon runs;
SIGHUP has it read at once. SIGTERM stops the daemon and leaves pods running;
the next one takes them up again.`,
		Example: `  cloister daemon
  cloister daemon --config /etc/cloister/config.toml --log-level debug
  cloister daemon --root /tmp/c/root --state /tmp/c/state   # a second one beside the first`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			load := func() (config.Config, error) {
				cfg, err := config.Load(file)
				if err != nil {
					return cfg, err
				}
				if root != "" {
					cfg.Root = root
				}
				if state != "" {
					cfg.SetState(state)
				}
				if a.addressSet {
					cfg.SetAddress(a.address)
				}
				if level != "" {
					cfg.LogLevel = level
				}
				cfg.Ephemeral = ephemeral
				return cfg, cfg.Validate()
			}
			cfg, err := load()
			if err != nil {
				return usage(err)
			}
			log, err := newLogger(a.stderr, cfg.LogLevel, cfg.LogFormat)
			if err != nil {
				return usage(err)
			}
			err = runDaemon(cmd.Context(), cfg, load, version, log)
			if cfg.Ephemeral {
				err = errors.Join(err, endEphemeral(cmd.Context(), cfg))
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVarP(&file, "config", "c", "", "configuration `file` (default "+config.DefaultPath+", if it is there)")
	f.StringVar(&root, "root", "", "`folder` for what outlives a reboot")
	f.StringVar(&state, "state", "", "`folder` for what a reboot may take; the socket follows it")
	f.StringVarP(&level, "log-level", "l", "", "debug, info, warn or error")
	f.BoolVar(&ephemeral, "ephemeral", false, "at the end also end the shims in which nothing runs")
	_ = f.MarkHidden("ephemeral") // added in the line above
	return cmd
}

// logger is a log whose level can be changed.
type logger struct {
	*slog.Logger
	level *slog.LevelVar
}

func newLogger(w io.Writer, level, format string) (logger, error) {
	l := logger{level: &slog.LevelVar{}}
	if err := l.level.UnmarshalText([]byte(level)); err != nil {
		return l, fmt.Errorf("log level %q: it is one of debug, info, warn, error", level)
	}
	o := &slog.HandlerOptions{Level: l.level}
	if format == "json" {
		l.Logger = slog.New(slog.NewJSONHandler(w, o))
	} else {
		l.Logger = slog.New(slog.NewTextHandler(w, o))
	}
	return l, nil
}
