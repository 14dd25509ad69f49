package container

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"cloister.dev/internal/host/backend"
	"cloister.dev/internal/host/proc"
)

// invocation is one execution of an OCI runtime.
type invocation struct {
	verb    string
	args    []string
	streams backend.Streams
}

// commandTime bounds an invocation.
const commandTime = 2 * time.Minute

// command runs the runtime for a task. A caller that goes away does not cut
// it off: a runtime that is killed midway leaves neither a container nor none.
func (b *Backend) command(ctx context.Context, t *backend.TaskSpec, i invocation) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandTime)
	defer cancel()
	r, err := b.runtime(t.Runtime.Binary)
	if err != nil {
		return err
	}
	if err := b.learn(ctx, r); err != nil {
		return err
	}
	return b.invoke(ctx, r, t.Runtime, t.Dir, i)
}

// invoke runs the runtime and reports its failure in its own words.
func (b *Backend) invoke(ctx context.Context, r *ociRuntime, o backend.Runtime, dir string, i invocation) error {
	status, said, err := b.execute(ctx, r, o, dir, i, b.runner(r))
	if err != nil || status == 0 {
		return err
	}
	if said == "" {
		said = fmt.Sprintf("ended with status %d and said nothing", status)
	}
	return fmt.Errorf("%s %s: %s: %w", filepath.Base(r.path), i.verb, said, kind(said))
}

type runner func(context.Context, proc.Command) (proc.Exit, error)

// runner is how r's commands are run: for runtimes that need it, in a mount
// namespace without the unified cgroup hierarchy.
func (b *Backend) runner(r *ociRuntime) runner {
	if r.hideUnified {
		return b.runHidden
	}
	return b.reaper.RunCommand
}

// execute runs the runtime once and gives its status and last complaint.
func (b *Backend) execute(ctx context.Context, r *ociRuntime, o backend.Runtime, dir string, i invocation, run runner) (status int, said string, err error) {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	root := b.root(r, o.Root)
	if err := os.MkdirAll(root, 0o711); err != nil {
		return 0, "", fmt.Errorf("make the runtime's folder: %w", err)
	}
	log, err := os.CreateTemp(dir, "backend-log-")
	if err != nil {
		return 0, "", fmt.Errorf("make the runtime's log: %w", err)
	}
	defer os.Remove(log.Name())
	defer log.Close()
	args := []string{r.path, "--root", root, "--log", log.Name(), "--log-format", "json"}
	if o.SystemdCgroup {
		args = append(args, "--systemd-cgroup")
	}
	if o.NoCgroup && strings.HasPrefix(filepath.Base(r.path), "crun") { // the only one that has a word for it
		args = append(args, "--cgroup-manager=disabled")
	}
	args = append(append(args, i.verb), i.args...)
	path, release := r.sealed.path(r.path)
	defer release()
	exit, err := run(ctx, proc.Command{Path: path, Args: args, Env: os.Environ(), Dir: dir,
		Files: [3]*os.File{i.streams.Stdin, i.streams.Stdout, i.streams.Stderr}})
	if err != nil {
		return 0, "", fmt.Errorf("%s %s: %w", filepath.Base(r.path), i.verb, err)
	}
	if exit.Status != 0 {
		said = lastError(log)
	}
	return exit.Status, said, nil
}

// maxLogged bounds what is read of a runtime's log.
const maxLogged = 64 << 10

// lastError finds the last message of level error, or else the last one.
func lastError(log *os.File) string {
	buf := make([]byte, maxLogged)
	n, _ := log.ReadAt(buf, 0)
	var last, lastErr string
	sc := bufio.NewScanner(bytes.NewReader(buf[:n]))
	sc.Buffer(nil, maxLogged)
	for sc.Scan() {
		var line struct{ Level, Msg string }
		if json.Unmarshal(sc.Bytes(), &line) != nil || line.Msg == "" {
			continue
		}
		last = line.Msg
		if line.Level == "error" || line.Level == "fatal" {
			lastErr = line.Msg
		}
	}
	if lastErr == "" {
		lastErr = last
	}
	return strings.TrimSpace(lastErr)
}

// kind classifies a runtime's complaint. Runtimes have one exit status for
// everything, so their words are all there is; an unknown wording only makes
// the code of the error less telling.
func kind(said string) error {
	for _, k := range []struct {
		words string
		err   error
	}{
		{"executable file not found", errdefs.ErrNotFound},
		{"executable file `", errdefs.ErrNotFound}, // crun
		{"exec format error", errdefs.ErrInvalidArgument},
		{"permission denied", errdefs.ErrPermissionDenied},
		{"no such file or directory", errdefs.ErrNotFound},
		{"unsupported", errdefs.ErrFailedPrecondition},
		{"memory limit", errdefs.ErrFailedPrecondition}, // too low to start with
	} {
		if strings.Contains(strings.ToLower(said), k.words) {
			return k.err
		}
	}
	return errdefs.ErrUnknown
}

var errNoConsole = errors.New("the runtime sent no terminal")
