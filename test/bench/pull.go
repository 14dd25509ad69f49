package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// bulkImages are pulled by every subject, each into an empty store.
var bulkImages = []struct{ name, ref string }{
	{"pull 1 GiB, 10 layers", "registry.k8s.io/bench/large:1"},
	{"pull 3,000 small files", "registry.k8s.io/bench/small:1"},
}

// pulls times one pull of each of the bulk images by one subject. A fresh daemon
// gives each an empty store, and makes the greatest size that its memory ever
// had the pull's.
func pulls(ctx context.Context, p programs, hosts, trash, subject string, r *result) error {
	for _, i := range bulkImages {
		o := p.options(subject, hosts)
		o.Trash = trash
		if err := pull(ctx, o, i.name, i.ref, r); err != nil {
			return fmt.Errorf("%s: %w", i.name, err)
		}
	}
	return nil
}

func pull(ctx context.Context, o testnode.Options, name, ref string, r *result) (err error) {
	node, err := testnode.Start(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, node.Close()) }()
	syscall.Sync() // what an earlier subject left to write is not this one's
	start := time.Now()
	if _, err := node.Image.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
		return err
	}
	r.add(name, time.Since(start))
	used, err := processorTime(node.PID())
	if err != nil {
		return err
	}
	r.add(name+", CPU", used)
	peak, err := peakMemory(node.PID())
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Peak[name] = max(r.Peak[name], peak)
	return nil
}

// processorTime is what a process has used in its life.
func processorTime(pid int) (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	f := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
	if len(f) < 13 {
		return 0, fmt.Errorf("process %d does not tell its processor time", pid)
	}
	var ticks int64
	for _, v := range f[11:13] { // in user and in kernel mode
		n, err := strconv.ParseInt(string(v), 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / 100, nil // the kernel's unit towards programs
}

// peakMemory is the greatest resident size that a process ever had, in bytes.
func peakMemory(pid int) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(text) {
		if f := bytes.Fields(line); len(f) > 1 && string(f[0]) == "VmHWM:" {
			kb, err := strconv.ParseInt(string(f[1]), 10, 64)
			return kb << 10, err
		}
	}
	return 0, fmt.Errorf("process %d does not tell its peak memory", pid)
}

// peakRows are the memory peaks of the pulls.
func peakRows(results map[string]*result) []row {
	var rows []row
	for _, i := range bulkImages {
		r := row{name: "peak memory, " + i.name, unit: "MB", values: map[string][]float64{},
			budgets: map[string]budget{cloister: {ratio: 1}}}
		for s, res := range results {
			if v := res.Peak[i.name]; v > 0 {
				r.values[s] = []float64{megabytes(v)}
			}
		}
		rows = append(rows, r)
	}
	return rows
}
