// demo shows a pod from an image to its removal: it builds Cloister and a
// small image, serves that on loopback, starts a private daemon in temporary
// folders with the built-in network, runs the image as a pod, shows its log,
// an exec and its address, and cleans up. Each step prints the time it took.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	image    = "cloister.dev/demo:1"
	bridge   = "cldemo0"
	lastLine = "line 3"
	stepTime = 2 * time.Minute
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	start := time.Now()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
	fmt.Printf("\nall done in %s\n", round(time.Since(start)))
}

func run(ctx context.Context) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("pods need namespaces and cgroups: run it as root (sudo make demo)")
	}
	d := &demo{ctx: ctx}
	if d.top, err = os.Getwd(); err != nil {
		return err
	}
	// Short, because a unix socket's path may not be long.
	if d.dir, err = os.MkdirTemp("/tmp", "cldemo"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.cleanUp()) }()
	steps := []struct {
		what string
		do   func() error
	}{
		{"build the programs", d.build},
		{"build a guest for virtual machines", d.buildGuest},
		{"build the image " + image + " and serve it on loopback", d.serveImage},
		{"start a private daemon with the built-in network", d.startDaemon},
		{"pull the image", d.pull},
		{"run it as a pod", d.runPod},
		{"read its log", d.readLog},
		{"run a command in it", d.exec},
		{"reach it at its address", d.reach},
		{"list what runs", d.list},
		{"stop and remove the pod", d.remove},
		{"run the image on each handler: an own kernel is another one", d.kernels},
		{"check that nothing is left", d.check},
		{"stop the daemon", d.stopDaemon},
	}
	for i, s := range steps {
		fmt.Printf("\n[%d/%d] %s\n", i+1, len(steps), s.what)
		began := time.Now()
		if err := s.do(); err != nil {
			return fmt.Errorf("%s: %w%s", s.what, err, d.daemonLog())
		}
		fmt.Printf("        %s\n", round(time.Since(began)))
	}
	return nil
}

// demo is what the steps share.
type demo struct {
	ctx      context.Context
	top, dir string
	procs    []*process // ended in reverse order
	daemon   *process
	handlers []string
	address  string
}

// process is a program that runs beside the demo.
type process struct {
	cmd    *exec.Cmd
	exited chan error
}

func (d *demo) start(out io.Writer, name string, args ...string) (*process, error) {
	p := &process{cmd: exec.Command(name, args...), exited: make(chan error, 1)}
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { p.exited <- p.cmd.Wait() }()
	d.procs = append(d.procs, p)
	return p, nil
}

func (p *process) stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	select {
	case err := <-p.exited:
		p.exited <- err
		return nil
	case <-time.After(20 * time.Second):
	}
	err := p.cmd.Process.Kill()
	return errors.Join(fmt.Errorf("%s did not stop within 20 s and was killed", p.cmd.Path), err)
}

// cloister runs the command line against the demo's daemon, showing it.
func (d *demo) cloister(args ...string) *exec.Cmd {
	cmd := exec.CommandContext(d.ctx, filepath.Join(d.top, "bin/cloister"), args...)
	cmd.Env = append(os.Environ(), "CLOISTER_ADDRESS="+d.socket())
	cmd.Stdout, cmd.Stderr = indent(os.Stdout), indent(os.Stderr)
	fmt.Printf("        $ cloister %s\n", strings.Join(args, " "))
	return cmd
}

func (d *demo) socket() string { return filepath.Join(d.dir, "state", "cloister.sock") }

func (d *demo) build() error {
	cmd := exec.CommandContext(d.ctx, "make", "--no-print-directory", "-s", "build")
	cmd.Stdout, cmd.Stderr = indent(os.Stdout), indent(os.Stderr)
	return cmd.Run()
}

func (d *demo) serveImage() error {
	program := filepath.Join(d.top, ".cache", "testregistry")
	if err := os.MkdirAll(filepath.Dir(program), 0o755); err != nil {
		return err
	}
	build := exec.CommandContext(d.ctx, "go", "build", "-o", program, ".")
	build.Dir = filepath.Join(d.top, "test", "registry")
	build.Stdout, build.Stderr = indent(os.Stdout), indent(os.Stderr)
	if err := build.Run(); err != nil {
		return err
	}
	r, w := io.Pipe()
	if _, err := d.start(w, program, "-only", "demo", "-hosts", filepath.Join(d.dir, "certs.d")); err != nil {
		return err
	}
	return d.await(r, "serving ", true)
}

