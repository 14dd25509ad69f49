package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"cloister.dev/test/testnode"
)

// The subjects of a comparison.
const (
	containerd   = "containerd"    // containerd v2.4.2 with runc v1.5.2
	cloister     = "cloister"      // Cloister with the same runc
	cloisterCrun = "cloister-crun" // Cloister with the machine's crun
)

// programs are the files that a run needs.
type programs struct {
	cloister, anchors, critest, pause string
}

func handlerOf(subject string) string {
	if subject == cloisterCrun {
		return "crun"
	}
	return "runc"
}

func (p programs) options(subject, hosts string) testnode.Options {
	o := testnode.Options{
		Runtime: testnode.Cloister, Bin: p.cloister, Hosts: hosts,
		CNIBin:   filepath.Join(p.anchors, "cni"),
		Default:  handlerOf(subject),
		LogLevel: "warn", MemoryState: true,
	}
	runc := filepath.Join(p.anchors, "runc")
	switch subject {
	case containerd:
		o.Runtime, o.Bin = testnode.Containerd, p.anchors
		o.Handlers = map[string]string{"runc": runc}
	case cloisterCrun:
		crun, err := exec.LookPath("crun")
		if err != nil {
			crun = "/usr/bin/crun"
		}
		o.Handlers = map[string]string{"crun": crun}
	default:
		o.Handlers = map[string]string{"runc": runc}
	}
	return o
}

// build compiles Cloister, the programs it is compared with, and critest.
func build(ctx context.Context, checkout string) (p programs, err error) {
	for _, n := range [][3]string{
		{"gcc", "gcc", "runc is linked with C"},
		{"/usr/include/stdlib.h", "libc6-dev", "runc is linked with C"},
		{"/usr/include/seccomp.h", "libseccomp-dev", "runc filters system calls with it"},
		{"pkg-config", "pkg-config", "runc asks it where libseccomp is"},
		{"iptables", "iptables", "the CNI plugins portmap and firewall use it"},
		{"crun", "crun", "one of the OCI runtimes compared"},
	} {
		if err := testnode.Need(ctx, n[0], n[1], n[2]); err != nil {
			return p, err
		}
	}
	cache, err := testnode.Cache()
	if err != nil {
		return p, err
	}
	p.anchors = filepath.Join(cache, "anchors-containerd-v2.4.2-runc-v1.5.2-cni-v1.9.1")
	if err := anchors(ctx, filepath.Join(checkout, "test/bench/anchors"), p.anchors); err != nil {
		return p, err
	}
	if p.pause, err = pause(ctx, p.anchors); err != nil {
		return p, err
	}
	p.critest = filepath.Join(cache, "critest-v1.36.0")
	if _, err := os.Stat(p.critest); err != nil {
		fmt.Fprintln(os.Stderr, "building critest v1.36.0 (once)")
		if err := testnode.GoTestBuild(ctx, filepath.Join(checkout, "test/conformance/suite"), []string{"CGO_ENABLED=0"},
			"-o", p.critest, "sigs.k8s.io/cri-tools/cmd/critest"); err != nil {
			return p, err
		}
	}
	p.cloister, err = testnode.Build(ctx, checkout, filepath.Join(os.Getenv("BENCH_WORK"), "bin"))
	return p, err
}

// anchors builds what is compared with, the way its authors do, once.
func anchors(ctx context.Context, module, into string) error {
	done := filepath.Join(into, "done")
	if _, err := os.Stat(done); err == nil {
		return nil
	}
	fmt.Fprintln(os.Stderr, "building containerd v2.4.2, runc v1.5.2 and the CNI plugins v1.9.1 (once, some minutes)")
	cni := filepath.Join(into, "cni")
	if err := os.MkdirAll(cni, 0o755); err != nil {
		return err
	}
	static := []string{"CGO_ENABLED=0"}
	const (
		cd      = "github.com/containerd/containerd/v2/"
		plugins = "github.com/containernetworking/plugins/plugins/"
	)
	for _, b := range []struct {
		env  []string
		args []string
	}{
		{[]string{"CGO_ENABLED=1"}, []string{"-tags", "seccomp", "-ldflags", "-s -w -X main.version=1.5.2", "-o", into + "/", "github.com/opencontainers/runc"}},
		{static, []string{"-ldflags", "-s -w -X " + cd + "version.Version=v2.4.2", "-o", into + "/", cd + "cmd/containerd", cd + "cmd/containerd-shim-runc-v2"}},
		{static, []string{"-ldflags", "-s -w", "-o", cni + "/", plugins + "ipam/host-local", plugins + "main/bridge",
			plugins + "main/loopback", plugins + "meta/firewall", plugins + "meta/portmap"}},
	} {
		if err := testnode.GoBuild(ctx, module, b.env, append([]string{"-trimpath"}, b.args...)...); err != nil {
			return err
		}
	}
	return os.WriteFile(done, nil, 0o644)
}

// pauseSource stands for the pause image that clusters use, which is this in C
// too. One written in Go would be slower to start, to containerd's disadvantage.
const pauseSource = `#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
static void down(int s) { (void)s; _exit(0); }
static void reap(int s) { (void)s; while (waitpid(-1, 0, WNOHANG) > 0); }
int main(void) {
	signal(SIGINT, down); signal(SIGTERM, down); signal(SIGCHLD, reap);
	for (;;) pause();
}
`

func pause(ctx context.Context, dir string) (string, error) {
	src, bin := filepath.Join(dir, "pause.c"), filepath.Join(dir, "pause")
	if _, err := os.Stat(bin); err == nil {
		return bin, nil
	}
	if err := os.WriteFile(src, []byte(pauseSource), 0o644); err != nil {
		return "", err
	}
	if out, err := exec.CommandContext(ctx, "gcc", "-Os", "-static", "-s", "-o", bin, src).CombinedOutput(); err != nil {
		return "", fmt.Errorf("gcc: %w: %s", err, out)
	}
	return bin, nil
}
