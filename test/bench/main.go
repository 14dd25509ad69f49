// bench measures containerd v2.4.2 and Cloister in one run on this machine:
// same images, same CNI configuration, same runc, each daemon with folders of
// its own, one daemon at a time, in turns so that drift of the machine meets
// both. It prints one table with the budgets and writes every sample to
// out/TIME.json. It exits with 1 when a budget is missed.
//
// Environment, with defaults:
//
//	BENCH_PODS=50 BENCH_CONTAINERS=50 BENCH_IMAGES=10   samples of critest's benchmarks
//	BENCH_ROUNDS=2        turns; the samples above are spread over them
//	BENCH_PARALLEL=5      how many at once in the parallel measurements
//	BENCH_LIST=1000       containers (created, not started) when lists are timed
//	BENCH_MEMORY=40       pods with one running container each when memory is read
//	BENCH_MACHINES=20     virtual machines, booted bare and as pods in turns; 0: none
//	BENCH_PULLS=3         pulls of each of the large images, each into an empty store
//	BENCH_ONLY=           "pull" measures nothing but these
//	BENCH_STREAM=1024     MiB through a container's stdout
//	BENCH_SUBJECTS=containerd,cloister,cloister-crun   or none
//	CLOISTER_BIN=DIR      use these programs instead of building the checkout
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"cloister.dev/test/testnode"
)

// settings are the sizes of a run.
type settings struct {
	Pods, Containers, Images int
	Rounds, Parallel         int
	List, Memory, Pulls      int
	Machines, Stream         int
	Only                     string
	Subjects                 []string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	met, err := run(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
	}
	if err != nil || !met {
		stop()
		os.Exit(1)
	}
}

func fromEnvironment() (settings, error) {
	s := settings{Subjects: []string{containerd, cloister, cloisterCrun}, Only: os.Getenv("BENCH_ONLY")}
	if s.Only != "" && s.Only != "pull" {
		return s, fmt.Errorf("BENCH_ONLY=%s: only pull can be measured alone", s.Only)
	}
	for _, f := range []struct {
		name string
		into *int
		def  int
	}{
		{"BENCH_PODS", &s.Pods, 50}, {"BENCH_CONTAINERS", &s.Containers, 50}, {"BENCH_IMAGES", &s.Images, 10},
		{"BENCH_ROUNDS", &s.Rounds, 2}, {"BENCH_PARALLEL", &s.Parallel, 5},
		{"BENCH_LIST", &s.List, 1000}, {"BENCH_MEMORY", &s.Memory, 40}, {"BENCH_MACHINES", &s.Machines, 20},
		{"BENCH_STREAM", &s.Stream, 1024},
		{"BENCH_PULLS", &s.Pulls, 3},
	} {
		*f.into = f.def
		if v := os.Getenv(f.name); v != "" {
			var err error
			if *f.into, err = strconv.Atoi(v); err != nil || *f.into < 0 || *f.into == 0 && f.into != &s.Machines {
				return s, fmt.Errorf("%s=%s: a number from 1 up is wanted", f.name, v)
			}
		}
	}
	switch v := os.Getenv("BENCH_SUBJECTS"); v {
	case "":
	case "none":
		s.Subjects = nil // virtual machines alone
	default:
		s.Subjects = strings.Split(v, ",")
	}
	return s, nil
}

