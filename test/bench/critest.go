package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// critestNames are critest's operations as the table calls them.
var critestNames = map[string]string{
	"CreatePod": "critest: pod create", "StatusPod": "critest: pod status",
	"StopPod": "critest: pod stop", "RemovePod": "critest: pod remove",
	"CreateContainer": "critest: container create", "StartContainer": "critest: container start",
	"StatusContainer": "critest: container status", "StopContainer": "critest: container stop",
	"RemoveContainer": "critest: container remove",
	"PullImage":       "critest: image pull", "StatusImage": "critest: image status",
	"RemoveImage": "critest: image remove", "ListImages": "critest: image list",
}

// critest runs the suite's own benchmarks and takes over their samples.
func (b *bench) critest(ctx context.Context, program string, pods, containers, images int) error {
	dir := filepath.Join(b.node.Dir, "critest")
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	params := filepath.Join(dir, "params.yaml")
	yaml := fmt.Sprintf("podsNumber: %d\npodsNumberParallel: 1\ncontainersNumber: %d\ncontainersNumberParallel: 1\n"+
		"imagesNumber: %d\nimagesNumberParallel: 1\npodContainerStartBenchmarkTimeoutSeconds: 10\n", pods, containers, images)
	if err := os.WriteFile(params, []byte(yaml), 0o644); err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, program, "-runtime-endpoint", b.node.Endpoint(), "-runtime-handler", b.handler,
		"-benchmark", "-benchmarking-params-file", params, "-benchmarking-output-dir", dir, "-ginkgo.no-color").CombinedOutput()
	if err != nil {
		return fmt.Errorf("critest -benchmark: %w:\n%s", err, out)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*_benchmark_data.json"))
	if err != nil {
		return err
	}
	if len(files) < 4 {
		return fmt.Errorf("critest -benchmark wrote %d result files, 4 are expected", len(files))
	}
	for _, f := range files {
		if err := b.take(f); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) take(file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var data struct {
		OperationsNames []string
		Datapoints      []struct{ OperationsDurationsNs []int64 }
	}
	if err := json.Unmarshal(text, &data); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	for _, p := range data.Datapoints {
		for i, ns := range p.OperationsDurationsNs {
			if i >= len(data.OperationsNames) {
				return fmt.Errorf("%s: more durations than operations", file)
			}
			name := critestNames[data.OperationsNames[i]]
			if name == "" {
				name = "critest: " + data.OperationsNames[i]
			}
			b.result.add(name, time.Duration(ns))
		}
	}
	return nil
}
