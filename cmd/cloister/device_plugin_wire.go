package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"cloister.dev/internal/config"
	"cloister.dev/internal/pod"
	"cloister.dev/internal/tee/agent"
	"cloister.dev/internal/tee/backend"
	"cloister.dev/internal/tee/teec"
)

// agentOptions gives what the configuration says of the device plugin.
func agentOptions(cfg config.Config) agent.Options {
	p := cfg.DevicePlugin
	o := agent.Options{
		Backends: p.Backends, Backend: backendOptions(p), HealthInterval: p.HealthInterval.Duration,
		PluginDir: filepath.Join(p.KubeletDir, "device-plugins"), CDIDir: p.CDIDir, MaxDevices: p.MaxDevices,
		StatusSocket: statusSocket(cfg), MetricsAddress: p.MetricsAddress, Kubeconfig: p.Kubeconfig, NodeName: p.NodeName, Version: version,
	}
	if o.NodeName == "" && o.Kubeconfig != "" {
		o.NodeName, _ = os.Hostname() // an empty name is refused with a sentence
	}
	return o
}

// devicePlugin is the agent inside the daemon. A nil one is switched off.
type devicePlugin struct {
	agent *agent.Agent
	needs map[string]string // handler → backend
}

// openDevicePlugin starts the agent, if the configuration says so.
func openDevicePlugin(ctx context.Context, cfg config.Config, log *slog.Logger, closing func(string, func() error)) (*devicePlugin, error) {
	if !cfg.DevicePlugin.Enabled {
		return nil, nil
	}
	o := agentOptions(cfg)
	o.Log = log.With("room", "device-plugin")
	if len(o.Backends) == 0 {
		o.Backends = backend.Auto(o.Backend.Machine)
	}
	for _, b := range cfg.DevicePlugin.Needs { // what a handler waits for is looked for
		if !slices.Contains(o.Backends, b) {
			o.Backends = append(slices.Clone(o.Backends), b)
		}
	}
	if len(o.Backends) == 0 {
		log.Warn("the device plugin has nothing to offer: no trusted execution technology was found on this machine")
		return nil, nil
	}
	// The daemon resolves CDI names itself, so it gives none that it would not resolve.
	if !cfg.Runtime.EnableCDI || !slices.Contains(cfg.Runtime.CDISpecDirs, o.CDIDir) {
		o.CDIDir = ""
	}
	a, err := agent.New(o)
	if err != nil {
		return nil, fmt.Errorf("device plugin: %w", err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	closing("end the device plugin", func() error {
		cancel()
		return <-ended
	})
	return &devicePlugin{agent: a, needs: cfg.DevicePlugin.Needs}, nil
}

// ready tells why a handler lacks what it needs.
func (d *devicePlugin) ready(handler string) error {
	if d == nil || d.needs[handler] == "" {
		return nil
	}
	return d.agent.Inventory().Ready(d.needs[handler])
}

// conditions are those of the CRI status: one for each backend.
func (d *devicePlugin) conditions() []pod.Condition {
	if d == nil {
		return nil
	}
	states, _ := d.agent.Inventory().States()
	all := make([]pod.Condition, 0, len(states))
	for _, s := range states {
		c := pod.Condition{Type: "TEEReady." + s.Backend, OK: true}
		if err := d.agent.Inventory().Ready(s.Backend); err != nil {
			c.OK, c.Reason, c.Message = false, "TEENotReady", err.Error()
		}
		all = append(all, c)
	}
	return all
}

func backendOptions(p config.DevicePlugin) backend.Options {
	t := p.TrustZone
	misc := func(names map[string]string) backend.MiscOptions {
		for key, resource := range names {
			if resource == "" {
				delete(names, key)
			}
		}
		return backend.MiscOptions{Resources: names}
	}
	o := backend.Defaults()
	o.TrustZone = backend.TrustZoneOptions{Resource: t.Resource, PrecisionKiB: int64(p.Precision), ReserveKiB: int64(t.Reserve), Devices: t.Devices, Folders: t.Folders}
	o.Teec = teec.Options{Program: t.Helper, Library: t.Library, UUID: t.TAUUID, TAPath: t.TAPath, Login: t.Login}
	o.SGX.EnclaveLimit, o.SGX.ProvisionLimit = p.SGX.EnclaveLimit, p.SGX.ProvisionLimit
	o.SEV = misc(map[string]string{"sev": p.SEV.ASIDs, "sev_es": p.SEV.ESIDs})
	o.TDX = misc(map[string]string{"tdx": p.TDX.Keys})
	o.TPM = backend.TPMOptions{Resource: p.TPM.Resource, Limit: p.TPM.Limit}
	o.Sim = backend.SimOptions{Resource: p.Sim.Resource, PrecisionKiB: int64(p.Precision), MemoryKiB: int64(p.Sim.Memory), Nodes: p.Sim.NUMANodes,
		FaultFile: p.Sim.FaultFile, Devices: p.Sim.Devices, Folders: p.Sim.Folders}
	return o
}
