package images

import (
	"context"
	"crypto/sha256"
	"embed"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

// programs holds the sources that run inside the images. They use nothing but
// the standard library, so that they build anywhere Go is, away from this module.
//
//go:embed programs/*/main.go
var programs embed.FS

// program returns the static binary of programs/name, built once per source
// and compiler and kept in the cache folder.
func (b *Builder) program(ctx context.Context, name string) ([]byte, error) {
	src, err := fs.ReadFile(programs, "programs/"+name+"/main.go")
	if err != nil {
		return nil, err
	}
	version, err := exec.CommandContext(ctx, "go", "env", "GOVERSION").Output()
	if err != nil {
		return nil, fmt.Errorf("the test images hold Go programs and the go command does not run: %w", err)
	}
	key := sha256.Sum256(append(append([]byte{}, src...), version...))
	cached := filepath.Join(b.Cache, fmt.Sprintf("program-%s-%s-%x", name, runtime.GOARCH, key[:8]))
	if bin, err := os.ReadFile(cached); err == nil {
		return bin, nil
	}
	bin, err := compile(ctx, name, src, strings.TrimSpace(string(version)))
	if err != nil {
		return nil, err
	}
	return bin, keep(cached, bin)
}

func compile(ctx context.Context, name string, src []byte, version string) ([]byte, error) {
	dir, err := os.MkdirTemp("", "testimage")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, "main.go"), src, 0o644); err != nil {
		return nil, err
	}
	out := filepath.Join(dir, "out")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w -buildid=", "-o", out, "main.go")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOFLAGS=", "GO111MODULE=off", "GOWORK=off", "GOTOOLCHAIN=local")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build program %s with %s: %w: %s", name, version, err, msg)
	}
	return os.ReadFile(out)
}

// keep writes a cache file so that a reader sees all of it or none.
func keep(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if _, err := f.Write(data); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