// await shows lines until one begins with prefix, and drops what follows.
func (d *demo) await(r io.Reader, prefix string, drain bool) error {
	found := make(chan error, 1)
	go func() {
		lines := bufio.NewScanner(r)
		for lines.Scan() {
			fmt.Printf("        %s\n", lines.Text())
			if strings.HasPrefix(lines.Text(), prefix) {
				found <- nil
				if drain {
					_, _ = io.Copy(io.Discard, r)
				}
				return
			}
		}
		found <- fmt.Errorf("it ended before it printed %q", prefix)
	}()
	select {
	case err := <-found:
		return err
	case <-time.After(stepTime):
		return fmt.Errorf("no %q within %s", prefix, stepTime)
	case <-d.ctx.Done():
		return d.ctx.Err()
	}
}

func (d *demo) startDaemon() error {
	config := filepath.Join(d.dir, "config.toml")
	d.handlers = handlers()
	text := fmt.Sprintf(`version = 3
root = %q
state = %q
[plugins."io.containerd.cri.v1.images".registry]
config_path = %q
[cloister]
network = "builtin"
[cloister.builtin_network]
bridge = %q
subnets = ["10.98.0.0/16"]
`, filepath.Join(d.dir, "root"), filepath.Join(d.dir, "state"), filepath.Join(d.dir, "certs.d"), bridge) + d.handlerConfig()
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return err
	}
	log, err := os.Create(d.logPath())
	if err != nil {
		return err
	}
	defer log.Close()
	if d.daemon, err = d.start(log, filepath.Join(d.top, "bin/cloister"), "daemon", "--config", config, "--ephemeral"); err != nil {
		return err
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(stepTime)
	for {
		if c, err := net.Dial("unix", d.socket()); err == nil {
			return c.Close()
		}
		select {
		case <-tick.C:
		case err := <-d.daemon.exited:
			d.daemon.exited <- err
			return fmt.Errorf("the daemon ended: %w", err)
		case <-limit:
			return fmt.Errorf("the daemon does not answer within %s", stepTime)
		case <-d.ctx.Done():
			return d.ctx.Err()
		}
	}
}

func (d *demo) logPath() string { return filepath.Join(d.dir, "daemon.log") }

// daemonLog is the end of the daemon's messages, for an error.
func (d *demo) daemonLog() string {
	b, err := os.ReadFile(d.logPath())
	if err != nil || len(b) == 0 {
		return ""
	}
	return "\nthe daemon's last messages:\n" + string(b[max(0, len(b)-4000):])
}

func (d *demo) pull() error { return d.cloister("pull", image).Run() }

func (d *demo) runPod() error {
	return d.cloister("run", "-d", "--name", "demo", image, "-n", "3", "-interval", "10ms").Run()
}

func (d *demo) readLog() error {
	cmd := d.cloister("logs", "-f", "demo")
	r, w := io.Pipe()
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		return err
	}
	err := d.await(r, lastLine, false)
	r.Close()
	killed := cmd.Process.Kill()
	_ = cmd.Wait() // killed by us
	return errors.Join(err, killed)
}

func (d *demo) exec() error {
	return d.cloister("exec", "demo", "/demo", "-fetch", "http://127.0.0.1:8080/").Run()
}

func (d *demo) reach() error {
	cmd := d.cloister("pods", "-q")
	cmd.Stdout = nil
	id, err := cmd.Output()
	if err != nil {
		return err
	}
	cmd = d.cloister("inspect", strings.TrimSpace(string(id)))
	cmd.Stdout = nil
	b, err := cmd.Output()
	if err != nil {
		return err
	}
	var pod struct {
		Status struct{ Network struct{ IP string } }
	}
	if err := json.Unmarshal(b, &pod); err != nil {
		return err
	}
	d.address = pod.Status.Network.IP
	url := "http://" + net.JoinHostPort(d.address, "8080") + "/"
	fmt.Printf("        GET %s\n", url)
	c := http.Client{Timeout: 10 * time.Second}
	resp, err := c.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
	fmt.Printf("        %s\n", strings.TrimSpace(string(body)))
	return err
}

func (d *demo) list() error {
	return errors.Join(d.cloister("pods", "-o", "wide").Run(), d.cloister("ps").Run(), d.cloister("images").Run())
}

func (d *demo) remove() error { return d.cloister("rm", "-f", "demo").Run() }

func (d *demo) check() error { return d.cloister("debug", "fsck").Run() }

func (d *demo) stopDaemon() error { return d.daemon.stop() }

func round(t time.Duration) string { return fmt.Sprintf("%.2f s", t.Seconds()) }
