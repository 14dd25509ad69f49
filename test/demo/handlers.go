package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// vmHandler is the handler whose pods have a kernel of their own.
const vmHandler = "vm"

// handlers are those that this machine has programs for.
func handlers() []string {
	var names []string
	for _, program := range []string{"crun", "runc", "runsc"} {
		if _, err := exec.LookPath(program); err == nil {
			names = append(names, program)
		}
	}
	return append(names, vmHandler)
}

// handlerConfig is the part of the configuration that is about handlers.
func (d *demo) handlerConfig() string {
	const table = "[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.%s]\nruntime_type = %q\n"
	var b strings.Builder
	for _, name := range d.handlers {
		if name == vmHandler {
			fmt.Fprintf(&b, table, name, "io.containerd.cloister-vm.v2")
			// Where KVM does not work, the machine is emulated.
			fmt.Fprintf(&b, "options = { accel = \"auto\", guests = %q }\n", d.guests())
			continue
		}
		fmt.Fprintf(&b, table, name, "io.containerd.runc.v2")
		fmt.Fprintf(&b, "options = { BinaryName = %q }\n", name)
	}
	return b.String()
}

func (d *demo) guests() string { return filepath.Join(d.top, ".cache", "demo-guests") }

func (d *demo) buildGuest() error {
	return d.cloister("guest", "build", "--guests", d.guests(), "--cache", filepath.Join(d.top, ".cache", "packages")).Run()
}

// kernels runs the image once on each handler, and prints which kernel it saw
// and how long it took from the command to its output.
func (d *demo) kernels() error {
	var host unix.Utsname
	if err := unix.Uname(&host); err != nil {
		return err
	}
	release := unix.ByteSliceToString(host.Release[:])
	rows := []string{fmt.Sprintf("%-12s %-28s %s", "HANDLER", "KERNEL (uname -r)", "START TO OUTPUT"), fmt.Sprintf("%-12s %-28s", "(this host)", release)}
	for _, name := range d.handlers {
		works, err := d.awaitProbe(name)
		if err != nil {
			return err
		}
		if !works {
			rows = append(rows, fmt.Sprintf("%-12s does not work here (see the daemon's log)", name))
			continue
		}
		var out bytes.Buffer
		cmd := d.cloister("run", "--rm", "-q", "--runtime", name, image, "-uname")
		cmd.Stdout = &out
		began := time.Now()
		if err := cmd.Run(); err != nil {
			return err
		}
		kernel := strings.TrimSpace(out.String())
		rows = append(rows, fmt.Sprintf("%-12s %-28s %s", name, kernel, round(time.Since(began))))
		if name == vmHandler && kernel == release {
			return fmt.Errorf("the pod on %q runs the host's kernel %s", name, kernel)
		}
	}
	fmt.Printf("        %s\n", strings.Join(rows, "\n        "))
	return nil
}

// awaitProbe waits until the daemon has tried a handler, and tells what came
// of it.
func (d *demo) awaitProbe(name string) (works bool, err error) {
	ctx, cancel := context.WithTimeout(d.ctx, stepTime)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		b, err := os.ReadFile(d.logPath())
		if err != nil {
			return false, err
		}
		for line := range strings.Lines(string(b)) {
			if strings.Contains(line, `msg="handler probed"`) && strings.Contains(line, " handler="+name+" ") {
				return strings.Contains(line, " works=true "), nil
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return false, errors.Join(fmt.Errorf("the daemon does not probe handler %q", name), ctx.Err())
		}
	}
}
