// Package check finds out what a machine can do, by doing it: it runs a
// container, boots a kernel with each accelerator on each type of machine,
// connects a tap, and boots a whole pod. It promises that every answer is
// backed by evidence, that a failed one says what to do, and that nothing is
// left behind.
//
// It knows nothing of the daemon: what it tries are the rooms of the sandbox
// host.
package check

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/host/proc"
)

// Status is the answer to one check.
type Status string

// Answers.
const (
	OK      Status = "ok"
	Warning Status = "warning" // something works worse than it could, or not at all and nobody needs it
	Failed  Status = "failed"
	Skipped Status = "skipped" // what it builds upon has failed
)

// Result is what one check found.
type Result struct {
	Check    string        `json:"check"`
	Status   Status        `json:"status"`
	Evidence string        `json:"evidence"`         // what was done, and what came of it
	Remedy   string        `json:"remedy,omitempty"` // what to do about it
	Took     time.Duration `json:"-"`
	Millis   int64         `json:"millis"`
	// BootMillis is what the kernel needed from the start of QEMU to its first
	// program, where a check boots one.
	BootMillis int64 `json:"bootMillis,omitempty"`
}

// Options say what to check.
type Options struct {
	// Machine are the options of the handler whose machines are checked.
	Machine *hostv1.MachineOptions
	// OCI are the runtimes to try, by name or path.
	OCI []string
	// Only are the names of the checks to do, with what they build upon; empty
	// is all.
	Only []string
	Log  *slog.Logger
}

// limit bounds one check.
const limit = 90 * time.Second

// errWarning marks what is worth a word and no failure.
var errWarning = errors.New("warning")

// remedied is an error with what to do about it.
type remedied struct {
	error
	remedy string
}

func (r *remedied) Unwrap() error { return r.error }

func remedy(err error, text string) error {
	if err == nil {
		return nil
	}
	return &remedied{err, text}
}

// checks is one run. Checks that build on others find their results here.
type checks struct {
	Options
	dir    string
	reaper *proc.Reaper
	passed map[string]bool

	qemu           string
	kernel, initrd string
	boot           time.Duration // of the check that runs
}

// step is one check. It gives its evidence, whatever the error.
type step struct {
	name  string
	needs []string
	do    func(context.Context) (string, error)
}

// Run does all checks, tells each result as it is there, and gives all.
func Run(ctx context.Context, o Options, report func(Result)) (all []Result, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("machines and containers are made by root; run the check with sudo")
	}
	c := &checks{Options: o, passed: map[string]bool{}}
	// Short, because a unix socket's path may not be long.
	if c.dir, err = os.MkdirTemp("/tmp", "clcheck"); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(c.dir)) }()
	if c.reaper, err = proc.NewReaper(o.Log, filepath.Join(c.dir, "exits")); err != nil {
		return nil, err
	}
	var reaping sync.WaitGroup
	rctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer reaping.Wait()
	defer stop()
	reaping.Go(func() { c.reaper.Run(rctx) })
	steps, err := chosen(c.steps(), o.Only)
	if err != nil {
		return nil, err
	}
	for _, s := range steps {
		r := c.run(ctx, s)
		if ctx.Err() != nil {
			return all, ctx.Err()
		}
		all = append(all, r)
		report(r)
	}
	return all, nil
}

func (c *checks) steps() []step {
	all := []step{
		{"cgroups", nil, c.cgroups},
		{"mounts", nil, c.mounts},
	}
	for _, name := range c.OCI {
		all = append(all, step{"container " + name, nil, func(ctx context.Context) (string, error) { return c.container(ctx, name) }})
	}
	return append(all,
		step{"network tap", nil, c.tap},
		step{"qemu", nil, c.findQEMU},
		step{"virtiofsd", nil, c.findVirtiofsd},
		step{"guest", nil, c.findGuest},
		step{"kvm", []string{"qemu", "guest"}, c.kvm},
		step{"microvm tcg", []string{"qemu", "guest"}, func(ctx context.Context) (string, error) { return c.bare(ctx, "microvm") }},
		step{"q35 tcg", []string{"qemu", "guest"}, func(ctx context.Context) (string, error) { return c.bare(ctx, "q35") }},
		step{"pod machine", []string{"qemu", "virtiofsd", "guest"}, c.pod},
	)
}

// chosen leaves what was asked for and what that needs.
func chosen(all []step, only []string) ([]step, error) {
	if len(only) == 0 {
		return all, nil
	}
	wanted := map[string]bool{}
	var names []string
	for _, s := range all {
		names = append(names, s.name)
		if slices.Contains(only, s.name) {
			wanted[s.name] = true
			for _, n := range s.needs {
				wanted[n] = true
			}
		}
	}
	for _, name := range only {
		if !wanted[name] {
			return nil, fmt.Errorf("there is no check %q; there are %q: %w", name, names, errdefs.ErrInvalidArgument)
		}
	}
	return slices.DeleteFunc(all, func(s step) bool { return !wanted[s.name] }), nil
}

func (c *checks) run(ctx context.Context, s step) Result {
	r := Result{Check: s.name}
	for _, n := range s.needs {
		if !c.passed[n] {
			r.Status, r.Evidence = Skipped, fmt.Sprintf("needs %q", n)
			return r
		}
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	began := time.Now()
	c.boot = 0
	evidence, err := s.do(ctx)
	r.Took, r.BootMillis = time.Since(began), c.boot.Milliseconds()
	r.Millis, r.Status, r.Evidence = r.Took.Milliseconds(), OK, evidence
	var known *remedied
	if errors.As(err, &known) {
		r.Remedy = known.remedy
	}
	switch {
	case errors.Is(err, errWarning):
		r.Status = Warning
	case err != nil:
		r.Status = Failed
	}
	if err != nil {
		text := strings.TrimSuffix(strings.TrimSuffix(err.Error(), errWarning.Error()), ": ")
		r.Evidence = strings.Join(strings.FieldsFunc(evidence+"\n"+text, func(c rune) bool { return c == '\n' }), "\n")
	}
	c.passed[s.name] = r.Status == OK
	return r
}

// Verdict is nil when nothing has failed.
func Verdict(all []Result) error {
	var failed []string
	for _, r := range all {
		if r.Status == Failed {
			failed = append(failed, r.Check)
		}
	}
	if len(failed) > 0 {
		return fmt.Errorf("this machine fails %d of %d checks: %s", len(failed), len(all), strings.Join(failed, ", "))
	}
	return nil
}
