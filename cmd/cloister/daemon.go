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
configuration file the defaults are used; flags go before the file. SIGTERM
stops the daemon and leaves pods running; the next one takes them up again.`,
		Example: `  cloister daemon
  cloister daemon --config /etc/cloister/config.toml --log-level debug
  cloister daemon --root /tmp/c/root --state /tmp/c/state   # a second one beside the first`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(file)
			if err != nil {
				return usage(err)
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
			if err := cfg.Validate(); err != nil {
				return usage(err)
			}
			log, err := logger(a.stderr, cfg.LogLevel, cfg.LogFormat)
			if err != nil {
				return usage(err)
			}
			err = runDaemon(cmd.Context(), cfg, version, log)
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
	// The flag was added in the line above.
	_ = f.MarkHidden("ephemeral")
	return cmd
}

func logger(w io.Writer, level, format string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("log level %q: it is one of debug, info, warn, error", level)
	}
	o := &slog.HandlerOptions{Level: l}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, o)), nil
	}
	return slog.New(slog.NewTextHandler(w, o)), nil
}
