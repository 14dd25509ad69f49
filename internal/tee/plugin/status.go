package plugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	podresources "k8s.io/kubelet/pkg/apis/podresources/v1"

	"cloister.dev/internal/tee"
)

// Status is what a running plugin tells of itself.
type Status struct {
	Version   string           `json:"version"`
	Backends  []tee.State      `json:"backends"`
	Endpoints []EndpointStatus `json:"endpoints"`
}

// EndpointStatus is how a resource and kubelet stand.
type EndpointStatus struct {
	Resource string `json:"resource"`
	Socket   string `json:"socket"`
	link
	Streams int    `json:"streams"`
	Listed  int    `json:"listed"`
	Bytes   int    `json:"messageBytes"`
	Limit   string `json:"limit,omitempty"`
	CDI     string `json:"cdi,omitempty"`
}

// Status gives the state of everything.
func (p *Plugin) Status() Status {
	var s Status
	s.Backends, _ = p.inv.States()
	for _, e := range p.all() {
		now := e.current()
		e.mu.Lock()
		l := e.link
		e.mu.Unlock()
		s.Endpoints = append(s.Endpoints, EndpointStatus{Resource: e.name, Socket: e.socket, link: l, Streams: int(e.streams.Load()),
			Listed: now.listed, Bytes: len(now.encoded), Limit: now.limit, CDI: now.cdi})
	}
	return s
}

// Handler serves /status and /metrics.
func (p *Plugin) Handler(version string) (http.Handler, error) {
	r := prometheus.NewRegistry()
	if err := r.Register(p.metrics); err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(r, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		s := p.Status()
		s.Version = version
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(s); err != nil {
			p.log.Debug("send status", "err", err)
		}
	})
	return mux, nil
}

// maxStatus bounds what is read of a running plugin.
const maxStatus = 16 << 20

// ErrNotRunning means that no plugin serves the socket.
var ErrNotRunning = errors.New("no device plugin is running")

// ReadStatus asks the plugin that serves a status socket.
func ReadStatus(ctx context.Context, socket string) (Status, error) {
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://plugin/status", nil)
	if err != nil {
		return Status{}, err
	}
	resp, err := client.Do(req)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return Status{}, fmt.Errorf("%w at %s; start it with \"cloister device-plugin\", or set enabled in [device_plugin]: %w", ErrNotRunning, socket, errdefs.ErrNotFound)
	}
	if err != nil {
		return Status{}, fmt.Errorf("ask the device plugin: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return Status{}, fmt.Errorf("ask the device plugin: %s: %w", resp.Status, errdefs.ErrUnknown)
	}
	var s Status
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxStatus)).Decode(&s); err != nil {
		return Status{}, fmt.Errorf("read the device plugin's answer: %w", err)
	}
	return s, nil
}

// Use is what a container holds of a resource.
type Use struct {
	Namespace string `json:"namespace"`
	Pod       string `json:"pod"`
	Container string `json:"container"`
	Resource  string `json:"resource"`
	Units     int    `json:"units"`
}

// Uses asks kubelet's PodResources API who holds what.
func Uses(ctx context.Context, socket string) ([]Use, error) {
	if _, err := identify(socket); err != nil {
		return nil, fmt.Errorf("kubelet's PodResources socket: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithAuthority("localhost"), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxStatus)))
	if err != nil {
		return nil, fmt.Errorf("reach kubelet: %w", err)
	}
	defer conn.Close()
	resp, err := podresources.NewPodResourcesListerClient(conn).List(ctx, &podresources.ListPodResourcesRequest{})
	if err != nil {
		return nil, fmt.Errorf("ask kubelet who uses what: %w", err)
	}
	var all []Use
	for _, p := range resp.GetPodResources() {
		for _, c := range p.GetContainers() {
			units := map[string]int{}
			var order []string
			for _, d := range c.GetDevices() { // one entry a NUMA node
				if units[d.GetResourceName()] == 0 {
					order = append(order, d.GetResourceName())
				}
				units[d.GetResourceName()] += len(d.GetDeviceIds())
			}
			for _, r := range order {
				all = append(all, Use{p.GetNamespace(), p.GetName(), c.GetName(), r, units[r]})
			}
		}
	}
	return all, nil
}

// PodResourcesSocket is where kubelet serves the PodResources API below its root folder.
func PodResourcesSocket(kubeletRoot string) string {
	return filepath.Join(kubeletRoot, "pod-resources", "kubelet.sock")
}
