package testnode

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Checkout is the root folder of the project, found upwards from the working
// directory by its module line.
func Checkout() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; d != "/"; d = filepath.Dir(d) {
		b, err := os.ReadFile(filepath.Join(d, "go.mod"))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			if strings.TrimSpace(line) == "module cloister.dev" {
				return d, nil
			}
		}
	}
	return "", fmt.Errorf("%s is not inside a checkout of cloister.dev", dir)
}

// Build compiles the programs of the checkout into dir. With
// CLOISTER_BIN in the environment it takes the programs from there instead.
func Build(ctx context.Context, checkout, dir string) (bin string, err error) {
	if bin := os.Getenv("CLOISTER_BIN"); bin != "" {
		return filepath.Abs(bin)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	env := []string{"CGO_ENABLED=0"}
	if err := GoBuild(ctx, checkout, env, "-o", dir+"/", "./cmd/cloister", "./cmd/cloister-teec"); err != nil {
		return "", err
	}
	// As the Makefile does: the resident shim and the agent must be small.
	return dir, GoBuild(ctx, checkout, env, "-tags", "no_grpc", "-ldflags", "-s -w", "-o", dir+"/", "./cmd/cloister-shim", "./cmd/cloister-agent")
}

// GoBuild runs go build in dir with the environment added, at low priority.
func GoBuild(ctx context.Context, dir string, env []string, args ...string) error {
	return goRun(ctx, dir, env, append([]string{"build"}, args...)...)
}

// GoTestBuild runs go test -c likewise.
func GoTestBuild(ctx context.Context, dir string, env []string, args ...string) error {
	return goRun(ctx, dir, env, append([]string{"test", "-c"}, args...)...)
}

func goRun(ctx context.Context, dir string, env []string, args ...string) error {
	cmd := exec.CommandContext(ctx, "nice", append([]string{"-n", "10", "go"}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(append(os.Environ(), "GOWORK=off", "GOFLAGS="), env...)
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("go %s in %s: %w", strings.Join(args, " "), dir, err)
	}
	return nil
}

// Cache is the folder for programs that were built for tests.
func Cache() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir = filepath.Join(dir, "cloister-test")
	return dir, os.MkdirAll(dir, 0o755)
}

// RuncShim builds containerd's shim for OCI runtimes, of the version that the
// benchmark compares with, once.
func RuncShim(ctx context.Context, checkout string) (string, error) {
	cache, err := Cache()
	if err != nil {
		return "", err
	}
	const module = "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"
	dir := filepath.Join(cache, "shim-v2.4.2")
	program := filepath.Join(dir, "containerd-shim-runc-v2")
	if _, err := os.Stat(program); err == nil {
		return program, nil
	}
	fmt.Fprintln(os.Stderr, "building containerd-shim-runc-v2 v2.4.2 (once)")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	fresh := fmt.Sprintf("%s.%d", program, os.Getpid())
	if err := GoBuild(ctx, filepath.Join(checkout, "test/bench/anchors"), []string{"CGO_ENABLED=0"}, "-trimpath", "-ldflags", "-s -w", "-o", fresh, module); err != nil {
		return "", err
	}
	return program, os.Rename(fresh, program)
}

// Crictl builds crictl v1.36.0, once.
func Crictl(ctx context.Context, checkout string) (string, error) {
	cache, err := Cache()
	if err != nil {
		return "", err
	}
	program := filepath.Join(cache, "crictl-v1.36.0")
	if _, err := os.Stat(program); err == nil {
		return program, nil
	}
	fmt.Fprintln(os.Stderr, "building crictl v1.36.0 (once)")
	fresh := fmt.Sprintf("%s.%d", program, os.Getpid())
	if err := GoBuild(ctx, filepath.Join(checkout, "test/conformance/suite"), []string{"CGO_ENABLED=0"}, "-o", fresh, "sigs.k8s.io/cri-tools/cmd/crictl"); err != nil {
		return "", err
	}
	return program, os.Rename(fresh, program)
}

// BuildGuest makes a guest for virtual machines out of the programs in bin and
// gives the folder that holds it.
func BuildGuest(ctx context.Context, bin, dir string) (guests string, err error) {
	for _, n := range [][3]string{
		{"qemu-system-x86_64", "qemu-system-x86", "virtual machines"},
		{"/usr/lib/qemu/virtiofsd", "qemu-system-common", "files of virtual machines"},
		{"crun", "crun", "containers in virtual machines"},
	} {
		if err := Need(ctx, n[0], n[1], n[2]); err != nil {
			return "", err
		}
	}
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "cloister"), "guest", "build", "--guests", dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build a guest: %w: %s", err, out)
	}
	return dir, nil
}

// Need makes sure that a program (by name) or a file (by absolute path) is
// there, installing the Debian package that has it when it is not.
func Need(ctx context.Context, what, pkg, why string) error {
	if _, err := exec.LookPath(what); err == nil {
		return nil
	}
	if _, err := os.Stat(what); filepath.IsAbs(what) && err == nil {
		return nil
	}
	fmt.Fprintf(os.Stderr, "installing package %s: %s\n", pkg, why)
	install := func() ([]byte, error) {
		cmd := exec.CommandContext(ctx, "apt-get", "install", "-y", "-qq", "--no-install-recommends", pkg)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		return cmd.CombinedOutput()
	}
	if _, err := install(); err == nil {
		return nil
	}
	if out, err := exec.CommandContext(ctx, "apt-get", "update", "-qq").CombinedOutput(); err != nil {
		return fmt.Errorf("apt-get update: %w: %s", err, out)
	}
	if out, err := install(); err != nil {
		return fmt.Errorf("apt-get install %s: %w: %s", pkg, err, out)
	}
	return nil
}

// Registry is the process that serves the test images.
type Registry struct {
	// Hosts is the registry configuration folder that points at it.
	Hosts string
	cmd   *exec.Cmd
	dir   string
}

// StartRegistry builds and starts the registry of test/registry on a free
// loopback port and returns when all images can be pulled.
func StartRegistry(ctx context.Context, checkout string, args ...string) (*Registry, error) {
	dir, err := os.MkdirTemp("/tmp", "clr")
	if err != nil {
		return nil, err
	}
	r := &Registry{Hosts: filepath.Join(dir, "certs.d"), dir: dir}
	if err := r.start(ctx, checkout, args); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

func (r *Registry) start(ctx context.Context, checkout string, args []string) error {
	program := filepath.Join(r.dir, "registry")
	if err := GoBuild(ctx, filepath.Join(checkout, "test/registry"), []string{"CGO_ENABLED=0"}, "-o", program, "."); err != nil {
		return err
	}
	r.cmd = exec.Command(program, append([]string{"-hosts", r.Hosts}, args...)...)
	r.cmd.Stderr = os.Stderr
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := r.cmd.Start(); err != nil {
		return err
	}
	ready := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(out).ReadString('\n')
		ready <- line
	}()
	select {
	case line := <-ready:
		if !strings.HasPrefix(line, "serving ") {
			return errors.New("the test registry ended before it served")
		}
		return nil
	case <-time.After(5 * time.Minute):
		return errors.New("the test registry did not come up in 5 minutes")
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Close ends the registry and deletes its folder.
func (r *Registry) Close() error {
	if r.cmd != nil && r.cmd.Process != nil {
		_ = r.cmd.Process.Kill()
		_ = r.cmd.Wait() // killed, so never nil
	}
	return os.RemoveAll(r.dir)
}
