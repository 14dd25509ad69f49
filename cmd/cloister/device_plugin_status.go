package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"cloister.dev/internal/client/display"
	"cloister.dev/internal/config"
	"cloister.dev/internal/tee"
	"cloister.dev/internal/tee/manifest"
	"cloister.dev/internal/tee/plugin"
)

// pluginReport is what status prints.
type pluginReport struct {
	plugin.Status
	// Uses is nil when kubelet could not be asked.
	Uses      []plugin.Use `json:"uses"`
	UsesError string       `json:"usesError,omitempty"`
	// Machine is what the probes see, whether a backend is switched on or not.
	Machine []tee.Finding `json:"machine"`
}

func (a *app) devicePluginStatus() *cobra.Command {
	var format *display.Format
	var socket, file, kubelet string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show resources, their health, and which pods hold them",
		Long: `Asks the running plugin what it offers and kubelet who holds it. Exits with 1
when no plugin runs, or when something is unhealthy.`,
		Example: "  cloister device-plugin status\n  cloister device-plugin status -o json",
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(file)
			if err != nil {
				return usage(err)
			}
			if socket == "" {
				socket = statusSocket(cfg)
			}
			if kubelet == "" {
				kubelet = cfg.DevicePlugin.KubeletDir
			}
			r, err := readReport(cmd.Context(), socket, kubelet)
			if err != nil {
				return err
			}
			if format.Structured() {
				err = display.Value(a.stdout, *format, r)
			} else {
				err = a.printReport(r, *format == display.Wide)
			}
			return errors.Join(err, r.complaint())
		},
	}
	format = outputFlag(cmd)
	cmd.Flags().StringVar(&socket, "status-socket", "", "status `socket` of the plugin (default that of the configuration)")
	cmd.Flags().StringVarP(&file, "config", "c", "", "configuration `file` (default "+config.DefaultPath+", if it is there)")
	cmd.Flags().StringVar(&kubelet, "kubelet-dir", "", "kubelet's `folder`, which holds pod-resources")
	return cmd
}

func readReport(ctx context.Context, socket, kubelet string) (pluginReport, error) {
	s, err := plugin.ReadStatus(ctx, socket)
	if err != nil {
		return pluginReport{}, err
	}
	r := pluginReport{Status: s, Machine: tee.Machine{}.Probe()}
	if r.Uses, err = plugin.Uses(ctx, plugin.PodResourcesSocket(kubelet)); err != nil {
		r.UsesError = err.Error()
	}
	return r, nil
}

// complaint is what makes the command fail.
func (r pluginReport) complaint() error {
	var bad []string
	for _, b := range r.Backends {
		if b.Error != "" {
			bad = append(bad, b.Backend+": "+b.Error)
			continue
		}
		for _, res := range b.Resources {
			for _, h := range res.Health {
				if !h.Healthy {
					bad = append(bad, strings.TrimSpace(res.Name+" "+h.Part)+": "+h.Reason)
				}
			}
		}
	}
	if len(bad) == 0 {
		return nil
	}
	return errors.New("unhealthy: " + strings.Join(bad, "; "))
}

func (a *app) printReport(r pluginReport, wide bool) error {
	t := &display.Table{Heading: []string{"RESOURCE", "BACKEND", "PART", "UNITS", "USED", "HEALTH", "REASON"}}
	if wide {
		t.Heading = append(t.Heading, "UNIT", "KUBELET", "SOCKET", "CDI", "LIMIT")
	}
	ends := map[string]plugin.EndpointStatus{}
	for _, e := range r.Endpoints {
		ends[e.Resource] = e
	}
	used := map[string]int{}
	for _, u := range r.Uses {
		used[u.Resource] += u.Units
	}
	for _, b := range r.Backends {
		if len(b.Resources) == 0 {
			t.Add("-", b.Backend, "-", "0", "0", "-", b.Error)
		}
		for _, res := range b.Resources {
			for n, p := range res.Parts {
				row := []string{res.Name, b.Backend, p.Key, units(res, p), strconv.Itoa(used[res.Name]), healthWord(res.Health[n]), res.Health[n].Reason}
				if wide {
					e := ends[res.Name]
					row = append(row, unit(res), linked(e), e.Socket, e.CDI, e.Limit)
				}
				t.Add(row...)
			}
		}
	}
	if err := t.Write(a.stdout); err != nil {
		return err
	}
	if r.UsesError != "" {
		_, err := fmt.Fprintln(a.stdout, "\nwho holds them is not known: "+display.Plain(r.UsesError))
		return err
	}
	return a.printUses(r)
}

