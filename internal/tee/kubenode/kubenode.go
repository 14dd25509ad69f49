// Package kubenode writes what a machine has into its Node object: labels,
// capacities that no device plugin can tell (bytes), and events. It takes
// kubelet's own credentials or those of a pod, and never touches what it was
// not told to write.
package kubenode

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Client writes one Node.
type Client struct {
	name string
	base *url.URL
	http *http.Client
}

// Open reads the credentials, of a kubeconfig or InCluster; nothing is asked of
// the server yet.
func Open(path, node string) (*Client, error) {
	if node == "" {
		return nil, fmt.Errorf("the node's name is not known; set node_name: %w", errdefs.ErrInvalidArgument)
	}
	c, u, err := credentials(path)
	if err != nil {
		return nil, fmt.Errorf("credentials %s: %w", path, err)
	}
	t, base, err := transport(c, u)
	if err != nil {
		return nil, fmt.Errorf("credentials %s: %w", path, err)
	}
	return &Client{name: node, base: base, http: &http.Client{Transport: t, Timeout: 15 * time.Second}}, nil
}

// SetLabels sets labels and leaves all others.
func (c *Client) SetLabels(ctx context.Context, labels map[string]string) error {
	body := map[string]any{"metadata": map[string]any{"labels": labels}}
	return c.send(ctx, http.MethodPatch, "api/v1/nodes/"+url.PathEscape(c.name), body, "label the node")
}

// SetCapacity sets extended resources of the node's status and leaves all
// others. kubelet derives what is allocatable.
func (c *Client) SetCapacity(ctx context.Context, capacity map[string]int64) error {
	amounts := map[string]string{}
	for name, n := range capacity {
		amounts[name] = strconv.FormatInt(n, 10)
	}
	body := map[string]any{"status": map[string]any{"capacity": amounts}}
	return c.send(ctx, http.MethodPatch, "api/v1/nodes/"+url.PathEscape(c.name)+"/status", body, "set capacities of the node")
}

// Event tells of a change in the node's list of events.
func (c *Client) Event(ctx context.Context, warning bool, reason, message string) error {
	kind, now := "Normal", time.Now().UTC().Format(time.RFC3339)
	if warning {
		kind = "Warning"
	}
	body := map[string]any{
		"apiVersion": "v1", "kind": "Event", "type": kind, "reason": reason, "message": message, "count": 1,
		"metadata":       map[string]any{"generateName": strings.ToLower(c.name) + ".", "namespace": "default"},
		"involvedObject": map[string]any{"kind": "Node", "name": c.name, "uid": c.name},
		"source":         map[string]any{"component": "cloister-device-plugin", "host": c.name},
		"firstTimestamp": now, "lastTimestamp": now,
	}
	return c.send(ctx, http.MethodPost, "api/v1/namespaces/default/events", body, "tell an event")
}

// maxAnswer bounds what is kept of a refusal.
const maxAnswer = 4096

func (c *Client) send(ctx context.Context, method, path string, body any, what string) error {
	b, err := json.Marshal(body)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base.JoinPath(path).String(), bytes.NewReader(b))
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	req.Header.Set("User-Agent", "cloister-device-plugin")
	req.Header.Set("Accept", "application/json")
	req.Header.Set("Content-Type", "application/json")
	if method == http.MethodPatch {
		req.Header.Set("Content-Type", "application/merge-patch+json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("%s %s: %w", what, c.name, err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if resp.StatusCode/100 != 2 {
		var status struct{ Message string }
		if json.Unmarshal(answer, &status) != nil {
			status.Message = resp.Status
		}
		return fmt.Errorf("%s %s: %s: %w", what, c.name, status.Message, class(resp.StatusCode))
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("%s %s: %w", what, c.name, err)
	}
	return nil
}

func class(code int) error {
	switch code {
	case http.StatusNotFound:
		return errdefs.ErrNotFound
	case http.StatusUnauthorized, http.StatusForbidden:
		return errdefs.ErrPermissionDenied
	}
	return errdefs.ErrUnavailable
}
