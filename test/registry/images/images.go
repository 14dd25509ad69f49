// Package images builds container images from nothing but Debian packages and
// Go programs of this folder: the ones that the CRI validation suite (critest
// v1.36.0) asks for by name, and a small static one for demonstrations.
//
// It promises the same digests for the same inputs (files carry one fixed
// time), installs nothing on the machine, and keeps what it downloaded and
// compiled in one cache folder. It must not know who runs the images.
//
// References are repository:tag without a registry host, so that whoever serves
// them can stand in for registry.k8s.io, gcr.io and docker.io at once.
package images

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Set is a group of images by reference.
type Set map[string]v1.Image

// Builder makes images. The zero value of a field means its default.
type Builder struct {
	// Cache is the folder for compiled programs and unpacked packages.
	// Default: cloister-test in the user's cache folder.
	Cache string
	// Pause is the file of a static program that takes the place of our own
	// pause. Comparisons with other runtimes use the usual one written in C.
	Pause string
}

func (b *Builder) defaults() error {
	if b.Cache == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return fmt.Errorf("no cache folder is known, set HOME or name one: %w", err)
		}
		b.Cache = filepath.Join(cache, "cloister-test")
	}
	return os.MkdirAll(b.Cache, 0o755)
}

// Demo builds the images that need no Debian package: cloister.dev/demo:1.
func (b *Builder) Demo(ctx context.Context) (Set, error) {
	if err := b.defaults(); err != nil {
		return nil, err
	}
	bin, err := b.program(ctx, "demo")
	if err != nil {
		return nil, err
	}
	l, err := tree{
		"/demo":       regular(0o755, bin),
		"/etc/passwd": text(passwd), "/etc/group": text(group),
		"/tmp": folder(0o1777), "/proc": folder(0o755), "/sys": folder(0o755), "/dev": folder(0o755),
	}.layer()
	if err != nil {
		return nil, err
	}
	img, err := image(v1.Config{
		Entrypoint:   []string{"/demo"},
		ExposedPorts: map[string]struct{}{"8080/tcp": {}},
		StopSignal:   "SIGTERM",
	}, l)
	if err != nil {
		return nil, err
	}
	return Set{"demo:1": img}, nil
}

// All builds the demo image and those of the validation suite.
func (b *Builder) All(ctx context.Context) (Set, error) {
	set, err := b.Demo(ctx)
	if err != nil {
		return nil, err
	}
	suite, err := b.suite(ctx)
	if err != nil {
		return nil, err
	}
	for ref, img := range suite {
		set[ref] = img
	}
	return set, nil
}