func (a *app) printUses(r pluginReport) error {
	ours := map[string]bool{}
	for _, e := range r.Endpoints {
		ours[e.Resource] = true
	}
	t := &display.Table{Heading: []string{"NAMESPACE", "POD", "CONTAINER", "RESOURCE", "UNITS"}}
	for _, u := range r.Uses {
		if ours[u.Resource] {
			t.Add(u.Namespace, u.Pod, u.Container, u.Resource, strconv.Itoa(u.Units))
		}
	}
	if len(t.Rows) == 0 {
		return nil
	}
	fmt.Fprintln(a.stdout)
	return t.Write(a.stdout)
}

func units(r tee.ResourceState, p tee.Part) string {
	if r.Model == tee.Bytes {
		return display.Bytes(uint64(p.Bytes))
	}
	return strconv.Itoa(p.Units)
}

func unit(r tee.ResourceState) string {
	switch r.Model {
	case tee.Memory:
		return display.Bytes(uint64(r.UnitKiB) << 10)
	case tee.Bytes:
		return "1 B"
	}
	return "1"
}

func healthWord(h tee.Health) string {
	if h.Healthy {
		return "healthy"
	}
	return "unhealthy"
}

func linked(e plugin.EndpointStatus) string {
	switch {
	case e.Registered && e.Streams > 0:
		return "registered"
	case e.Registered:
		return "registered, not watched"
	case e.Error != "":
		return e.Error
	}
	return "-"
}

func (a *app) devicePluginManifest() *cobra.Command {
	p := config.Default().DevicePlugin
	o := manifest.Options{Image: "registry.example/cloister:1", TestImage: "docker.io/library/busybox", Precision: p.Precision, Health: p.HealthInterval.String()}
	cmd := &cobra.Command{
		Use:   "manifest",
		Short: "Print a DaemonSet that runs the plugin, and a pod that tries it",
		Example: `  cloister device-plugin manifest --backend trustzone --image registry.example/cloister:1.0 | kubectl apply -f -
  cloister device-plugin manifest --backend sgx --test`,
		Args: args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			o.Resource = map[string]string{"trustzone": p.TrustZone.Resource, "sgx": "sgx.intel.com/enclave", "sev": p.SEV.ESIDs,
				"tdx": p.TDX.Keys, "tpm": p.TPM.Resource, "sim": p.Sim.Resource}[o.Backend]
			if o.Precision < 512 {
				return usage(fmt.Errorf("--precision is %d KiB; it has to be 512 or more", o.Precision))
			}
			b, err := manifest.Write(o)
			if err != nil {
				return usage(err)
			}
			_, err = a.stdout.Write(b)
			return err
		},
	}
	f := cmd.Flags()
	f.StringVarP(&o.Backend, "backend", "b", "", "`name` of the technology")
	f.StringVar(&o.Image, "image", o.Image, "image with /cloister and, for trustzone, /cloister-teec")
	f.StringVar(&o.TestImage, "test-image", o.TestImage, "image of the test pod")
	f.IntVar(&o.Precision, "precision", o.Precision, "size of a unit of memory in `KiB`")
	f.StringVar(&o.Health, "health-interval", o.Health, "time between two checks")
	f.BoolVar(&o.Test, "test", false, "print a pod that asks for the resource, too")
	return cmd
}
