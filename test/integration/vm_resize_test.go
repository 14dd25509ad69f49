package integration

import (
	"fmt"
	"strconv"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cloister.dev/test/testnode"
)

// The memory of a machine of type q35 follows the limits of its containers, up
// and down again, and no further than the handler allows.
func TestMachineMemoryFollows(t *testing.T) {
	needRoot(t)
	guests, err := guest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n, err := here.start(t.Context(), testnode.Options{Guests: guests,
		GuestOptions: []string{`machine_type = "q35"`, "default_memory = 256", "default_maxmemory = 1024", "boot_timeout = 180"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := closeNode(n); err != nil {
			t.Error(err)
		}
	})
	p := runMachine(t, n)
	c := p.idle(func(c *cri.ContainerConfig) {
		c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 64 << 20}
	})
	total := func() int {
		t.Helper()
		kib, err := strconv.Atoi(c.run("awk '/MemTotal/{print $2}' /proc/meminfo"))
		if err != nil {
			t.Fatal(err)
		}
		return kib >> 10
	}
	limit := func(mib int64) error {
		_, err := n.Runtime.UpdateContainerResources(t.Context(), &cri.UpdateContainerResourcesRequest{ContainerId: c.id,
			Linux: &cri.LinuxContainerResources{MemoryLimitInBytes: mib << 20}})
		return err
	}
	small := total()
	if err := limit(600); err != nil {
		t.Fatal(err)
	}
	if large := total(); large < small+300 {
		t.Errorf("the machine grew from %d to %d MiB", small, large)
	}
	if got := c.run("cat /sys/fs/cgroup/memory.max"); got != fmt.Sprint(600<<20) {
		t.Errorf("the container's limit is %s", got)
	}
	wantError(t, limit(2000), codes.InvalidArgument, "default_maxmemory")
	if err := limit(64); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "the machine gives memory back", func() bool { return total() <= small+64 })
	p.remove()
}
