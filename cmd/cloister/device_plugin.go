package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"cloister.dev/internal/config"
	"cloister.dev/internal/tee/agent"
	"cloister.dev/internal/tee/backend"
)

func (a *app) devicePluginCommand() *cobra.Command {
	cmd := a.devicePluginRun("device-plugin")
	cmd.Short = "Offer TEE memory and TEE devices to pods"
	cmd.AddCommand(a.devicePluginRun("run"), a.devicePluginStatus(), a.devicePluginManifest())
	return cmd
}

// pluginFlags are settings of the file that the command line may change.
type pluginFlags struct {
	file, level string
	set         config.DevicePlugin
	health      seconds
}

func (a *app) devicePluginRun(use string) *cobra.Command {
	f := pluginFlags{set: config.Default().DevicePlugin}
	cmd := &cobra.Command{
		Use:   use,
		Short: "Offer them until SIGTERM",
		Long: `Offers what trusted execution technology the machine has to kubelet, by its
device plugin API: memory in units of --precision KiB, opens of device nodes, key
ids. The settings are those of the table [device_plugin] of the configuration
file, and flags go before it. A daemon with enabled = true there does the same.

The original plugin's flags -precision KIB and -internal SECONDS are taken, too.`,
		Example: `  cloister device-plugin                       # what the machine has
  cloister device-plugin run --backend trustzone --precision 1024 --health-interval 30s
  cloister device-plugin run --backend sim     # a simulation, to try it
  cloister device-plugin status
  cloister device-plugin manifest --backend sgx --image registry.example/cloister | kubectl apply -f -`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := f.load(cmd)
			if err != nil {
				return usage(err)
			}
			log, err := newLogger(a.stderr, cfg.LogLevel, cfg.LogFormat)
			if err != nil {
				return usage(err)
			}
			o := agentOptions(cfg)
			o.Log = log.Logger
			plugin, err := agent.New(o)
			if err != nil {
				return err
			}
			return plugin.Run(cmd.Context())
		},
	}
	f.add(cmd)
	return cmd
}

func (f *pluginFlags) add(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVarP(&f.file, "config", "c", "", "configuration `file` (default "+config.DefaultPath+", if it is there)")
	fl.StringVarP(&f.level, "log-level", "l", "", "debug, info, warn or error")
	fl.StringSliceVarP(&f.set.Backends, "backend", "b", nil, "`name` of a technology, of "+strings.Join(backend.Names(), ", ")+"; may be repeated")
	fl.IntVar(&f.set.Precision, "precision", f.set.Precision, "size of a unit of memory in `KiB`, 512 or more")
	f.health = seconds(f.set.HealthInterval.Duration)
	fl.Var(&f.health, "health-interval", "time between two checks, as 30s or in seconds; 0 switches them off")
	fl.StringVar(&f.set.KubeletDir, "kubelet-dir", f.set.KubeletDir, "kubelet's `folder`")
	fl.StringVar(&f.set.CDIDir, "cdi-dir", f.set.CDIDir, "`folder` for CDI specifications; empty writes none")
	fl.StringVar(&f.set.MetricsAddress, "metrics-address", "", "`HOST:PORT` for Prometheus; without it metrics are on the status socket alone")
	fl.StringVar(&f.set.Kubeconfig, "kubeconfig", "", "credentials to label the Node, tell its EPC and events; \"in-cluster\" takes the pod's")
	fl.StringVar(&f.set.NodeName, "node-name", "", "name of the Node (default the host's)")
	fl.StringVar(&f.set.Sim.FaultFile, "sim-fault-file", "", "the backend sim is unhealthy while this `file` is there")
}

// load reads the file and lays the flags that were given over it.
func (f *pluginFlags) load(cmd *cobra.Command) (config.Config, error) {
	cfg, err := config.Load(f.file)
	if err != nil {
		return cfg, err
	}
	p := &cfg.DevicePlugin
	given := map[string]func(){
		"backend":         func() { p.Backends = f.set.Backends },
		"precision":       func() { p.Precision = f.set.Precision },
		"health-interval": func() { p.HealthInterval.Duration = time.Duration(f.health) },
		"kubelet-dir":     func() { p.KubeletDir = f.set.KubeletDir },
		"cdi-dir":         func() { p.CDIDir = f.set.CDIDir },
		"metrics-address": func() { p.MetricsAddress = f.set.MetricsAddress },
		"kubeconfig":      func() { p.Kubeconfig = f.set.Kubeconfig },
		"node-name":       func() { p.NodeName = f.set.NodeName },
		"sim-fault-file":  func() { p.Sim.FaultFile = f.set.Sim.FaultFile },
		"log-level":       func() { cfg.LogLevel = f.level },
	}
	for name, set := range given {
		if cmd.Flags().Changed(name) {
			set()
		}
	}
	p.Enabled = true
	return cfg, cfg.Validate()
}

// statusSocket is where the plugin of a configuration tells its state.
func statusSocket(cfg config.Config) string { return filepath.Join(cfg.State, "device-plugin.sock") }

// seconds is a flag that takes a duration, or a plain number of seconds as the
// original plugin does.
type seconds time.Duration

func (s *seconds) String() string { return time.Duration(*s).String() }
func (s *seconds) Type() string   { return "duration" }

func (s *seconds) Set(text string) error {
	if n, err := strconv.Atoi(text); err == nil {
		text = strconv.Itoa(n) + "s"
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		return errors.New("it is written as 30s, or in seconds")
	}
	if d < 0 {
		return fmt.Errorf("%s is negative; 0 switches checks off", d)
	}
	*s = seconds(d)
	return nil
}

// originalFlags rewrites the flags of the original plugin, which have one dash.
func originalFlags(argv []string) []string {
	if len(argv) == 0 || argv[0] != "device-plugin" {
		return argv
	}
	names := map[string]string{"-precision": "--precision", "-internal": "--health-interval", "--internal": "--health-interval"}
	out := make([]string, 0, len(argv))
	for _, a := range argv {
		name, value, joined := strings.Cut(a, "=")
		if long, ok := names[name]; ok {
			a = long
			if joined {
				a += "=" + value
			}
		}
		out = append(out, a)
	}
	return out
}
