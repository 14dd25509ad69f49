package telemetry

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	coltrace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/protobuf/proto"
)

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	r, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(body)
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestMetrics(t *testing.T) {
	m := NewMetrics("v1")
	m.Call("RunPodSandbox", "OK", 20*time.Millisecond)
	m.Stage("pod sandbox", "making namespaces", 3*time.Millisecond)
	m.PodStart(30 * time.Millisecond)
	m.Pull(time.Second, 1000, nil)
	m.Pull(time.Second, 0, errors.New("x"))
	m.Network("attach", time.Millisecond, nil)
	m.Shim("start container", time.Millisecond, errors.New("x"))
	m.Count("pods", "Pods by state.", "state", func() map[string]int { return map[string]int{"ready": 2} })
	reasons := []string{"NetworkPluginNotReady: no file"}
	address := freeAddress(t)
	s, err := Serve(address, m, func(context.Context) []string { return reasons }, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/metrics", "/v1/metrics"} {
		code, text := get(t, "http://"+address+path)
		for _, want := range []string{
			`cloister_cri_calls_total{call="RunPodSandbox",code="OK"} 1`,
			`cloister_cri_call_seconds_count{call="RunPodSandbox"} 1`,
			`cloister_stage_seconds_count{object="pod_sandbox",stage="making_namespaces"} 1`,
			`cloister_pod_start_seconds_count 1`,
			`cloister_image_pull_bytes_total 1000`,
			`cloister_image_pull_seconds_count{result="error"} 1`,
			`cloister_network_seconds_count{operation="attach",result="ok"} 1`,
			`cloister_shim_seconds_count{operation="start container",result="error"} 1`,
			`cloister_pods{state="ready"} 2`,
			`cloister_build_info{version="v1"} 1`,
			"go_goroutines ", "process_resident_memory_bytes ",
		} {
			if code != http.StatusOK || !strings.Contains(text, want) {
				t.Errorf("%s: status %d, lacks %s", path, code, want)
			}
		}
	}
	if code, text := get(t, "http://"+address+"/healthz"); code != http.StatusServiceUnavailable || !strings.Contains(text, "no file") {
		t.Errorf("unwell: %d %s", code, text)
	}
	reasons = nil
	if code, text := get(t, "http://"+address+"/healthz"); code != http.StatusOK || text != "ok\n" {
		t.Errorf("well: %d %s", code, text)
	}
	if code, _ := get(t, "http://"+address+"/livez"); code != http.StatusOK {
		t.Errorf("alive: %d", code)
	}
	if _, err := Serve(address, NewMetrics(""), nil, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("two servers on one address")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// TestTraces sends spans to a collector.
func TestTraces(t *testing.T) {
	var names atomic.Pointer[[]string]
	collector := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		var req coltrace.ExportTraceServiceRequest
		body, _ := io.ReadAll(r.Body)
		if r.URL.Path != "/v1/traces" || proto.Unmarshal(body, &req) != nil {
			return
		}
		var all []string
		for _, rs := range req.ResourceSpans {
			for _, ss := range rs.ScopeSpans {
				for _, s := range ss.Spans {
					all = append(all, ss.Scope.Name+" "+s.Name)
				}
			}
		}
		names.Store(&all)
	}))
	defer collector.Close()
	tr, err := OpenTraces(t.Context(), TraceOptions{Endpoint: collector.URL, Ratio: 1, Service: "cloister", Insecure: true})
	if err != nil {
		t.Fatal(err)
	}
	_, span := tr.Tracer("pod").Start(t.Context(), "make pod sandbox")
	span.End()
	if err := tr.Close(); err != nil {
		t.Fatal(err)
	}
	if got := names.Load(); got == nil || len(*got) != 1 || (*got)[0] != "cloister.dev/pod make pod sandbox" {
		t.Errorf("the collector got %v", got)
	}
}

func TestBadTraces(t *testing.T) {
	for _, o := range []TraceOptions{{Endpoint: "nowhere"}, {Endpoint: "http://127.0.0.1:1", Protocol: "smoke"}, {Endpoint: "::"}} {
		if tr, err := OpenTraces(t.Context(), o); err == nil {
			t.Errorf("%+v: no error", o)
			_ = tr.Close()
		}
	}
}
