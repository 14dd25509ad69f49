// Package integration looks at a real daemon through its socket: what it does
// with hostile input, with programs that fail below it, with impatient
// clients, and with its own death. Every test names the promise it keeps.
//
// Tests share one daemon unless they change its configuration, end it or count
// what it leaves; those have their own. They run containers, so they need root.
package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"cloister.dev/test/registry/images"
	"cloister.dev/test/registry/registry"
	"cloister.dev/test/testnode"
)

const (
	demo    = "cloister.dev/demo:1"
	busybox = "registry.k8s.io/e2e-test-images/busybox:1.29-2"
)

// site is what all tests share: programs, images, and the daemon of those
// tests that leave it as it is.
type site struct {
	dir, bin, hosts string
	registry        *registry.Registry
	set             images.Set
	node            *testnode.Node

	machines sync.Once // the daemon whose pods can be virtual machines
	vm       *testnode.Node
	vmErr    error
}

// here is made once by TestMain and not changed afterwards.
var here site

func TestMain(m *testing.M) {
	if role := os.Getenv(roleVariable); role != "" {
		os.Exit(play(role))
	}
	if os.Geteuid() != 0 {
		os.Exit(m.Run()) // every test skips, with the reason
	}
	err := here.open(context.Background())
	code := 1
	if err == nil {
		code = m.Run()
	}
	if err := errors.Join(err, here.close()); err != nil {
		fmt.Fprintln(os.Stderr, "integration:", err)
		code = 1
	}
	os.Exit(code)
}

func (s *site) open(ctx context.Context) (err error) {
	checkout, err := testnode.Checkout()
	if err != nil {
		return err
	}
	if s.dir, err = os.MkdirTemp("/tmp", "cli"); err != nil {
		return err
	}
	if err := os.Chmod(s.dir, 0o711); err != nil {
		return err
	}
	if s.bin, err = testnode.Build(ctx, checkout, filepath.Join(s.dir, "bin")); err != nil {
		return err
	}
	all, err := (&images.Builder{}).All(ctx)
	if err != nil {
		return err
	}
	s.set = images.Set{}
	for _, ref := range []string{demo, busybox} {
		repo, err := repository(ref)
		if err != nil {
			return err
		}
		s.set[repo] = all[repo]
	}
	if s.registry, err = registry.Serve(ctx, "127.0.0.1:0", s.set); err != nil {
		return err
	}
	s.hosts = filepath.Join(s.dir, "certs.d")
	if err := s.registry.WriteHosts(s.hosts); err != nil {
		return err
	}
	if s.node, err = s.start(ctx, testnode.Options{}); err != nil {
		return err
	}
	return nil
}

func (s *site) close() error {
	var errs []error
	if s.vm != nil {
		errs = append(errs, closeNode(s.vm))
	}
	if s.node != nil {
		if os.Getenv("LOG") != "" {
			fmt.Fprintln(os.Stderr, s.node.LogTail(200))
		}
		errs = append(errs, closeNode(s.node))
	}
	if s.registry != nil {
		errs = append(errs, s.registry.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(s.dir))...)
}

// start runs a daemon that has the two images.
func (s *site) start(ctx context.Context, opts testnode.Options) (*testnode.Node, error) {
	opts.Bin, opts.Hosts = s.bin, s.hosts
	n, err := testnode.Start(ctx, opts)
	if err != nil {
		return nil, err
	}
	for _, ref := range []string{demo, busybox} {
		if _, err := pull(ctx, n, ref); err != nil {
			return nil, errors.Join(err, n.Close())
		}
	}
	return n, nil
}

// repository is the part of a reference that the registry knows.
func repository(ref string) (string, error) {
	r, err := name.ParseReference(ref)
	if err != nil {
		return "", err
	}
	return r.Context().RepositoryStr() + ":" + r.Identifier(), nil
}

// base is the busybox image, for tests that build on it.
func (s *site) base(t *testing.T) v1.Image {
	t.Helper()
	repo, err := repository(busybox)
	if err != nil {
		t.Fatal(err)
	}
	return s.set[repo]
}
