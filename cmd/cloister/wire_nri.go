package main

import (
	"fmt"
	"log/slog"
	"path/filepath"

	"cloister.dev/internal/config"
	"cloister.dev/internal/nri"
)

// newNRI gives the server that plugins connect to, nil when it is turned off.
// A daemon that was moved has a socket of its own, beside its others.
func newNRI(cfg config.Config, version string, log *slog.Logger) (*nri.Server, error) {
	n := cfg.Plugins.NRI
	if n.Disable {
		return nil, nil
	}
	socket := n.SocketPath
	if def := config.Default(); socket == def.Plugins.NRI.SocketPath && cfg.State != def.State {
		socket = filepath.Join(cfg.State, "nri.sock")
	}
	if !filepath.IsAbs(socket) {
		return nil, fmt.Errorf("socket_path of NRI is %q; it has to be an absolute path", socket)
	}
	v := n.DefaultValidator
	return nri.New(nri.Options{
		Version: version, Socket: socket, Plugins: n.PluginPath, PluginConf: n.PluginConfigPath,
		RegistrationTime: n.PluginRegistrationTimeout.Duration, RequestTime: n.PluginRequestTimeout.Duration,
		NoConnections: n.DisableConnections, Log: log,
		Validator: &nri.Validator{
			Enable: v.Enable, RejectOCIHookAdjustment: v.RejectOCIHookAdjustment,
			RejectRuntimeDefaultSeccompAdjustment: v.RejectRuntimeDefaultSeccompAdjustment,
			RejectUnconfinedSeccompAdjustment:     v.RejectUnconfinedSeccompAdjustment,
			RejectCustomSeccompAdjustment:         v.RejectCustomSeccompAdjustment,
			RejectNamespaceAdjustment:             v.RejectNamespaceAdjustment, RejectSysctlAdjustment: v.RejectSysctlAdjustment,
			RequiredPlugins: v.RequiredPlugins, TolerateMissingAnnotation: v.TolerateMissingPluginsAnnotation,
		},
	})
}
