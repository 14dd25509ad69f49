// Package telemetry tells the world outside how the daemon does: metrics for
// Prometheus, traces for OpenTelemetry, and health.
//
// It promises that a daemon without it pays nothing: what is measured is handed
// in by functions that are nil then. It knows no pods and no images, only
// names, durations and results. No label holds what a tenant can choose.
package telemetry

import (
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

const namespace = "cloister"

// Metrics are what is measured as it happens.
type Metrics struct {
	registry *prometheus.Registry
	calls    *prometheus.CounterVec
	callTime *prometheus.HistogramVec
	stages   *prometheus.HistogramVec
	pulls    *prometheus.HistogramVec
	pulled   prometheus.Counter
	network  *prometheus.HistogramVec
	starts   prometheus.Histogram
	shims    *prometheus.HistogramVec
}

// Durations from a stage of a pod to a slow pull.
var (
	quick = prometheus.ExponentialBuckets(0.001, 2, 14) // 1 ms to 8 s
	slow  = prometheus.ExponentialBuckets(0.05, 2, 14)  // 50 ms to 7 min
)

// NewMetrics makes metrics, all at zero.
func NewMetrics(version string) *Metrics {
	histogram := func(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{Namespace: namespace, Name: name, Help: help, Buckets: buckets}, labels)
	}
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: namespace, Name: "cri_calls_total",
			Help: "Calls of the Container Runtime Interface by name and gRPC code."}, []string{"call", "code"}),
		stages: histogram("stage_seconds", "Time of each stage of making a pod or a container.", quick, "object", "stage"),
		pulls:  histogram("image_pull_seconds", "Time of image pulls by result.", slow, "result"),
		pulled: prometheus.NewCounter(prometheus.CounterOpts{Namespace: namespace, Name: "image_pull_bytes_total",
			Help: "Bytes of the images that were pulled, as they lie in the registry."}),
		network: histogram("network_seconds", "Time of attaching and detaching pods by result.", quick, "operation", "result"),
		starts: prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: namespace, Name: "pod_start_seconds",
			Help: "Time from the request for a pod to its readiness.", Buckets: quick}),
		callTime: histogram("cri_call_seconds", "Time of calls of the Container Runtime Interface.", quick, "call"),
		shims:    histogram("shim_seconds", "Time of what shims are asked for, by result.", quick, "operation", "result"),
	}
	m.registry.MustRegister(m.calls, m.callTime, m.stages, m.pulls, m.pulled, m.network, m.starts, m.shims,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: namespace, Name: "build_info", Help: "The daemon's version.",
			ConstLabels: prometheus.Labels{"version": version}}, func() float64 { return 1 }))
	return m
}

// Call notes a call of CRI.
func (m *Metrics) Call(name, code string, took time.Duration) {
	m.calls.WithLabelValues(name, code).Inc()
	m.callTime.WithLabelValues(name).Observe(took.Seconds())
}

// Stage notes a stage of making something; the stages are few and fixed.
func (m *Metrics) Stage(object, stage string, took time.Duration) {
	m.stages.WithLabelValues(label(object), label(stage)).Observe(took.Seconds())
}

// PodStart notes how long a pod took.
func (m *Metrics) PodStart(took time.Duration) { m.starts.Observe(took.Seconds()) }

// Pull notes a pull and the size of its image.
func (m *Metrics) Pull(took time.Duration, bytes int64, err error) {
	m.pulls.WithLabelValues(result(err)).Observe(took.Seconds())
	if err == nil {
		m.pulled.Add(float64(bytes))
	}
}

// Network notes an attachment or detachment.
func (m *Metrics) Network(operation string, took time.Duration, err error) {
	m.network.WithLabelValues(operation, result(err)).Observe(took.Seconds())
}

// Shim notes what a shim was asked for.
func (m *Metrics) Shim(operation string, took time.Duration, err error) {
	m.shims.WithLabelValues(operation, result(err)).Observe(took.Seconds())
}

// Count shows counts that are taken at each scrape, by label.
func (m *Metrics) Count(name, help, label string, counts func() map[string]int) {
	m.registry.MustRegister(&counted{
		desc:   prometheus.NewDesc(prometheus.BuildFQName(namespace, "", name), help, []string{label}, nil),
		counts: counts,
	})
}

type counted struct {
	desc   *prometheus.Desc
	counts func() map[string]int
}

// Describe is part of prometheus.Collector.
func (c *counted) Describe(to chan<- *prometheus.Desc) { to <- c.desc }

// Collect is part of prometheus.Collector.
func (c *counted) Collect(to chan<- prometheus.Metric) {
	for label, n := range c.counts() {
		to <- prometheus.MustNewConstMetric(c.desc, prometheus.GaugeValue, float64(n), label)
	}
}

func result(err error) string {
	if err != nil {
		return "error"
	}
	return "ok"
}

// label makes a word of a stage's name.
func label(s string) string { return strings.ReplaceAll(s, " ", "_") }
