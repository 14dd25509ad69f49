package telemetry

import (
	"context"
	"fmt"
	"net/url"
	"time"

	"github.com/containerd/errdefs"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
)

// TraceOptions say where traces go.
type TraceOptions struct {
	Endpoint string // URL
	Protocol string // "grpc" or "http/protobuf"
	Insecure bool
	Ratio    float64 // of requests that are traced, unless their caller decided
	Service  string  // the daemon's name in traces
	Version  string
}

// Traces send what the daemon does to a collector. A collector that is not
// there costs nothing but the traces.
type Traces struct{ provider *sdk.TracerProvider }

// closeTime bounds sending what is left.
const closeTime = 5 * time.Second

// OpenTraces makes traces go to a collector.
func OpenTraces(ctx context.Context, o TraceOptions) (*Traces, error) {
	u, err := url.Parse(o.Endpoint)
	if err != nil || u.Host == "" {
		return nil, fmt.Errorf("endpoint of traces %q: give a URL such as http://127.0.0.1:4318: %w", o.Endpoint, errdefs.ErrInvalidArgument)
	}
	var client otlptrace.Client
	switch o.Protocol {
	case "", "http/protobuf":
		options := []otlptracehttp.Option{otlptracehttp.WithEndpointURL(o.Endpoint)}
		if u.Path == "" || u.Path == "/" {
			options = append(options, otlptracehttp.WithURLPath("/v1/traces"))
		}
		if o.Insecure {
			options = append(options, otlptracehttp.WithInsecure())
		}
		client = otlptracehttp.NewClient(options...)
	case "grpc":
		options := []otlptracegrpc.Option{otlptracegrpc.WithEndpointURL(o.Endpoint)}
		if o.Insecure {
			options = append(options, otlptracegrpc.WithInsecure())
		}
		client = otlptracegrpc.NewClient(options...)
	default:
		return nil, fmt.Errorf("protocol of traces %q: give grpc or http/protobuf: %w", o.Protocol, errdefs.ErrInvalidArgument)
	}
	exporter, err := otlptrace.New(ctx, client)
	if err != nil {
		return nil, fmt.Errorf("open traces to %s: %w", u.Redacted(), err)
	}
	return newTraces(sdk.NewBatchSpanProcessor(exporter), o), nil
}

func newTraces(to sdk.SpanProcessor, o TraceOptions) *Traces {
	return &Traces{provider: sdk.NewTracerProvider(
		sdk.WithSpanProcessor(to),
		sdk.WithSampler(sdk.ParentBased(sdk.TraceIDRatioBased(o.Ratio))),
		sdk.WithResource(resource.NewSchemaless(attribute.String("service.name", o.Service), attribute.String("service.version", o.Version))),
	)}
}

// Tracer makes the spans of one room.
func (t *Traces) Tracer(room string) trace.Tracer { return t.provider.Tracer("cloister.dev/" + room) }

// ServerOption makes a span of every call, below that of its caller.
func (t *Traces) ServerOption() grpc.ServerOption {
	return grpc.StatsHandler(otelgrpc.NewServerHandler(otelgrpc.WithTracerProvider(t.provider), otelgrpc.WithPropagators(propagation.TraceContext{})))
}

// Close sends what is left.
func (t *Traces) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTime)
	defer cancel()
	if err := t.provider.Shutdown(ctx); err != nil {
		return fmt.Errorf("send the last traces: %w", err)
	}
	return nil
}