func run(ctx context.Context) (met bool, err error) {
	set, err := fromEnvironment()
	if err != nil {
		return false, err
	}
	checkout, err := testnode.Checkout()
	if err != nil {
		return false, err
	}
	p, err := build(ctx, checkout)
	if err != nil {
		return false, err
	}
	results := make(map[string]*result)
	for _, s := range set.Subjects {
		results[s] = newResult()
	}
	if set.Only == "" {
		if err := rounds(ctx, checkout, "", set.Rounds, results, set.Subjects, func(hosts, s string, round int) error {
			return turn(ctx, p, hosts, s, set, round, results[s])
		}, "-pause", p.pause); err != nil {
			return false, err
		}
	}
	var vms *machines
	if set.Machines > 0 && set.Only == "" {
		if vms, err = bootMachines(ctx, checkout, p, set, results); err != nil {
			return false, err
		}
	}
	// The OCI runtime takes no part in a pull: one of the two is enough.
	trash, err := os.MkdirTemp("/tmp", "clt")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(trash)
	subjects := slices.DeleteFunc(slices.Clone(set.Subjects), func(s string) bool { return s == cloisterCrun })
	if err := rounds(ctx, checkout, "pulls, ", set.Pulls, results, subjects, func(hosts, s string, _ int) error {
		return pulls(ctx, p, hosts, trash, s, results[s])
	}, "-only", "bulk"); err != nil {
		return false, err
	}
	if err := save(checkout, set, results); err != nil {
		return false, err
	}
	delete(results, vmHandler) // a table of its own
	met = true
	if len(set.Subjects) > 0 {
		met = table(os.Stdout, set, results)
	}
	if vms != nil {
		fmt.Println()
		met = vms.print(os.Stdout) && met
	}
	for _, s := range set.Subjects {
		if f := results[s].Failed; f != "" {
			fmt.Printf("\n%s did not finish: %s\n", s, f)
			met = met && s == cloisterCrun // a crun that does not run here is the machine's
		}
	}
	return met, nil
}

// bootMachines measures virtual machines, with a registry of their own.
func bootMachines(ctx context.Context, checkout string, p programs, set settings, results map[string]*result) (vms *machines, err error) {
	fmt.Fprintln(os.Stderr, "virtual machines")
	registry, err := testnode.StartRegistry(ctx, checkout, "-pause", p.pause)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, registry.Close()) }()
	if vms, err = measureMachines(ctx, p, registry.Hosts, os.Getenv("BENCH_WORK"), set); err != nil {
		return nil, fmt.Errorf("virtual machines: %w", err)
	}
	results[vmHandler] = vms.vm.result
	return vms, nil
}

// rounds gives each subject its turn, n times, with a registry of the images
// that the arguments name. One that failed gets no further turn.
func rounds(ctx context.Context, checkout, what string, n int, results map[string]*result, subjects []string,
	turn func(hosts, subject string, round int) error, images ...string) (err error) {
	registry, err := testnode.StartRegistry(ctx, checkout, images...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, registry.Close()) }()
	for round := range n {
		for _, s := range subjects {
			fmt.Fprintf(os.Stderr, "%sround %d of %d: %s\n", what, round+1, n, s)
			if results[s].Failed != "" {
				continue
			}
			if err := turn(registry.Hosts, s, round); err != nil {
				if ctx.Err() != nil {
					return err
				}
				results[s].Failed = err.Error()
				fmt.Fprintf(os.Stderr, "%s: %v\n", s, err)
			}
		}
	}
	return nil
}

// turn measures one subject for one round in a daemon of its own.
func turn(ctx context.Context, p programs, hosts, subject string, set settings, round int, r *result) (err error) {
	node, err := testnode.Start(ctx, p.options(subject, hosts))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, node.Close()) }()
	b := &bench{node: node, set: set, result: r, handler: handlerOf(subject)}
	if err := b.prepare(ctx); err != nil {
		return err
	}
	if round == 0 {
		if err := b.memory(ctx); err != nil {
			return err
		}
		if err := b.lists(ctx); err != nil {
			return err
		}
	}
	if err := b.critest(ctx, p.critest, share(set.Pods, round, set.Rounds),
		share(set.Containers, round, set.Rounds), share(set.Images, round, set.Rounds)); err != nil {
		return err
	}
	for _, parallel := range []int{1, set.Parallel} {
		if err := b.pods(ctx, share(set.Pods, round, set.Rounds), parallel); err != nil {
			return err
		}
		if err := b.containers(ctx, share(set.Containers, round, set.Rounds), parallel); err != nil {
			return err
		}
	}
	return nil
}

// share is the part of n that falls into one round.
func share(n, round, rounds int) int {
	return n*(round+1)/rounds - n*round/rounds
}

func save(checkout string, set settings, results map[string]*result) error {
	dir := filepath.Join(checkout, "test/bench/out")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	b, err := json.MarshalIndent(struct {
		Settings settings
		Results  map[string]*result
	}{set, results}, "", " ")
	if err != nil {
		return err
	}
	file := filepath.Join(dir, time.Now().UTC().Format("20060102-150405")+".json")
	fmt.Fprintln(os.Stderr, "samples:", file)
	return os.WriteFile(file, b, 0o644)
}
