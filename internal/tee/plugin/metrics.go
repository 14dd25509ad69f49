package plugin

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"cloister.dev/internal/tee"
)

// Metrics counts for Prometheus.
type Metrics struct {
	inv           *tee.Inventory
	registrations *prometheus.CounterVec
	allocations   *prometheus.CounterVec
	changes       *prometheus.CounterVec
	open          *prometheus.GaugeVec
	checks        *prometheus.HistogramVec
	units         *prometheus.Desc
	bytes         *prometheus.Desc
}

// NewMetrics makes the counters of an inventory, nil if there is none yet.
func NewMetrics(inv *tee.Inventory) *Metrics {
	const space = "cloister_tee_"
	return &Metrics{
		inv: inv,
		registrations: prometheus.NewCounterVec(prometheus.CounterOpts{Name: space + "registrations_total",
			Help: "Registrations with kubelet."}, []string{"resource", "result"}),
		allocations: prometheus.NewCounterVec(prometheus.CounterOpts{Name: space + "allocations_total",
			Help: "Allocations that kubelet asked for."}, []string{"resource", "result"}),
		changes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: space + "health_changes_total",
			Help: "Parts of resources that became healthy or unhealthy."}, []string{"backend", "resource", "to"}),
		open: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: space + "streams",
			Help: "Open ListAndWatch streams."}, []string{"resource"}),
		checks: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: space + "check_seconds",
			Help: "Time that a check of a backend took.", Buckets: []float64{.001, .01, .1, 1, 10}}, []string{"backend", "result"}),
		units: prometheus.NewDesc(space+"units", "Units of a resource by health.", []string{"backend", "resource", "health"}, nil),
		bytes: prometheus.NewDesc(space+"bytes", "Bytes of a resource by part.", []string{"backend", "resource", "part"}, nil),
	}
}

// Watch sets the inventory whose units are told.
func (m *Metrics) Watch(inv *tee.Inventory) { m.inv = inv }

func (m *Metrics) counters() []prometheus.Collector {
	return []prometheus.Collector{m.registrations, m.allocations, m.changes, m.open, m.checks}
}

// Describe is of prometheus.Collector.
func (m *Metrics) Describe(out chan<- *prometheus.Desc) {
	for _, c := range m.counters() {
		c.Describe(out)
	}
	out <- m.units
	out <- m.bytes
}

// Collect is of prometheus.Collector.
func (m *Metrics) Collect(out chan<- prometheus.Metric) {
	for _, c := range m.counters() {
		c.Collect(out)
	}
	if m.inv == nil {
		return
	}
	states, _ := m.inv.States()
	for _, s := range states {
		for _, r := range s.Resources {
			m.collect(out, s.Backend, r)
		}
	}
}

func (m *Metrics) collect(out chan<- prometheus.Metric, backend string, r tee.ResourceState) {
	var healthy, unhealthy int
	for n, p := range r.Parts {
		if r.Model == tee.Bytes {
			out <- prometheus.MustNewConstMetric(m.bytes, prometheus.GaugeValue, float64(p.Bytes), backend, r.Name, p.Key)
		}
		if r.Health[n].Healthy {
			healthy += p.Units
		} else {
			unhealthy += p.Units
		}
	}
	if r.Model != tee.Bytes {
		out <- prometheus.MustNewConstMetric(m.units, prometheus.GaugeValue, float64(healthy), backend, r.Name, "healthy")
		out <- prometheus.MustNewConstMetric(m.units, prometheus.GaugeValue, float64(unhealthy), backend, r.Name, "unhealthy")
	}
}

// Changed counts a change of health; it fits tee.Options.OnChange.
func (m *Metrics) Changed(c tee.Change) {
	to := "unhealthy"
	if c.Healthy {
		to = "healthy"
	}
	m.changes.WithLabelValues(c.Backend, c.Resource, to).Inc()
}

// Checked counts a check; it fits tee.Options.OnCheck.
func (m *Metrics) Checked(backend string, took time.Duration, err error) {
	m.checks.WithLabelValues(backend, result(err)).Observe(took.Seconds())
}

func (m *Metrics) registered(resource string, err error) {
	m.registrations.WithLabelValues(resource, result(err)).Inc()
}

func (m *Metrics) allocated(resource string, err error) {
	m.allocations.WithLabelValues(resource, result(err)).Inc()
}

func (m *Metrics) streams(resource string, n float64) { m.open.WithLabelValues(resource).Add(n) }

func result(err error) string {
	if err != nil {
		return "error"
	}
	return "ok"
}
