package fault

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestMachinesLeaveNothing starts virtual machines four at a time, runs a
// program in each, and removes them all. No QEMU, virtiofsd, tap, mount or
// cgroup is left, and neither is what the shim holds open for them.
func TestMachinesLeaveNothing(t *testing.T) {
	t.Setenv("HANDLER", "vm")
	n := node(t, "cni")
	machine := func(name string) (pod, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		defer cancel()
		p, err := runPod(ctx, n, name, "-lines", "-n", "1", "-hold")
		if err != nil {
			return p, err
		}
		r, err := n.Runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: p.container, Cmd: []string{"/demo", "-lines", "-n", "1"}, Timeout: 60})
		if err != nil || !bytes.Equal(r.Stdout, []byte("line 1\n")) {
			return p, fmt.Errorf("exec in %s: %q, %w", name, r.GetStdout(), err)
		}
		return p, nil
	}
	first, err := machine("first") // what is made once is no leak
	if err != nil {
		t.Fatal(err)
	}
	remove(t, n, first)
	before := settle(t, n, nil)
	count := number(t, "MACHINES", 20)
	pods := make([]pod, count)
	began := time.Now()
	each(t, count, 4, func(i int) (err error) {
		pods[i], err = machine(fmt.Sprintf("machine-%d", i))
		return err
	})
	t.Logf("%d machines in %v", count, time.Since(began).Round(time.Second/10))
	each(t, count, 4, func(i int) error {
		if pods[i].sandbox != "" {
			remove(t, n, pods[i])
		}
		return nil
	})
	after := settle(t, n, before)
	for what, was := range before {
		if after[what] > was+allowed[what] {
			t.Errorf("%s: %d before, %d after", what, was, after[what])
		}
	}
	if left := entries(filepath.Join(n.State(), "shim", "vm", "m")); left > 0 {
		t.Errorf("%d folders of machines are left", left)
	}
	t.Logf("before %v, after %v", before, after)
}
