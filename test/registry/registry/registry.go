// Package registry serves images over the OCI distribution protocol, in memory,
// in plain HTTP, for tests. Every repository is found by its path whatever the
// host in the reference was: a runtime whose registry configuration folder
// holds the _default/hosts.toml of WriteHosts pulls registry.k8s.io/pause:3.10
// and docker.io/library/busybox:latest from here.
package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// Registry is a running server. Close ends it.
type Registry struct {
	// Addr is host:port of the listener.
	Addr   string
	server *http.Server
	done   chan error
}

// Serve listens on addr (port 0 picks a free one) and returns once every image
// can be pulled.
func Serve(ctx context.Context, addr string, images map[string]v1.Image) (*Registry, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("test registry: %w", err)
	}
	quiet := log.New(io.Discard, "", 0)
	r := &Registry{
		Addr:   l.Addr().String(),
		server: &http.Server{Handler: registry.New(registry.Logger(quiet)), ErrorLog: quiet, ReadHeaderTimeout: 10 * time.Second},
		done:   make(chan error, 1),
	}
	go func() { r.done <- r.server.Serve(l) }()
	for ref, img := range images {
		if err := r.Push(ctx, ref, img); err != nil {
			return nil, errors.Join(err, r.Close())
		}
	}
	return r, nil
}

// Push adds an image under repository:tag.
func (r *Registry) Push(ctx context.Context, ref string, img v1.Image) error {
	dst, err := name.ParseReference(r.Addr+"/"+ref, name.Insecure)
	if err != nil {
		return err
	}
	if err := remote.Write(dst, img, remote.WithContext(ctx)); err != nil {
		return fmt.Errorf("serve image %s: %w", ref, err)
	}
	return nil
}

// Wait blocks until the server ends.
func (r *Registry) Wait() error {
	if err := <-r.done; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Close cuts all connections and frees the port.
func (r *Registry) Close() error { return r.server.Close() }

// WriteHosts writes dir/_default/hosts.toml, which sends every pull here.
func (r *Registry) WriteHosts(dir string) error {
	d := filepath.Join(dir, "_default")
	if err := os.MkdirAll(d, 0o755); err != nil {
		return err
	}
	toml := fmt.Sprintf("[host.\"http://%s\"]\n  capabilities = [\"pull\", \"resolve\"]\n", r.Addr)
	return os.WriteFile(filepath.Join(d, "hosts.toml"), []byte(toml), 0o644)
}
