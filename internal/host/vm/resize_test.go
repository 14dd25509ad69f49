package vm

import (
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	hostv1 "cloister.dev/api/host/v1"
	"cloister.dev/internal/host/vm/machine"
)

func p[T any](v T) *T { return &v }

func TestLimitsChange(t *testing.T) {
	begin := limits{CPU: 0.5, Memory: 100 * mib}
	for name, c := range map[string]struct {
		r    *specs.LinuxResources
		want limits
	}{
		"nothing":        {nil, begin},
		"empty":          {&specs.LinuxResources{Memory: &specs.LinuxMemory{}, CPU: &specs.LinuxCPU{}}, begin},
		"memory":         {&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: p(int64(200 * mib))}}, limits{0.5, 200 * mib}},
		"without memory": {&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: p(int64(-1))}}, limits{0.5, 0}},
		"cpu":            {&specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: p(int64(150000)), Period: p(uint64(100000))}}, limits{1.5, 100 * mib}},
		"without cpu":    {&specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: p(int64(-1)), Period: p(uint64(100000))}}, limits{0, 100 * mib}},
		"no period":      {&specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: p(int64(5)), Period: p(uint64(0))}}, limits{0, 100 * mib}},
	} {
		if got := begin.change(c.r); got != c.want {
			t.Errorf("%s: %+v, want %+v", name, got, c.want)
		}
	}
}

func TestNeeded(t *testing.T) {
	if got := needed(nil); got != (machine.Size{}) {
		t.Errorf("nothing needs %+v", got)
	}
	got := needed(map[string]limits{"a": {CPU: 0.6, Memory: 100 * mib}, "b": {CPU: 0.6}, "c": {Memory: 50*mib + 1}})
	if want := (machine.Size{CPUs: 2, Memory: 150*mib + guestMemory}); got != want {
		t.Errorf("needed %+v, want %+v", got, want)
	}
}

func TestMaxSize(t *testing.T) {
	size := machine.Size{CPUs: 2, Memory: 512 * mib}
	for _, c := range []struct {
		o    *hostv1.MachineOptions
		want machine.Size
	}{
		{&hostv1.MachineOptions{MachineType: machine.Microvm, DefaultMaxvcpus: 4}, machine.Size{}},
		{&hostv1.MachineOptions{MachineType: machine.Q35}, machine.Size{}},
		{&hostv1.MachineOptions{MachineType: machine.Q35, DefaultMaxvcpus: 1, DefaultMaxmemory: 1024}, machine.Size{CPUs: 2, Memory: 1024 * mib}},
	} {
		if got := maxSizeOf(size, c.o); got != c.want {
			t.Errorf("%v: %+v, want %+v", c.o, got, c.want)
		}
	}
}
