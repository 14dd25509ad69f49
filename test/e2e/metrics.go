package e2e

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"
)

// metricsAPI serves metrics.k8s.io/v1beta1 from kubelet's own figures, as much
// of it as `kubectl top` asks for: metrics-server is an image that is not to be
// had offline, and what is under test are the figures that the runtime gives.
type metricsAPI struct {
	cluster *cluster
	server  *http.Server
	port    int
}

func startMetricsAPI(c *cluster) (*metricsAPI, error) {
	pair, err := tls.LoadX509KeyPair(c.ca.file("metrics.crt"), c.ca.file("metrics.key"))
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	m := &metricsAPI{cluster: c, port: l.Addr().(*net.TCPAddr).Port}
	mux := http.NewServeMux()
	const group = "/apis/metrics.k8s.io/v1beta1"
	mux.HandleFunc(group, m.resources)
	mux.HandleFunc(group+"/nodes", m.nodes)
	mux.HandleFunc(group+"/nodes/{name}", m.nodes)
	mux.HandleFunc(group+"/pods", m.pods)
	mux.HandleFunc(group+"/namespaces/{namespace}/pods", m.pods)
	mux.HandleFunc(group+"/namespaces/{namespace}/pods/{name}", m.pods)
	m.server = &http.Server{Handler: mux, TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair}}, ReadHeaderTimeout: time.Minute}
	go func() { _ = m.server.ServeTLS(l, "", "") }() // ends with close
	return m, nil
}

func (m *metricsAPI) close() error { return m.server.Close() }

// manifest registers the API with the aggregator of the API server.
func (m *metricsAPI) manifest() string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: metrics, namespace: kube-system}
spec: {type: ExternalName, externalName: localhost, ports: [{port: %[1]d}]}
---
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: v1beta1.metrics.k8s.io}
spec:
  group: metrics.k8s.io
  version: v1beta1
  service: {name: metrics, namespace: kube-system, port: %[1]d}
  groupPriorityMinimum: 100
  versionPriority: 100
  insecureSkipTLSVerify: true
`, m.port)
}

type object map[string]any

func (m *metricsAPI) resources(w http.ResponseWriter, _ *http.Request) {
	answer(w, object{"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "metrics.k8s.io/v1beta1", "resources": []object{
		{"name": "nodes", "singularName": "", "namespaced": false, "kind": "NodeMetrics", "verbs": []string{"get", "list"}},
		{"name": "pods", "singularName": "", "namespaced": true, "kind": "PodMetrics", "verbs": []string{"get", "list"}},
	}})
}

// summary is the part of kubelet's /stats/summary that is used.
type summary struct {
	Node usage
	Pods []struct {
		PodRef     struct{ Name, Namespace string }
		Containers []struct {
			Name string
			usage
		}
	}
}

type usage struct {
	CPU    struct{ UsageNanoCores *uint64 }
	Memory struct{ WorkingSetBytes *uint64 }
}

// complete says whether the runtime gave both figures.
func (u usage) complete() bool { return u.CPU.UsageNanoCores != nil && u.Memory.WorkingSetBytes != nil }

func (u usage) object() object {
	var cpu, memory uint64
	if u.CPU.UsageNanoCores != nil {
		cpu = *u.CPU.UsageNanoCores
	}
	if u.Memory.WorkingSetBytes != nil {
		memory = *u.Memory.WorkingSetBytes
	}
	return object{"cpu": fmt.Sprintf("%dn", cpu), "memory": fmt.Sprintf("%dKi", memory>>10)}
}

func (c *cluster) summary(ctx context.Context) (s summary, err error) {
	out, err := c.kubectl(ctx, "get", "--raw", "/api/v1/nodes/"+nodeName+"/proxy/stats/summary")
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal([]byte(out), &s)
}

func (m *metricsAPI) nodes(w http.ResponseWriter, r *http.Request) {
	s, err := m.cluster.summary(r.Context())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	node := measured("NodeMetrics", object{"name": nodeName})
	node["usage"] = s.Node.object()
	list(w, "NodeMetrics", r.PathValue("name") != "", []object{node})
}

func (m *metricsAPI) pods(w http.ResponseWriter, r *http.Request) {
	s, err := m.cluster.summary(r.Context())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	var items []object
	for _, p := range s.Pods {
		if ns := r.PathValue("namespace"); ns != "" && ns != p.PodRef.Namespace {
			continue
		}
		if name := r.PathValue("name"); name != "" && name != p.PodRef.Name {
			continue
		}
		pod := measured("PodMetrics", object{"name": p.PodRef.Name, "namespace": p.PodRef.Namespace})
		var containers []object
		for _, c := range p.Containers {
			containers = append(containers, object{"name": c.Name, "usage": c.object()})
		}
		pod["containers"] = containers
		items = append(items, pod)
	}
	list(w, "PodMetrics", r.PathValue("name") != "", items)
}

func measured(kind string, metadata object) object {
	return object{"kind": kind, "apiVersion": "metrics.k8s.io/v1beta1", "metadata": metadata,
		"timestamp": time.Now().UTC().Format(time.RFC3339), "window": "10s"}
}

func list(w http.ResponseWriter, kind string, one bool, items []object) {
	switch {
	case !one:
		if items == nil {
			items = []object{}
		}
		answer(w, object{"kind": kind + "List", "apiVersion": "metrics.k8s.io/v1beta1", "metadata": object{}, "items": items})
	case len(items) == 0:
		http.Error(w, strings.ToLower(kind)+" not found", http.StatusNotFound)
	default:
		answer(w, items[0])
	}
}

func answer(w http.ResponseWriter, o object) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(o) // the reader went away
}
