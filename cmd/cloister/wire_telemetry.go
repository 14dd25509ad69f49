package main

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"os"

	"google.golang.org/grpc"

	"cloister.dev/internal/config"
	"cloister.dev/internal/cri"
	"cloister.dev/internal/pod"
	"cloister.dev/internal/telemetry"
)

// telemetries are what the configuration asks for; nil ones are off and cost
// nothing.
type telemetries struct {
	metrics *telemetry.Metrics
	traces  *telemetry.Traces
	server  *telemetry.Server
}

func openTelemetry(ctx context.Context, cfg config.Config, version string) (*telemetries, error) {
	t := &telemetries{}
	if cfg.Plugins.Metrics.Address != "" {
		t.metrics = telemetry.NewMetrics(version)
	}
	o := cfg.Plugins.OTLP
	// The variables that OpenTelemetry itself has for this.
	o.Endpoint = cmp.Or(o.Endpoint, os.Getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"), os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT"))
	o.Protocol = cmp.Or(o.Protocol, os.Getenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"), os.Getenv("OTEL_EXPORTER_OTLP_PROTOCOL"))
	if o.Endpoint != "" {
		var err error
		t.traces, err = telemetry.OpenTraces(ctx, telemetry.TraceOptions{Endpoint: o.Endpoint, Protocol: o.Protocol, Insecure: o.Insecure,
			Ratio: cfg.Plugins.Tracing.SamplingRatio, Service: cfg.Plugins.Tracing.ServiceName, Version: version})
		if err != nil {
			return nil, err
		}
	}
	return t, nil
}

// observer is what the pod service tells.
func (t *telemetries) observer() pod.Observer {
	var o pod.Observer
	if m := t.metrics; m != nil {
		o = pod.Observer{Stage: m.Stage, Ready: m.PodStart, Network: m.Network, Shim: m.Shim}
	}
	if t.traces != nil {
		o.Tracer = t.traces.Tracer("pod")
	}
	return o
}

// observe adds to the CRI server's options what that server tells.
func (t *telemetries) observe(o cri.Options) cri.Options {
	if t.metrics != nil {
		o.ObserveCall, o.ObservePull = t.metrics.Call, t.metrics.Pull
	}
	return o
}

func (t *telemetries) grpcOptions() []grpc.ServerOption {
	if t.traces == nil {
		return nil
	}
	return []grpc.ServerOption{t.traces.ServerOption()}
}

// serve serves metrics and health of a daemon whose services are open.
func (t *telemetries) serve(cfg config.Config, pods *pod.Service, log *slog.Logger) (err error) {
	if t.metrics == nil {
		return nil
	}
	t.metrics.Count("pods", "Pods by state.", "state", func() map[string]int { n, _ := pods.Counts(); return n })
	t.metrics.Count("containers", "Containers by state.", "state", func() map[string]int { _, n := pods.Counts(); return n })
	t.metrics.Count("handler_works", "Runtime handlers that a probe found working.", "handler", pods.Working)
	t.server, err = telemetry.Serve(cfg.Plugins.Metrics.Address, t.metrics, pods.Unwell, log)
	return err
}

func (t *telemetries) close() error {
	var errs []error
	if t.server != nil {
		errs = append(errs, t.server.Close())
	}
	if t.traces != nil {
		errs = append(errs, t.traces.Close())
	}
	return errors.Join(errs...)
}
