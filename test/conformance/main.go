// conformance runs critest against Cloister and judges the outcome. It serves
// the images that the suite names from this machine's own registry, so nothing
// is fetched from the internet.
//
//	conformance [ENDPOINT] [critest options]
//
// With an ENDPOINT the server is somebody else's: its registry configuration
// has to be a folder that REGISTRY_HOSTS names, which is filled in here. Give
// the folder first, for instance
//
//	mkdir certs; cloister daemon … with config_path = ".../certs"
//	REGISTRY_HOSTS=.../certs conformance unix:///run/x.sock
//
// Environment without ENDPOINT:
//
//	NETWORK=builtin          the daemon's own bridge in place of a CNI conflist
//	RUNTIME_HANDLER=crun     pass -runtime-handler, and configure that handler; the
//	                         specs that skip-HANDLER.txt lists are left out
//	RUNTIME_BINARY=FILE      the program of that handler, by default found by its name
//	CLOISTER_BIN=DIR         use these programs instead of building the checkout
//	RUNTIME=containerd       test containerd in CLOISTER_BIN, with plugins in CNI_BIN
//	KEEP=1                   keep the daemon's folder with its log
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	"cloister.dev/test/testnode"
)

// What containerd v2.4.2 reaches on the reference machine: of 121 specs one
// asks for an image by a digest that only the original bytes have.
const (
	wantPassed = 107
	maxSkipped = 14
	impossible = "public image with digest should be pulled and removed"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) (err error) {
	endpoint := ""
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		endpoint, args = args[0], args[1:]
	}
	checkout, err := testnode.Checkout()
	if err != nil {
		return err
	}
	if err := install(ctx); err != nil {
		return err
	}
	critest, err := build(ctx, checkout)
	if err != nil {
		return err
	}
	var opts []string
	if hosts := os.Getenv("REGISTRY_HOSTS"); hosts != "" && endpoint != "" {
		opts = []string{"-hosts", hosts}
	}
	registry, err := testnode.StartRegistry(ctx, checkout, opts...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, registry.Close()) }()
	handler := os.Getenv("RUNTIME_HANDLER")
	if handler != "" {
		args = append([]string{"-runtime-handler", handler}, args...)
	}
	skips, err := skipList(handler)
	if err != nil {
		return err
	}
	if endpoint == "" {
		node, err := daemon(ctx, checkout, registry.Hosts)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, node.Close()) }()
		endpoint = node.Endpoint()
	}
	out, err := suite(ctx, critest, endpoint, skips, args)
	if err != nil {
		return err
	}
	return judge(out, len(skips), partial(args))
}

// skipList reads which specs a handler cannot pass; most handlers have none.
func skipList(handler string) ([]string, error) {
	b, err := os.ReadFile("skip-" + handler + ".txt")
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for line := range strings.Lines(string(b)) {
		name, reason, ok := strings.Cut(strings.TrimSpace(line), "\t")
		if strings.HasPrefix(line, "#") {
			continue
		}
		if !ok || reason == "" {
			return nil, fmt.Errorf("skip-%s.txt: %q has no reason", handler, name)
		}
		fmt.Printf("left out: %s (%s)\n", name, reason)
		names = append(names, regexp.QuoteMeta(name))
	}
	return names, nil
}

// install brings what the suite and a container need on a bare Debian.
func install(ctx context.Context) error {
	for _, n := range [][3]string{
		{"runc", "runc", "an OCI runtime"},
		{"iptables", "iptables", "host ports of the CNI portmap plugin"},
		{"ipcmk", "util-linux-extra", "the suite makes shared memory on the host"},
		{"/etc/ssl/certs/ca-certificates.crt", "ca-certificates", "Go modules are fetched over TLS"},
	} {
		if err := testnode.Need(ctx, n[0], n[1], n[2]); err != nil {
			return err
		}
	}
	return nil
}

// build compiles critest once and keeps it in the user's cache.
func build(ctx context.Context, checkout string) (string, error) {
	cache, err := testnode.Cache()
	if err != nil {
		return "", err
	}
	const module = "sigs.k8s.io/cri-tools/cmd/"
	from := filepath.Join(checkout, "test/conformance/suite")
	critest := filepath.Join(cache, "critest-v1.36.0")
	if _, err := os.Stat(critest); err == nil {
		return critest, nil
	}
	fmt.Fprintln(os.Stderr, "building critest and crictl v1.36.0 (once)")
	fresh := critest + fmt.Sprintf(".%d", os.Getpid())
	if err := testnode.GoTestBuild(ctx, from, []string{"CGO_ENABLED=0"}, "-o", fresh, module+"critest"); err != nil {
		return "", err
	}
	if err := testnode.GoBuild(ctx, from, []string{"CGO_ENABLED=0"}, "-o", filepath.Join(cache, "crictl-v1.36.0"), module+"crictl"); err != nil {
		return "", err
	}
	return critest, os.Rename(fresh, critest)
}

// daemon starts the private daemon under test.
func daemon(ctx context.Context, checkout, hosts string) (*testnode.Node, error) {
	opts := testnode.Options{
		Runtime: os.Getenv("RUNTIME"), Network: os.Getenv("NETWORK"), CNIBin: os.Getenv("CNI_BIN"),
		Hosts: hosts, LogLevel: os.Getenv("LOG_LEVEL"),
	}
	h := os.Getenv("RUNTIME_HANDLER")
	if h != "" && h != "vm" {
		program := os.Getenv("RUNTIME_BINARY")
		if program == "" {
			var err error
			if program, err = exec.LookPath(h); err != nil {
				return nil, fmt.Errorf("RUNTIME_HANDLER=%s: %w; install it (apt-get install %s)", h, err, h)
			}
		}
		opts.Handlers = map[string]string{h: program}
	}
	var err error
	if opts.Bin, err = testnode.Build(ctx, checkout, filepath.Join(os.Getenv("CONFORMANCE_WORK"), "bin")); err != nil {
		return nil, err
	}
	if h == "vm" {
		if opts.Guests, err = testnode.BuildGuest(ctx, opts.Bin, filepath.Join(os.Getenv("CONFORMANCE_WORK"), "guests")); err != nil {
			return nil, err
		}
	}
	return testnode.Start(ctx, opts)
}
